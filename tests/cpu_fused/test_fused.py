"""The fused CPU kernels, every level of them, by the rule of tests/operands.py."""

from __future__ import annotations

import pytest
import torch

from fused_lora import reference
from tests.cpu_fused.library import LEVELS, Call, backward, forward, op, supported_levels
from tests.operands import BF16, F32, check_against_torch, forward_and_backward, operands

ROUNDING = {F32: {"rtol": 1e-5, "atol": 2e-5}, BF16: {"rtol": 2**-7, "atol": 2**-8}}
KINDS = [(F32, F32), (BF16, BF16), (BF16, F32)]
# Rows, in, out, rank: one row, none, one column, odd sizes, several chunks of the depth and blocks
# of the output, a rank of several chunks.
SHAPES = [
    (1, 64, 64, 8),
    (7, 203, 113, 3),
    (2, 576, 300, 16),
    (3, 300, 576, 130),
    (4, 2100, 130, 8),
    (16, 4200, 70, 5),
    (0, 24, 16, 4),
    (6, 1, 16, 1),
    (24, 24, 1, 40),
    (1, 1, 1, 1),
    (129, 1023, 1024, 16),
    (40, 1100, 70, 20),
    (21, 2101, 45, 17),
    (600, 576, 576, 8),
    (256, 576, 192, 300),
    (900, 40, 300, 64),
]


@pytest.fixture(params=LEVELS)
def level(request):
    if request.param not in supported_levels():
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.mark.parametrize(("dtype", "adapter_dtype"), KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "in_features", "out_features", "rank"), SHAPES)
def test_every_shape_is_as_exact_as_torch(
    level, rows, in_features, out_features, rank, dtype, adapter_dtype, dropout_p
):
    given = operands((rows,), in_features, out_features, rank, dtype, adapter_dtype, dropout_p=dropout_p)
    check_against_torch(given, op(level))


def test_no_bias(level):
    check_against_torch(operands(bias=False), op(level))


