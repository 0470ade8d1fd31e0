"""The rule of tests/operands.py, but for what the kernels make of fp32 masters beside 16-bit operands."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.operands import (
    F32,
    Operands,
    assert_no_worse_than_torch,
    check_against_torch,
    forward_and_backward,
    torch_sequence,
)

# They multiply with two pieces of a master: of the sum of the magnitudes this much is lost, where fp32
# arithmetic loses less still.
MASTERS_BOUND = 2.0**-19
NEEDS = ("x", "lora_a", "lora_b")


def check(given: Operands, op) -> None:
    """Forward, dx and the adapters' gradients of `op`, outside autocast."""
    if given.lora_a.dtype == given.x.dtype:
        check_against_torch(given, op)
        return
    y, gradients = forward_and_backward(op, given)
    own_y, own = forward_and_backward(torch_sequence, given)
    exact_y, exact = forward_and_backward(torch_sequence, given.double())
    assert_no_worse_than_torch(y, own_y, exact_y, "y")
    assert_no_worse_than_torch(gradients["x"], own["x"], exact["x"], "gradient of x")
    double = given.double()
    absolute = replace(double, **{name: getattr(double, name).abs() for name in ("x", "weight", *NEEDS[1:])})
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16).abs()
    _, magnitude = forward_and_backward(torch_sequence, absolute, dy=dy)
    for name in NEEDS[1:]:
        assert gradients[name].dtype == F32
        error = (gradients[name].double() - exact[name]).abs()
        assert (error <= MASTERS_BOUND * magnitude[name]).all(), f"gradient of {name}"
