"""Several adapters as one of concatenated ranks: as exact as one after the other, whatever their scalings."""

from __future__ import annotations

import pytest
import torch

from fused_lora.adapter_sum import Adapter, as_one, lora_sum
from tests import models
from tests.operands import BF16, F16, F32, F64, assert_no_worse_than_torch, exact_dy, operands

steady = pytest.fixture(models.steady, autouse=True)
SCALINGS = {
    "equal": (1.5, 1.5),
    "apart by a power of two": (3.0, 0.75),
    "apart": (1.7, -0.3),
    "one of them zero": (0.0, 2.0),
    "all of them zero": (0.0, 0.0),
    "a tensor": (torch.tensor(1.7), 0.3),
}
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (BF16, F32), (F16, F16)]


def adapters_of(dtype, adapter_dtype, scalings) -> tuple[torch.Tensor, ...]:
    """x, W, b and each adapter's A and B, of ranks 4 and 3."""
    first = operands((9,), rank=4, dtype=dtype, adapter_dtype=adapter_dtype)
    second = operands((9,), rank=3, dtype=dtype, adapter_dtype=adapter_dtype, key=1)
    assert first.bias is not None
    return first.x, first.weight, first.bias, first.lora_a, first.lora_b, second.lora_a, second.lora_b


def one_by_one(x, weight, bias, a1, b1, a2, b2, scalings):
    """As PEFT adds them up."""
    y = torch.nn.functional.linear(x, weight, bias)
    total = y
    for a, b, scaling in ((a1, b1, scalings[0]), (a2, b2, scalings[1])):
        total = total + x.to(a.dtype) @ a.t() @ b.t() * scaling
    return total.to(y.dtype)


def summed(x, weight, bias, a1, b1, a2, b2, scalings):
    return lora_sum(x, weight, bias, [Adapter(a1, b1, scalings[0]), Adapter(a2, b2, scalings[1])])


def output_and_gradients(function, tensors, scalings):
    leaves = [t.detach().requires_grad_(i not in (1, 2)) for i, t in enumerate(tensors)]
    y = function(*leaves, scalings)
    gradients = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], exact_dy(y).to(y.dtype))
    return y.detach(), *gradients


@pytest.mark.parametrize("scalings", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
def test_the_sum_is_no_less_exact_than_one_adapter_after_the_other(dtype, adapter_dtype, scalings):
    tensors = adapters_of(dtype, adapter_dtype, scalings)
    ours = output_and_gradients(summed, tensors, scalings)
    theirs = output_and_gradients(one_by_one, tensors, scalings)
    exact = output_and_gradients(one_by_one, [t.double() for t in tensors], scalings)
    names = ("y", "x", "A of the first", "B of the first", "A of the second", "B of the second")
    for what, *values in zip(names, ours, theirs, exact, strict=True):
        assert_no_worse_than_torch(*values, what)


def test_equal_scalings_copy_the_factors_and_nothing_else():
    _, _, _, a1, b1, a2, b2 = adapters_of(BF16, BF16, None)
    a, b, scaling = as_one([Adapter(a1, b1, 1.5), Adapter(a2, b2, 1.5)])
    assert scaling == 1.5
    assert torch.equal(a, torch.cat([a1, a2]))
    assert torch.equal(b, torch.cat([b1, b2], dim=1))


def test_a_scaling_far_below_the_others_keeps_its_adapters_gradients_in_float16():
    """B times 1e-6 has no float16 to be in."""
    scalings = (1.0, 1e-6)
    tensors = [t * 32 if i == 0 else t for i, t in enumerate(adapters_of(F16, F16, scalings))]
    ours = output_and_gradients(summed, tensors, scalings)[-2]
    exact = output_and_gradients(one_by_one, [t.double() for t in tensors], scalings)[-2]
    assert (ours.double() - exact).norm() <= 0.002 * exact.norm()
