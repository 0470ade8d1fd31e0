"""What the CUDA ops refuse, and that a launch which fails is an exception and no more."""

from __future__ import annotations

import pytest
import torch

from tests.emulator import Machine, cuda_runtime
from tests.emulator.native import library
from tests.operands import F64, check_against_torch, forward_and_backward, operands
from tests.test_errors import CASES


@pytest.mark.parametrize(("make", "kind", "message"), CASES, ids=[case[2][:50] for case in CASES])
def test_the_error_names_the_argument(emulated, make, kind, message):
    given = make()
    with pytest.raises(kind) as raised:
        emulated(*given.tensors, **given.options)
    assert str(raised.value).splitlines()[0] == f"lora_linear: {message}"


def test_float64_has_no_fused_kernels(emulated):
    given = operands(dtype=F64)
    with pytest.raises(RuntimeError, match="'fused' was asked for, but there are no fused kernels"):
        emulated(*given.tensors)
    emulated.module.set_path("auto")
    assert not emulated.run(lambda: check_against_torch(given, emulated)).launches


def test_a_launch_that_fails_throws_and_leaves_the_process_as_it_was(emulated):
    given = operands(dropout_p=0.3)
    y, gradients = forward_and_backward(emulated, given)  # the figures of the device are known from now on
    assert library().emulator_set_limit(b"major", 7) == 0  # a device that the kernels were not compiled for
    with pytest.raises(RuntimeError, match=r"^lora_linear: cudaErrorNoKernelImageForDevice .* a launch of"):
        emulated(*given.tensors, **given.options)
    with pytest.raises(RuntimeError, match=r"cudaErrorNoKernelImageForDevice .* the dropout mask"):
        emulated.ops.dropout_mask(given.options["seed"], 2, 3, 0.5)
    Machine("a100").run(lambda: None)
    assert cuda_runtime.runtime().cudaGetLastError() == 0
    again, other = forward_and_backward(emulated, given)
    assert torch.equal(y, again)
    assert all(torch.equal(gradients[name], other[name]) for name in gradients)


def test_a_launch_of_the_backward_that_fails_throws_through_autograd(emulated):
    leaves = [t.requires_grad_() for t in operands().tensors]
    y = emulated(*leaves)
    assert library().emulator_set_limit(b"major", 7) == 0
    with pytest.raises(RuntimeError, match="cudaErrorNoKernelImageForDevice"):
        y.sum().backward()
    Machine("a100").run(lambda: None)
    emulated.run(lambda: emulated(*leaves).sum().backward())
