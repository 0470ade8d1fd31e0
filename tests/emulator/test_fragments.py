"""Which lane holds what, and where wgmma looks for it, against the tables of CUTLASS's CuTe."""

import ctypes
import itertools

import pytest

from tests.emulator.native import library

pycute = pytest.importorskip("pycute", exc_type=ImportError)
Layout, Swizzle = pycute.Layout, pycute.Swizzle


def element(function, *arguments):
    """(row, column) of one of the fragment functions."""
    out = (ctypes.c_int * 2)()
    getattr(library(), function)(*arguments, out)
    return tuple(out)


def address(descriptor, mn_major, element_bytes, row, k):
    function = library().emulator_element_address
    function.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32]
    function.restype = ctypes.c_uint32
    return function(descriptor, mn_major, element_bytes, row, k)


def descriptor(start, leading, stride, mode, base_offset=0):
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | base_offset << 49 | mode << 62


# cute/atom/mma_traits_sm80.hpp: (thread, value) to the index of an element in the column-major matrix, of
# 16×K for A, 8×K for B (that is, Bᵀ), 16×8 for C.
ROW_16X8 = Layout(((4, 8), (2, 2)), ((32, 1), (16, 8)))
MMA = {
    "m16n8k8 16-bit": (2, 8, ROW_16X8, Layout(((4, 8), 2), ((16, 1), 8))),
    "m16n8k16 16-bit": (
        2,
        16,
        Layout(((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))),
        Layout(((4, 8), (2, 2)), ((16, 1), (8, 64))),
    ),
    "m16n8k4 tf32": (4, 4, Layout(((4, 8), 2), ((16, 1), 8)), Layout(((4, 8), 1), ((8, 1), 0))),
    "m16n8k8 tf32": (
        4,
        8,
        Layout(((4, 8), (2, 2)), ((16, 1), (8, 64))),
        Layout(((4, 8), 2), ((8, 1), 32)),
    ),
}


