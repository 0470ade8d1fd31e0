"""Results on the GPU: against float64 by the rule of tests/operands.py, and masks against the CPU's."""

from __future__ import annotations

import pytest
import torch

from fused_lora import dropout_mask, lora_linear, reference
from tests.operands import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    GRADIENTS,
    check_against_torch,
    forward_and_backward,
    operands,
)
from tests.test_op import STRIDED

KERNEL_DTYPES = [pair for pair in DTYPES if pair[0] != F64]
# Rows, in, out, rank: few rows, odd sizes, whole tiles, more blocks than multiprocessors.
SHAPES = [
    (1, 64, 64, 8),
    (1, 4096, 4096, 16),
    (7, 203, 113, 3),
    (16, 576, 576, 1),
    (64, 576, 1536, 40),
    (129, 1023, 1024, 16),
    (256, 1536, 576, 64),
    (2048, 1024, 1024, 256),
]


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_every_dtype(device, path, dtype, adapter_dtype, dropout_p, bias):
    if path == "fused" and dtype == F64:
        pytest.skip("there are no fused kernels for float64")
    given = operands((2, 65), 136, 72, 8, dtype, adapter_dtype, bias=bias, dropout_p=dropout_p)
    check_against_torch(given.to(device), lora_linear)


@pytest.mark.parametrize(("rows", "in_features", "out_features", "rank"), SHAPES)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), KERNEL_DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_every_shape(device, path, rows, in_features, out_features, rank, dtype, adapter_dtype, dropout_p):
    if device.type == "cpu" and rows * in_features * out_features > 1 << 24:
        pytest.skip("too large for a look at the test itself")
    given = operands((rows,), in_features, out_features, rank, dtype, adapter_dtype, dropout_p=dropout_p)
    check_against_torch(given.to(device), lora_linear)


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 40, 64, 128, 256])
def test_every_rank(device, path, rank):
    check_against_torch(operands((200,), 256, 192, rank, BF16, dropout_p=0.1).to(device), lora_linear)


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strided_x(device, path, view, dtype):
    x = view(operands((10,), in_features=32, dtype=dtype).x.to(device))
    given = operands(in_features=x.shape[-1], dtype=dtype, dropout_p=0.3).to(device)
    given.x = x
    check_against_torch(given, lora_linear)


@pytest.mark.parametrize("transposed", ["weight", "lora_a", "lora_b"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_parameters_may_be_stored_transposed(device, path, transposed, dtype):
    given = operands((70,), 64, 96, 8, dtype).to(device)
    setattr(given, transposed, getattr(given, transposed).t().contiguous().t())
    check_against_torch(given, lora_linear)


def test_x_that_begins_at_an_odd_address(device, path):
    given = operands((40,), 64, 96, 8, BF16).to(device)
    memory = torch.empty(40 * 64 + 1, dtype=BF16, device=device)
    memory[1:] = given.x.flatten()
    given.x = memory[1:].reshape(40, 64)
    check_against_torch(given, lora_linear)


@pytest.mark.parametrize(
    "needs", [(), ("x",), ("lora_a",), ("lora_b",), ("lora_a", "lora_b"), ("weight",), ("bias",), GRADIENTS]
)
def test_gradients_go_to_what_needs_them(device, path, needs):
    check_against_torch(operands((80,), 64, 96, 8, BF16, dropout_p=0.3).to(device), lora_linear, needs)


@pytest.mark.parametrize("lead", [(0,), (2, 0, 3), ()])
def test_no_rows_and_no_dimensions(device, path, lead):
    check_against_torch(operands(lead, 64, 48, 8, BF16, dropout_p=0.3).to(device), lora_linear)


def test_tf32_is_taken_where_torch_may_take_it(device, path):
    """Torch's own error, which ours is held to, is then tf32's as well."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        check_against_torch(operands((256,), 512, 384, 16, F32, dropout_p=0.1).to(device), lora_linear)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_fp32_masters_without_autocast_keep_their_precision(device, path):
    given = operands((256,), 576, 64, 16, BF16, F32).to(device)
    given.weight.zero_()
    given.bias = None
    _, gradients = forward_and_backward(lora_linear, given)
    _, exact = forward_and_backward(reference.lora_linear, given.double())
    for name in ("lora_a", "lora_b"):
        assert (gradients[name] - exact[name]).norm() / exact[name].norm() < 1e-5


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("p", [0.0, 2.0**-17, 0.1, 0.5, 1.0])
def test_the_mask_is_the_cpus_bit_for_bit(device, seed, p):
    on_cpu = torch.tensor([seed])
    mask = dropout_mask(on_cpu.to(device), 67, 301, p)
    assert torch.equal(mask.cpu(), dropout_mask(on_cpu, 67, 301, p))


@pytest.mark.parametrize(("row", "column"), [(3, 0), (5, 13), (2**33, 2**35 + 5)])
@pytest.mark.parametrize("dtype", [torch.bool, F32, F64, BF16, F16])
def test_a_part_of_a_mask_is_the_cpus_bit_for_bit(device, row, column, dtype):
    seed = torch.tensor([2024])
    offsets = {"row_offset": row, "column_offset": column, "dtype": dtype}
    mask = dropout_mask(seed.to(device), 19, 83, 0.4, **offsets)
    assert torch.equal(mask.cpu(), dropout_mask(seed, 19, 83, 0.4, **offsets))


def test_the_op_drops_what_the_cpus_mask_says(device, path):
    """With W = 0, A = I and B = I the op's output is the dropped x itself."""
    x = torch.randn(130, 64, generator=torch.Generator().manual_seed(0)).abs() + 1
    eye, seed = torch.eye(64), torch.tensor([9])
    y = lora_linear(
        *(t.to(device) for t in (x, torch.zeros(64, 64), eye, eye)), dropout_p=0.3, seed=seed.to(device)
    )
    assert torch.equal(y.cpu() != 0, dropout_mask(seed, 130, 64, 0.3))
