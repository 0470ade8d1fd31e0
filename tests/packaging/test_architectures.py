"""Which GPUs the CUDA sources are compiled for."""

from __future__ import annotations

import pytest

from build_support.architectures import choose, supported_by
from build_support.toolkit import BuildError, Toolkit

CUDA_12_6 = [(5, 0, ""), (7, 5, ""), (8, 0, ""), (8, 6, ""), (8, 9, ""), (9, 0, "")]
CUDA_13 = [(7, 5, ""), *CUDA_12_6[2:], (10, 0, ""), (10, 3, ""), (11, 0, ""), (12, 0, ""), (12, 1, "")]


def chosen(asked=None, local=(), supported=CUDA_13):
    return choose(asked, local, supported)[0]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("8.0", "8.0"),
        ("8.0;9.0a", "8.0;9.0a"),
        ("8.6 8.9+PTX", "8.6;8.9+PTX"),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "8.0;8.6;9.0;10.0;12.0+PTX"),  # as NVIDIA's containers set it
        ("Ampere;Hopper", "8.0;8.6+PTX;9.0+PTX"),
    ],
)
def test_the_users_list_wins_without_what_is_too_old(asked, expected):
    assert choose(asked, [(9, 0)], CUDA_13) == (expected, "TORCH_CUDA_ARCH_LIST")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("sm_80", r"TORCH_CUDA_ARCH_LIST='sm_80' holds 'sm_80', neither like 8.0"),
        ("7.0;7.5", "they need 8.0 or newer"),
        ("12.0", "holds '12.0', which this nvcc does not know"),
    ],
)
def test_a_list_that_cannot_be_is_an_error(asked, message):
    with pytest.raises(BuildError, match=message):
        chosen(asked, supported=CUDA_12_6)


@pytest.mark.parametrize("asked", [None, "", "native"])
def test_else_the_gpus_at_hand(asked):
    assert choose(asked, [(9, 0), (8, 6), (9, 0)], CUDA_13) == ("8.6;9.0+PTX", "the GPUs at hand")
    assert chosen(asked, [(7, 5), (8, 9)]) == "8.9+PTX"


def test_a_gpu_newer_than_nvcc_gets_the_newest_ptx_that_it_runs():
    assert chosen(local=[(12, 0)], supported=CUDA_12_6) == "9.0+PTX"
    assert chosen(local=[(8, 0), (12, 0)], supported=CUDA_12_6) == "8.0;9.0+PTX"


@pytest.mark.parametrize("local", [[], [(7, 5)]])
def test_else_machine_code_for_every_major_version_and_ptx_for_the_rest(local):
    assert choose(None, local, CUDA_13) == ("8.0+PTX;9.0;10.0;12.0", "no GPU at hand, so the default")
    assert chosen(None, local, CUDA_12_6) == "8.0+PTX;9.0"


def test_nvcc_is_asked_what_it_compiles_for(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_121\\n'\n")
    nvcc.chmod(0o755)
    assert supported_by(Toolkit(tmp_path, "13.0")) == [(7, 5, ""), (8, 0, ""), (12, 1, "")]
