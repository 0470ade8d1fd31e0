"""What a call's launches read and write of each buffer, a byte counted once for each launch that touches it.

With u, v and w the elements of x, y and W: forward reads x twice (for h and y) and W once, and writes y.
Backward reads dy twice or, where dB does not share g's read, three times, W and x once, and writes dx. For
elements of two bytes that is 8u + 6v + 4w bytes together, or 8v. The rest are terms in the rank, stated too.
"""

from __future__ import annotations

import math

import pytest

from tests.emulator import Machine
from tests.kernels.call import load, run_backward, run_forward
from tests.kernels.cases import KINDS, case_of, operands_of
from tests.operands import BF16, F16, F32

SHAPE = (512, 192, 128)  # M, K, N
LONG = ("x", "weight", "y", "dy", "dx")
SMALL = ("seed", "bias")
BYTES = {F32: 4, BF16: 2, F16: 2}
BY_NAME = {kind.name: kind for kind in KINDS}


@pytest.fixture(scope="module")
def kernels():
    return load()


def call(kernels, kind, rank, shape=SHAPE, **options):
    case = case_of(kind, shape, rank, **options)
    given, dy = operands_of(case)
    machine = Machine(check_races=False)
    forward = run_forward(kernels, machine, given, kind.mode)
    backward = run_backward(kernels, machine, dy, forward.h, given, kind.mode)
    return forward.run, backward.run


def touched(launch, names=None):
    """{buffer: (bytes read, bytes written)}, each byte once."""
    return {
        name: (traffic.unique_read, traffic.unique_written)
        for name, traffic in launch.buffers.items()
        if (names is None or name in names) and traffic.unique_read + traffic.unique_written
    }


def thin(launch):
    return {name: b for name, b in touched(launch).items() if name not in (*LONG, *SMALL, "workspace")}


def workspace(launch):
    return touched(launch).get("workspace", (0, 0))


def sizes(kind, shape=SHAPE):
    m, k, n = shape
    element = BYTES[kind.dtype]
    return m * k * element, m * n * element, n * k * element


def packed_bytes(kind, rank, rows_and_columns):
    """lora_gemm's low-rank operands, padded to tiles of 64 bytes; fp32 ones as three products of bf16."""
    element = 4 if kind.mode.allow_tf32 else 2
    depth = 3 * rank if kind.has_masters else rank
    tile = 64 // element
    return rows_and_columns * math.ceil(depth / tile) * tile * element


def rank_element(kind):
    return 4 if kind.has_masters else BYTES[kind.dtype]


@pytest.mark.parametrize("weight", ["rows", "transposed"])
@pytest.mark.parametrize(
    ("name", "rank", "dropout_p"),
    [
        ("bf16", 16, 0.1),
        ("bf16", 40, 0.0),
        ("fp16-autocast", 8, 0.1),
        ("bf16-masters", 16, 0.0),
        ("fp16-masters", 40, 0.1),
        ("tf32", 24, 0.1),
        ("fp32", 24, 0.1),
    ],
)
def test_each_launch_touches_what_the_plan_says(kernels, name, rank, dropout_p, weight):
    kind = BY_NAME[name]
    m, k, n = SHAPE
    x, y, w = sizes(kind)
    adapter = BYTES[kind.adapters]
    lora_a, lora_b, h = rank * k * adapter, rank * n * adapter, m * rank * rank_element(kind)
    plain = name == "fp32"
    forward, backward = call(kernels, kind, rank, weight=weight, dropout_p=dropout_p)

    down, gemm = forward.result.launches
    assert touched(down, LONG) == {"x": (x, 0)}
    assert touched(gemm, LONG) == {"x": (x, 0), "weight": (w, 0), "y": (0, y)}
    if plain:
        assert thin(down) == {"lora_a": (lora_a, 0), "h": (0, h)}
        assert thin(gemm) == {"lora_b": (lora_b, 0), "h": (h, 0)}
    else:
        packed = packed_bytes(kind, rank, m + n)
        assert thin(down) == {"lora_a": (lora_a, 0), "lora_b": (lora_b, 0), "h": (0, h)}
        assert not thin(gemm)
        assert (workspace(down), workspace(gemm)) == ((0, packed), (packed, 0))

    one_read = "one read of dy" in backward.description
    assert one_read == (not plain and rank <= 32)
    down, gemm, grad, *rest = backward.result.launches
    assert touched(down, LONG) == {"dy": (y, 0)}
    assert touched(gemm, LONG) == {"dy": (y, 0), "weight": (w, 0), "dx": (0, x)}
    assert touched(grad, LONG) == {"x": (x, 0)} | ({} if one_read else {"dy": (y, 0)})
    read_by_down = {"lora_b": (lora_b, 0)} | ({} if plain else {"lora_a": (lora_a, 0)})
    assert thin(down) == read_by_down | ({"h": (h, 0)} if one_read else {})
    assert thin(gemm) == ({"lora_a": (lora_a, 0)} if plain else {})
    gradients = {"dlora_a": (0, lora_a), "dlora_b": (0, lora_b)}
    read_by_grad = {} if one_read else {"h": (h, 0)}
    if rest:
        assert len(rest) == 1
        assert not touched(rest[0], LONG)
        assert thin(grad).items() >= read_by_grad.items()
        assert (thin(grad) | thin(rest[0])) == read_by_grad | gradients
    else:
        assert thin(grad) == read_by_grad | gradients
    # g, in the rank dtype, and lora_gemm's operands; what is beyond them are partial sums in fp32.
    assert workspace(gemm)[0] == (h if plain else packed_bytes(kind, rank, m + k))
    assert workspace(grad)[0] == h
    partial = workspace(rest[0])[0] if rest else 0
    assert partial % (4 * rank) == 0
    written = sum(workspace(launch)[1] for launch in backward.result.launches)
    assert written == h + (0 if plain else workspace(gemm)[0]) + partial
    assert written <= backward.workspace_bytes

    # Partial sums are written and read. Those of dB by one read of dy cost less than the second read.
    of_b = workspace(down)[1] - h - (0 if plain else workspace(gemm)[0])
    assert 2 * of_b <= y


@pytest.mark.parametrize(("rank", "reads_of_dy"), [(16, 2), (40, 3)])
def test_all_long_operands_together(kernels, rank, reads_of_dy):
    forward, backward = call(kernels, BY_NAME["bf16"], rank)
    m, k, n = SHAPE
    total = sum(
        read + written
        for launch in (*forward.result.launches, *backward.result.launches)
        for read, written in touched(launch, LONG).values()
    )
    u, v, w = m * k, m * n, n * k
    assert total == 8 * u + 2 * (1 + reads_of_dy) * v + 4 * w


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_few_rows_go_forward_in_one_launch(kernels, name, rows):
    kind, rank = BY_NAME[name], 16
    shape = (rows, 192, 128)
    forward, backward = call(kernels, kind, rank, shape, dropout_p=0.0)
    x, y, w = sizes(kind, shape)
    launch = forward.result.only
    assert touched(launch, LONG) == {"x": (x, 0), "weight": (w, 0), "y": (0, y)}
    assert thin(launch) == {
        "lora_a": (rank * 192 * 2, 0),
        "lora_b": (rank * 128 * 2, 0),
        "h": (0, rows * rank * 2),
    }
    assert forward.workspace_bytes == 0
    assert len(backward.result.launches) <= 4
