"""The sums of tensor cores: fp32 by default, and hardware's truncating rule against PyPI's `mmasim`."""

import ctypes

import numpy as np
import pytest
import torch

from tests.emulator.native import library

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
FORMATS = {"f16": 0, "bf16": 1, "tf32": 2}
# n, k, format of A and B, whether C and D are fp16: mma.sync, and wgmma with more columns.
SHAPES = [
    (8, 16, "f16", False),
    (8, 16, "f16", True),
    (8, 16, "bf16", False),
    (8, 8, "f16", False),
    (8, 8, "f16", True),
    (8, 8, "bf16", False),
    (8, 8, "tf32", False),
    (8, 4, "tf32", False),
]
WGMMA_SHAPES = [
    (64, 16, "f16", False),
    (64, 16, "f16", True),
    (64, 16, "bf16", False),
    (64, 8, "tf32", False),
]


def bits(tensor):
    """A tensor's bit patterns, as uint32."""
    narrow = torch.int32 if tensor.itemsize == 4 else torch.int16
    unsigned = np.uint32 if tensor.itemsize == 4 else np.uint16
    return tensor.contiguous().view(narrow).numpy().view(unsigned).astype(np.uint32)


def multiply(a, b, c, kind, major):
    """D as bit patterns; `major` 0 sums in fp32, else as tensor cores of that compute capability."""
    half = c.dtype == torch.float16
    left, right, d = bits(a), bits(b), bits(c)
    library().emulator_multiply(
        FORMATS[kind],
        int(half),
        major,
        *(ctypes.c_void_p(x.ctypes.data) for x in (left, right, d)),
        *b.shape[::-1],
    )
    return d


def operands(n, k, kind, half, rng, scale):
    """A, B, C with exponents spread over ±`scale`, so that alignment cuts bits off."""

    def draw(*shape):
        return rng.standard_normal(shape) * np.exp2(rng.uniform(-scale, scale, shape))

    a, b = (torch.from_numpy(draw(*shape)).to(DTYPES[kind]) for shape in ((16, k), (k, n)))
    return a, b, torch.from_numpy(draw(16, n)).to(torch.float16 if half else torch.float32)


def special(n, k, kind, half, rng):
    """Zeros of both signs, subnormals, the largest numbers, infinities and NaNs among ordinary numbers."""

    def draw(dtype, *shape):
        info = torch.finfo(dtype)
        tiny = info.smallest_normal * 2.0**-7 if dtype != torch.float16 else 2.0**-24
        edge = [
            0.0,
            -0.0,
            tiny,
            -3 * tiny,
            info.smallest_normal,
            info.max,
            -info.max,
            np.inf,
            -np.inf,
            np.nan,
        ]
        ordinary = [*rng.standard_normal(20), 1.0, -1.0]
        # One draw in eight is an edge, so that some rows stay finite.
        pick = np.where(rng.random(shape) < 0.125, rng.choice(edge, shape), rng.choice(ordinary, shape))
        return torch.from_numpy(pick).to(dtype)

    a, b = draw(DTYPES[kind], 16, k), draw(DTYPES[kind], k, n)
    return a, b, draw(torch.float16 if half else torch.float32, 16, n)


@pytest.fixture(scope="session")
def nv_ptx():
    pytest.importorskip("mmasim", exc_type=ImportError)
    return pytest.importorskip("mmasim.nv_ptx", exc_type=ImportError)


def simulate(nv_ptx, architecture, n, k, kind, half):
    d = "f16" if half else "f32"
    if n == 8:
        return nv_ptx.MMA(architecture, f"m16n8k{k}.{d}.{kind}.{kind}.{d}")
    return nv_ptx.WGMMA(architecture, f"m64n{n}k{k}.{d}.{kind}.{kind}")


CASES = [("Ampere", 8, shape) for shape in SHAPES] + [("Hopper", 9, shape) for shape in SHAPES + WGMMA_SHAPES]


@pytest.mark.parametrize(("architecture", "major", "shape"), CASES)
@pytest.mark.parametrize("scale", [0, 4, 12])
def test_truncating_sums_are_mmasims(nv_ptx, architecture, major, shape, scale):
    n, k, kind, half = shape
    simulated = simulate(nv_ptx, architecture, *shape)
    rng = np.random.default_rng(17 * scale + n + k)
    for _ in range(8):
        a, b, c = operands(n, k, kind, half, rng, scale)
        expected = bits(simulated(a, b, c))
        np.testing.assert_array_equal(multiply(a, b, c, kind, major), expected)


@pytest.mark.parametrize(("architecture", "major", "shape"), CASES)
def test_truncating_sums_of_special_values_are_mmasims(nv_ptx, architecture, major, shape):
    n, k, kind, half = shape
    simulated = simulate(nv_ptx, architecture, *shape)
    rng = np.random.default_rng(n + k)
    for _ in range(24):
        a, b, c = special(n, k, kind, half, rng)
        expected = bits(simulated(a, b, c))
        np.testing.assert_array_equal(multiply(a, b, c, kind, major), expected)


@pytest.mark.parametrize("shape", SHAPES + WGMMA_SHAPES)
def test_plain_sums_add_in_fp32_in_the_order_of_k(shape):
    n, k, kind, half = shape
    a, b, c = operands(n, k, kind, half, np.random.default_rng(5), 3)
    if kind == "tf32":
        left, right = ((x.view(torch.int32) >> 13 << 13).view(torch.float32).numpy() for x in (a, b))
    else:
        left, right = a.float().numpy(), b.float().numpy()
    expected = c.float().numpy().copy()
    for i in range(k):
        expected += left[:, i : i + 1] * right[i : i + 1]
    expected = torch.from_numpy(expected).to(c.dtype)
    np.testing.assert_array_equal(multiply(a, b, c, kind, 0), bits(expected))


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        # Each 1 is half of fp32's last place and ties to even; Ampere keeps it, in two blocks of eight.
        (2.0**24, {0: 2.0**24, 8: 2.0**24 + 16, 9: 2.0**24 + 16}),
        # A quarter of the last place: 24 bits below 2^25 end at 2, the 25 of Hopper at 1.
        (2.0**25, {0: 2.0**25, 8: 2.0**25, 9: 2.0**25 + 16}),
        (2.0**26, {0: 2.0**26, 8: 2.0**26, 9: 2.0**26}),
    ],
)
def test_small_products_beside_a_large_accumulator(largest, expected):
    a, b = torch.ones(16, 16, dtype=torch.bfloat16), torch.ones(16, 8, dtype=torch.bfloat16)
    c = torch.full((16, 8), largest)
    for major, value in expected.items():
        assert (multiply(a, b, c, "bf16", major).view(np.float32) == value).all(), major