def lanes_and_values(layout, lanes=32):
    return itertools.product(range(lanes), range(pycute.size(layout) // lanes))


@pytest.mark.parametrize("shape", MMA)
def test_mma_operands_are_where_cute_says(shape):
    element_bytes, k, a, b = MMA[shape]
    assert pycute.size(a) == 16 * k
    assert pycute.size(b) == 8 * k
    for lane, value in lanes_and_values(a):
        row, column = element("emulator_a_element", element_bytes, lane, value)
        assert row + 16 * column == a(lane, value), (lane, value)
    for lane, value in lanes_and_values(b):
        row, column = element("emulator_b_element", element_bytes, lane, value)
        assert column + 8 * row == b(lane, value), (lane, value)


def test_mma_accumulators_are_where_cute_says():
    for lane, value in lanes_and_values(ROW_16X8):
        row, column = element("emulator_accumulator_element", lane, value)
        assert row + 16 * column == ROW_16X8(lane, value), (lane, value)


# cute/atom/mma_traits_sm90_gmma.hpp: CLayout_64xN, and ALayout_64x16 and ALayout_64x8 for an A in registers.
@pytest.mark.parametrize("n", range(8, 257, 8))
def test_wgmma_accumulators_are_where_cute_says(n):
    layout = Layout(((4, 8, 4), (2, 2, n // 8)), ((128, 1, 16), (64, 8, 512)))
    assert pycute.size(layout) == 64 * n
    for thread, value in lanes_and_values(layout, 128):
        row, column = element("emulator_accumulator_element", thread % 32, value)
        assert 16 * (thread // 32) + row + 64 * column == layout(thread, value), (thread, value)


@pytest.mark.parametrize(
    ("element_bytes", "layout"),
    [
        (2, Layout(((4, 8, 4), (2, 2, 2)), ((128, 1, 16), (64, 8, 512)))),
        (4, Layout(((4, 8, 4), (2, 2)), ((64, 1, 16), (8, 256)))),
    ],
)
def test_wgmma_register_operands_are_where_cute_says(element_bytes, layout):
    for thread, value in lanes_and_values(layout, 128):
        row, column = element("emulator_a_element", element_bytes, thread % 32, value)
        assert 16 * (thread // 32) + row + 64 * column == layout(thread, value), (thread, value)


# cute/atom/copy_traits_sm75.hpp: (thread, bit) of the shared rows and of the registers to a common bit index;
# SM75_U32x{1,2,4}_LDSM_N and SM75_U16x{2,4,8}_LDSM_T. Stores (copy_traits_sm90.hpp) use the same tables.
LDMATRIX = {
    (1, False): (((8, 4), 128), ((128, 0), 1), (32, 32), (32, 1)),
    (2, False): (((16, 2), 128), ((128, 0), 1), (32, (32, 2)), (32, (1, 1024))),
    (4, False): ((32, 128), (128, 1), (32, (32, 4)), (32, (1, 1024))),
    (1, True): (((8, 4), 128), ((128, 0), 1), ((4, 8), (16, 2)), ((256, 16), (1, 128))),
    (2, True): (((16, 2), 128), ((128, 0), 1), ((4, 8), (16, 2, 2)), ((256, 16), (1, 128, 1024))),
    (4, True): ((32, 128), (128, 1), ((4, 8), (16, 2, 4)), ((256, 16), (1, 128, 1024))),
}


@pytest.mark.parametrize(("matrices", "transposed"), LDMATRIX)
def test_ldmatrix_registers_hold_what_cute_says(matrices, transposed):
    source_shape, source_stride, shape, stride = LDMATRIX[matrices, transposed]
    source, registers = Layout(source_shape, source_stride), Layout(shape, stride)
    for lane, matrix, half in itertools.product(range(32), range(matrices), range(2)):
        row, column = element("emulator_matrix_element", lane, half, int(transposed))
        supplier = 8 * matrix + row  # the lane whose address the row is at
        assert source(supplier, 16 * column) == registers(lane, 32 * matrix + 16 * half)


# Descriptor encoding and chunks of 16 bytes in the pattern's width, by the bits of CuTe's Swizzle<B, 4, 3>.
MODES = {0: (0, 1), 1: (3, 8), 2: (2, 4), 3: (1, 2)}


@pytest.mark.parametrize("mode", MODES)
def test_swizzle_is_cutes(mode):
    swizzle = Swizzle(MODES[mode][0], 4, 3)
    for position in range(0, 4096, 4):
        assert library().emulator_swizzle(position, mode) == swizzle(position)


def canonical(element_bytes, mn_major, mode, rows, leading, stride):
    """The canonical layouts of make_gmma_desc (cute/atom/mma_traits_sm90_gmma.hpp), in bytes."""
    t, w = 16 // element_bytes, MODES[mode][1]
    if mn_major:
        outer, inner = (stride, leading) if mode == 0 else (leading, stride)
        m = max(rows // (t * w), 1)
        return Layout(((t, w, m), (8, 2)), ((element_bytes, 16, outer), (16 * w, inner)))
    step = leading if mode == 0 else 16
    return Layout(((8, rows // 8), (t, 2)), ((16 * w, stride), (element_bytes, step)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("element_bytes", "mn_major"), [(2, False), (4, False), (2, True)])
@pytest.mark.parametrize("rows", [64, 192])
@pytest.mark.parametrize(("leading", "stride"), [(2048, 4096), (8192, 1024), (128, 256)])
def test_descriptors_address_cutes_canonical_layouts(mode, element_bytes, mn_major, rows, leading, stride):
    start = 8192
    layout = canonical(element_bytes, mn_major, mode, rows, leading, stride)
    swizzle = Swizzle(MODES[mode][0], 4, 3)
    for row, k in itertools.product(range(rows), range(32 // element_bytes)):
        found = address(descriptor(start, leading, stride, mode), mn_major, element_bytes, row, k)
        assert found == swizzle(start + layout(row, k)), (row, k)


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_steps_along_k_advance_the_start_within_the_pattern(mode, element_bytes):
    """A tile as wide as the pattern, as Layout_K_SW*_Atom makes it, is read 32 bytes of K at a time."""
    bits, chunks = MODES[mode]
    width = 16 * chunks
    tile = Layout(((8, 8), width // element_bytes), ((width, 8 * width), element_bytes))
    for step in range(width // 32):
        described = descriptor(4096 + 32 * step, 16, 8 * width, mode)
        for row, k in itertools.product(range(64), range(32 // element_bytes)):
            whole = k + 32 // element_bytes * step
            expected = Swizzle(bits, 4, 3)(4096 + tile(row, whole))
            assert address(described, False, element_bytes, row, k) == expected


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("line", range(8))
def test_base_offset_is_the_line_in_which_the_pattern_begins(mode, line):
    """A pattern that begins at another 128-byte line is the aligned one, moved there (PTX ISA 9.7.15.5.1)."""
    moved = 4096 + 128 * line
    stride = 8 * 16 * MODES[mode][1]
    for row, k in itertools.product(range(64), range(16)):
        aligned = address(descriptor(4096, 16, stride, mode), False, 2, row, k)
        found = address(descriptor(moved, 16, stride, mode, base_offset=line), False, 2, row, k)
        assert found - moved == aligned - 4096
