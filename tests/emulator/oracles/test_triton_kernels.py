"""The kernels that Triton compiled are described as their PTX has them."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", exc_type=ImportError)

from tests.emulator.oracles.triton_kernels import compile_kernels

PTX_TYPES = {"i32": "u32", "fp32": "f32"}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return compile_kernels(tmp_path_factory.mktemp("triton"))


def test_every_kernel_is_compiled_for_every_architecture(kernels):
    names = {kernel.name for kernel in kernels}
    assert names == {"matmul", "matmul_ragged", "softmax", "layer_norm"}
    assert {(kernel.name, kernel.arch) for kernel in kernels} == {
        (name, arch) for name in names for arch in ("sm_80", "sm_90a")
    }
    for kernel in kernels:
        assert f".target {kernel.arch}" in kernel.ptx


def test_parameters_are_those_of_the_ptx_entry_in_order(kernels):
    for kernel in kernels:
        entry = re.search(rf"\.entry {kernel.entry}\(([^)]*)\)", kernel.ptx)
        declared = re.findall(r"\.param \.(\w+)", entry[1])
        expected = [PTX_TYPES.get(parameter.type, "u64") for parameter in kernel.parameters]
        assert declared == expected
        assert [parameter.name for parameter in kernel.parameters[-2:]] == [
            "global_scratch",
            "profile_scratch",
        ]


def test_launch_sizes_are_those_of_the_ptx(kernels):
    for kernel in kernels:
        assert f".reqntid {32 * kernel.num_warps}" in kernel.ptx
        # Triton's shared memory is dynamic: the PTX names it without a size.
        assert re.search(r"\.extern \.shared .*\[\];", kernel.ptx)
        assert kernel.shared_bytes > 0


def test_divisible_sizes_are_copied_asynchronously_and_ragged_ones_by_element(kernels):
    asynchronous = {kernel.name for kernel in kernels if "cp.async.cg.shared.global" in kernel.ptx}
    assert asynchronous == {"matmul"}
    assert {kernel.arch for kernel in kernels if "wgmma.mma_async" in kernel.ptx} == {"sm_90a"}
