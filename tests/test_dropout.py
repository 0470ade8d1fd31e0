"""The dropout mask: Philox as published, one rule on every path, drawn again wherever it is needed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import fused_lora
from fused_lora import dropout_mask, lora_linear, reference
from tests.operands import BF16, F16, F32, F64, Operands, forward_and_backward, operands

pytestmark = pytest.mark.usefixtures("either_path")

CSRC = Path(__file__).parent.parent / "csrc"
# Known answers that the authors publish with Random123 (kat_vectors, philox4x32 with 10 rounds):
# counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_reference_philox_gives_the_published_answers(counter, key, result):
    low, high = words(key)
    signed = (high << 32 | low) - (1 << 64 if high >> 31 else 0)
    got = reference.philox4x32_10(tuple(torch.tensor(word) for word in words(counter)), torch.tensor(signed))
    assert [int(word) for word in got] == words(result)


def test_the_kernels_philox_gives_the_published_answers(tmp_path):
    """The header that every device compiles, compiled alone."""
    source = tmp_path / "known.cpp"
    calls = "".join(
        "print({{" + ", ".join(f"0x{w:08x}u" for w in words(counter)) + "}}, "
        f"0x{words(key)[1]:08x}{words(key)[0]:08x}ull);"
        for counter, key, _ in KNOWN
    )
    source.write_text(
        '#include <cstdio>\n#include "common/dropout.h"\n'
        "static void print(fused_lora::Philox4x32 counter, unsigned long long key) {\n"
        "  const auto r = fused_lora::philox4x32_10(counter, key);\n"
        '  std::printf("%08x %08x %08x %08x\\n", r.word[0], r.word[1], r.word[2], r.word[3]);\n'
        "}\nint main() { " + calls + " }\n"
    )
    binary = tmp_path / "known"
    subprocess.run(["c++", "-std=c++17", f"-I{CSRC}", str(source), "-o", str(binary)], check=True)
    printed = subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [result for _, _, result in KNOWN]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("p", [0.0, 2.0**-17, 0.1, 0.5, 0.9, 1.0])
def test_every_path_draws_the_same_mask(seed, p):
    shape = (19, 301)
    composed = dropout_mask(seed, *shape, p)
    with fused_lora.use_path("reference"):
        assert torch.equal(composed, dropout_mask(seed, *shape, p))


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 0), (0, 8), (5, 13), (2**33, 2**35 + 5), (2**40, 7)])
def test_offsets_draw_a_part_of_the_whole(row, column):
    part = dropout_mask(11, 6, 50, 0.4, row_offset=row, column_offset=column)
    expected = reference.dropout_mask(torch.tensor(11), 6, 50, 0.4, row_offset=row, column_offset=column)
    assert torch.equal(part, expected)
    if row < 100 and column < 100:
        whole = dropout_mask(11, row + 6, column + 50, 0.4)
        assert torch.equal(part, whole[row:, column:])


@pytest.mark.parametrize("dtype", [torch.bool, F32, F64, BF16, F16])
def test_mask_in_any_dtype_is_zeros_and_ones(dtype):
    mask = dropout_mask(3, 9, 33, 0.5, dtype=dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask.bool(), dropout_mask(3, 9, 33, 0.5))
    assert set(mask.float().unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_the_share_of_zeros_is_p_in_rows_columns_and_lanes(p):
    rows, columns = 512, 1024
    dropped = ~dropout_mask(2024, rows, columns, p)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(dropped.double().mean() - p) < 5 * sigma / (rows * columns) ** 0.5
    assert ((dropped.double().mean(0) - p).abs() < 6 * sigma / rows**0.5).all()
    assert ((dropped.double().mean(1) - p).abs() < 6 * sigma / columns**0.5).all()
    lanes = dropped.reshape(rows, -1, 8).double().mean((0, 1))
    assert ((lanes - p).abs() < 5 * sigma / (rows * columns / 8) ** 0.5).all()


def test_other_seeds_and_other_rows_draw_other_masks():
    first = dropout_mask(1, 64, 64, 0.5)
    assert not torch.equal(first, dropout_mask(2, 64, 64, 0.5))
    assert len({tuple(row.tolist()) for row in first}) == 64


@pytest.mark.parametrize("threads", [1, 2])
def test_the_mask_does_not_depend_on_the_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mask = dropout_mask(8, 300, 1000, 0.3)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(mask, reference.dropout_mask(torch.tensor(8), 300, 1000, 0.3))


def test_the_op_drops_what_the_mask_says():
    given = operands((40,), 64, 16, 4, F64)
    keep, scale = reference.dropout_rule(0.3)
    mask = dropout_mask(9, 40, 64, 0.3)
    assert scale == 65536 / keep
    y = lora_linear(*given.tensors, scaling=1.5, dropout_p=0.3, seed=9)
    delta = 1.5 * (given.x * mask * scale) @ given.lora_a.t() @ given.lora_b.t()
    torch.testing.assert_close(y, given.x @ given.weight.t() + given.bias + delta)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (F64, F64), (BF16, BF16), (BF16, F32)])
def test_a_shard_of_x_is_dropped_as_its_columns_of_the_whole(dtype, adapter_dtype):
    """What a process of several finds, each with some columns of x, W and A, adds up to what one finds."""
    whole = operands((5, 3), 48, 16, 4, dtype, adapter_dtype, dropout_p=0.5, bias=False)
    y, gradients = forward_and_backward(lora_linear, whole)
    parts = []
    for columns in (slice(0, 8), slice(8, 32), slice(32, 48)):
        options = {**whole.options, "column_offset": columns.start}
        x, weight, lora_a = (t[..., columns] for t in (whole.x, whole.weight, whole.lora_a))
        part = Operands(x, weight, lora_a, whole.lora_b, None, options)
        parts.append(forward_and_backward(lora_linear, part))
    ys, found = zip(*parts, strict=True)
    tolerances = {"rtol": 0.02, "atol": 0.05} if dtype == BF16 else {}
    torch.testing.assert_close(sum(ys), y, **tolerances)
    for name in ("x", "lora_a"):
        torch.testing.assert_close(torch.cat([g[name] for g in found], -1), gradients[name], **tolerances)
    torch.testing.assert_close(sum(g["lora_b"] for g in found), gradients["lora_b"], **tolerances)


def test_a_shard_of_x_is_differentiated_twice_under_its_mask():
    given = operands((3,), 8, 8, 2, F64, dropout_p=0.4)
    options = {**given.options, "column_offset": 16}
    leaves = [t.requires_grad_() for t in given.tensors]
    assert torch.autograd.gradgradcheck(lambda *t: lora_linear(*t, **options), leaves)
    _, first = forward_and_backward(lora_linear, Operands(*given.tensors, options))
    _, other = forward_and_backward(lora_linear, given)
    assert not torch.equal(first["lora_a"], other["lora_a"])


def test_dropping_everything_leaves_the_frozen_linear():
    given = operands(dropout_p=1.0)
    for tensor in given.tensors:
        tensor.requires_grad_()
    y = lora_linear(*given.tensors, **given.options)
    torch.testing.assert_close(y, torch.nn.functional.linear(given.x, given.weight, given.bias))
    y.sum().backward()
    assert not given.lora_a.grad.any()
    assert not given.lora_b.grad.any()
    torch.testing.assert_close(given.x.grad, given.weight.sum(0).expand_as(given.x))


def test_dropout_is_off_in_evaluation():
    given = operands()
    torch.testing.assert_close(
        lora_linear(*given.tensors, dropout_p=0.9, training=False), lora_linear(*given.tensors)
    )


def test_without_a_seed_torchs_generator_governs_the_mask():
    given = operands((8,), 64)

    def draw(seed):
        torch.manual_seed(seed)
        return lora_linear(*given.tensors, dropout_p=0.5)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_expectation_over_seeds_is_the_layer_without_dropout():
    given = operands((4,), 64, 16, 4, F64)
    total = torch.zeros(4, 16, dtype=F64)
    squares = torch.zeros(4, 16, dtype=F64)
    n = 400
    for seed in range(n):
        y = lora_linear(*given.tensors, dropout_p=0.3, seed=seed)
        total += y
        squares += y.square()
    mean = total / n
    deviation = (squares / n - mean.square()).sqrt() / n**0.5
    assert ((mean - lora_linear(*given.tensors)).abs() < 5 * deviation).all()


def test_an_empty_batch_drops_nothing():
    given = operands((0,), dropout_p=0.3)
    with fused_lora.use_path("fused"):  # auto leaves it to torch
        y, gradients = forward_and_backward(lora_linear, given)
    assert y.shape == (0, 16)
    assert not gradients["lora_a"].any()
    assert not gradients["lora_b"].any()
