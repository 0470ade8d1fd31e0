"""lora_linear against the unfused sequence in the same dtype and the equation in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fused_lora
from fused_lora import lora_linear
from tests.operands import (
    BF16,
    DTYPES,
    F32,
    F64,
    GRADIENTS,
    check_against_torch,
    forward_and_backward,
    operands,
)

pytestmark = pytest.mark.usefixtures("either_path")

# Leading dimensions, in, out, rank: one row, none, one column, odd sizes, several row blocks.
SHAPES = [
    ((1,), 64, 64, 8),
    ((7,), 203, 113, 3),
    ((0,), 24, 16, 4),
    ((), 24, 16, 4),
    ((2, 0, 3), 24, 16, 4),
    ((2, 3), 1, 16, 1),
    ((2, 3, 4), 24, 1, 40),
    ((129,), 1023, 1024, 16),
    ((600,), 576, 576, 8),
    ((4, 64), 576, 192, 128),
]


@pytest.fixture(params=["composed", "reference"], autouse=True)
def path(request):
    with fused_lora.use_path(request.param):
        yield request.param


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_every_dtype_is_as_exact_as_torch(dtype, adapter_dtype, dropout_p):
    given = operands((2, 65), 136, 72, 8, dtype, adapter_dtype, dropout_p=dropout_p)
    check_against_torch(given, lora_linear)


@pytest.mark.parametrize(("lead", "in_features", "out_features", "rank"), SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32)])
def test_every_shape_is_as_exact_as_torch(
    lead, in_features, out_features, rank, dropout_p, dtype, adapter_dtype
):
    given = operands(lead, in_features, out_features, rank, dtype, adapter_dtype, dropout_p=dropout_p)
    check_against_torch(given, lora_linear)


@pytest.mark.parametrize("needs", [(), ("x",), ("lora_a",), ("lora_b",), ("weight",), ("bias",), GRADIENTS])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_go_to_what_needs_them(needs, dropout_p):
    given = operands((3, 5), dropout_p=dropout_p)
    check_against_torch(given, lora_linear, needs)
    y = lora_linear(*given.tensors, **given.options)
    assert not y.requires_grad


def test_no_bias():
    check_against_torch(operands(bias=False), lora_linear, ("x", "weight", "lora_a", "lora_b"))


STRIDED = {
    "every second row": lambda x: x[::2],
    "a slice of columns": lambda x: x[:, 3:27],
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded rows": lambda x: x[:1].expand(9, -1),
    "expanded leading dimension": lambda x: x[None].expand(3, -1, -1),
    "permuted leading dimensions": lambda x: x.reshape(2, 5, -1).transpose(0, 1),
    "reversed memory, every second column": lambda x: torch.cat([x, x], 1)[:, ::2],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_strided_x_gives_what_a_contiguous_copy_gives(view, dropout_p):
    x = view(operands((10,), in_features=32).x)
    given = operands(in_features=x.shape[-1], dropout_p=dropout_p)
    given.x = x
    got = forward_and_backward(lora_linear, given)
    given.x = x.contiguous()
    expected = forward_and_backward(lora_linear, given)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("transposed", ["weight", "lora_a", "lora_b"])
def test_parameters_may_be_stored_transposed(transposed):
    given = operands()
    expected = forward_and_backward(lora_linear, given)
    setattr(given, transposed, getattr(given, transposed).t().contiguous().t())
    torch.testing.assert_close(forward_and_backward(lora_linear, given), expected)


@pytest.mark.parametrize("dy", ["expanded", "transposed"])
def test_strided_dy(dy):
    given = operands((6,))
    value = torch.ones(()).expand(6, 16) if dy == "expanded" else torch.randn(16, 6).t()
    got = forward_and_backward(lora_linear, given, dy=value)
    torch.testing.assert_close(got, forward_and_backward(lora_linear, given, dy=value.contiguous()))


def test_an_adapter_of_zeros_leaves_the_frozen_linear_bit_for_bit(path):
    given = operands(dtype=BF16, adapter_dtype=F32)
    given.lora_b.zero_()
    y = lora_linear(*given.tensors, **given.options)
    assert torch.equal(y, F.linear(given.x, given.weight, given.bias))


def test_the_same_inputs_give_the_same_bits():
    given = operands((300,), 576, 192, 16, BF16, F32, dropout_p=0.1)
    first, second = (forward_and_backward(lora_linear, given) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_fp32_masters_without_autocast_mean_a_low_rank_path_in_fp32():
    """Beside the exact delta the error is fp32's, not that of operands rounded to bf16."""
    given = operands((64,), 576, 64, 16, BF16, F32)
    given.weight.zero_()
    given.bias = None
    # y is rounded to bf16 once; the gradients of the masters are not rounded at all.
    _, gradients = forward_and_backward(lora_linear, given)
    _, exact = forward_and_backward(lora_linear, given.double())
    for name in ("lora_a", "lora_b"):
        assert gradients[name].dtype == F32
        assert (gradients[name] - exact[name]).norm() / exact[name].norm() < 1e-6


def test_inference_mode():
    given = operands()
    with torch.inference_mode():
        y = lora_linear(*given.tensors, **given.options)
    torch.testing.assert_close(y, lora_linear(*given.tensors, **given.options))


def test_gradcheck_in_float64():
    given = operands((2, 3), 5, 4, 2, F64)
    leaves = [tensor.requires_grad_() for tensor in given.tensors]
    for dropout_p in (0.0, 0.4):
        assert torch.autograd.gradcheck(
            lambda *t, p=dropout_p: lora_linear(*t, scaling=1.5, dropout_p=p, seed=3), leaves
        )


def test_second_derivatives():
    given = operands((3,), 4, 3, 2, F64)
    leaves = [tensor.requires_grad_() for tensor in given.tensors]
    for dropout_p in (0.0, 0.4):
        assert torch.autograd.gradgradcheck(
            lambda *t, p=dropout_p: lora_linear(*t, scaling=1.5, dropout_p=p, seed=3), leaves
        )


def test_second_derivatives_of_part_of_the_operands():
    """A gradient penalty on x: x trains nothing, only the adapters do."""
    given = operands((3,), dtype=F64, dropout_p=0.3)
    x, _, lora_a, lora_b, _ = given.tensors
    gradients = []
    for op in (lora_linear, fused_lora.reference.lora_linear):
        leaves = [t.detach().requires_grad_() for t in (x, lora_a, lora_b)]
        y = op(leaves[0], given.weight, leaves[1], leaves[2], given.bias, **given.options)
        (dx,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        gradients.append(torch.autograd.grad(dx.square().sum(), leaves[1:]))
    torch.testing.assert_close(gradients[0], gradients[1])