STRIDED = {
    "every second row": lambda x: x[::2],
    "a slice of columns": lambda x: x[:, 3:27],
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded rows": lambda x: x[:1].expand(9, -1),
    "reversed memory, every second column": lambda x: torch.cat([x, x], 1)[:, ::2],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strided_rows_give_what_a_contiguous_copy_gives(level, view, dropout_p, dtype):
    """Of x, and of dy with it: the order of a sum may be another, and nothing else."""
    given = operands((40,), in_features=70, out_features=70, dtype=dtype, dropout_p=dropout_p)
    x = view(given.x)
    given = operands((x.shape[0],), x.shape[1], 70, dtype=dtype, dropout_p=dropout_p)
    dy = view(torch.randn(40, 70, generator=torch.Generator().manual_seed(2)).to(dtype))
    if dy.shape[1] != 70:
        dy = None
    given.x = x
    got = forward_and_backward(op(level), given, dy=dy)
    given.x = x.contiguous()
    expected = forward_and_backward(op(level), given, dy=None if dy is None else dy.contiguous())
    torch.testing.assert_close(got, expected, **ROUNDING[dtype])


@pytest.mark.parametrize("transposed", ["weight", "lora_a", "lora_b"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [1, 3, 16, 30])
def test_parameters_may_be_stored_transposed(level, transposed, dtype, rows):
    given = operands((rows,), 150, 90, 20, dtype)
    expected = forward_and_backward(op(level), given)
    setattr(given, transposed, getattr(given, transposed).t().contiguous().t())
    torch.testing.assert_close(forward_and_backward(op(level), given), expected, **ROUNDING[dtype])


@pytest.mark.parametrize("needs", [("x",), ("lora_a",), ("lora_b",), ("x", "lora_b")])
def test_gradients_go_to_what_needs_them(level, needs):
    check_against_torch(operands((30,), dropout_p=0.3), op(level), needs)


@pytest.mark.parametrize("seed", [0, 1234567, -1, 2**62 + 12345])
@pytest.mark.parametrize(("p", "column_offset"), [(0.1, 0), (0.5, 8), (0.999, 2**35), (1.0, 40)])
def test_the_mask_is_the_reference_mask(level, seed, p, column_offset):
    """x of ones and A of unit rows lay the mask bare in h; g A of ones does so in dx."""
    rows, columns = 5, 300
    key = torch.tensor([seed])
    drawn = reference.dropout_mask(key, rows, columns, p, column_offset=column_offset).float()
    scale = torch.tensor(reference.dropout_rule(p)[1], dtype=F32)
    x, weight = torch.ones(rows, columns), torch.zeros(4, columns)
    options = {"dropout_p": p, "seed": key, "column_offset": column_offset}
    _, h = Call(level, x, weight, torch.eye(columns), torch.zeros(4, columns), None, **options).forward()
    assert torch.equal(h, drawn * scale)
    call = Call(level, x, weight, torch.ones(1, columns), torch.ones(4, 1), None, **options)
    gradients = call.backward(torch.ones(rows, 4), torch.zeros(rows, 1))
    assert torch.equal(gradients["x"], 4 * drawn * scale)
    assert torch.equal(gradients["lora_a"], 4 * drawn.sum(0, keepdim=True) * scale)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), KINDS)
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "rank"), [(1, 640, 700, 8), (300, 576, 600, 16)]
)
def test_threads_change_no_bit(level, rows, in_features, out_features, rank, dtype, adapter_dtype):
    given = operands((rows,), in_features, out_features, rank, dtype, adapter_dtype, dropout_p=0.1)
    one, two, seven = (forward_and_backward(op(level, threads), given) for threads in (1, 2, 7))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    torch.testing.assert_close(one, seven, rtol=0, atol=0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_masters_may_be_rounded_first(level, dropout_p):
    """As autocast does: the same bits as adapters that are bf16 already, and wider gradients."""
    given = operands((65,), 136, 72, 8, BF16, F32, dropout_p=dropout_p)
    y, gradients = forward_and_backward(op(level, round_adapters=True), given)
    given.lora_a, given.lora_b = given.lora_a.bfloat16(), given.lora_b.bfloat16()
    expected, narrow = forward_and_backward(op(level), given)
    assert torch.equal(y, expected)
    assert torch.equal(gradients["x"], narrow["x"])
    for name in ("lora_a", "lora_b"):
        assert gradients[name].dtype == F32
        assert torch.equal(gradients[name].bfloat16(), narrow[name])


@pytest.mark.parametrize("rows", [1, 30])
def test_masters_are_rounded_alike_however_they_lie(level, rows):
    given = operands((rows,), 150, 90, 20, BF16, F32)
    expected = forward_and_backward(op(level, round_adapters=True), given)
    for name in ("lora_a", "lora_b"):
        stored = getattr(given, name)
        for lies in (lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], 2)[:, :, 0]):
            setattr(given, name, lies(stored))
            got = forward_and_backward(op(level, round_adapters=True), given)
            torch.testing.assert_close(got, expected, **ROUNDING[BF16])
        setattr(given, name, stored)


def test_fp32_masters_mean_a_low_rank_path_in_fp32(level):
    given = operands((64,), 576, 64, 16, BF16, F32)
    given.weight.zero_()
    given.bias = None
    _, gradients = forward_and_backward(op(level), given)
    _, exact = forward_and_backward(op(level), given)
    for name in ("lora_a", "lora_b"):
        assert (gradients[name] - exact[name]).norm() / exact[name].norm() < 1e-6


@pytest.mark.parametrize(("dtype", "adapter_dtype"), KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 9, 150])
def test_calls_of_one_x_give_what_each_gives_and_one_dx(level, dtype, adapter_dtype, dropout_p, rows):
    given = [
        operands((rows,), 203, out, rank, dtype, adapter_dtype, dropout_p=dropout_p, key=key)
        for key, (out, rank) in enumerate([(113, 3), (64, 16), (30, 1)])
    ]
    x = given[0].x
    calls = [Call(level, x, *g.tensors[1:], **g.options, threads=2) for g in given]
    ys, h = forward(calls)
    dys = [torch.randn_like(y) for y in ys]
    made = backward(calls, dys, h)
    dx = torch.zeros(x.shape)
    column = 0
    for call, y, dy, gradients in zip(calls, ys, dys, made, strict=True):
        own_y, own_h = call.forward()
        own = call.backward(dy, own_h)
        assert torch.equal(y, own_y)
        assert torch.equal(h[:, column : column + own_h.shape[1]], own_h)
        column += own_h.shape[1]
        assert torch.equal(gradients["lora_a"], own["lora_a"])
        assert torch.equal(gradients["lora_b"], own["lora_b"])
        dx += own["x"]
    # Each addition rounds.
    assert (made[0]["x"] - dx).norm() < 2 * torch.finfo(dtype).eps * dx.norm()
