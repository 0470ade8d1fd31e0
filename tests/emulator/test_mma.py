"""mma.sync, ldmatrix, stmatrix and movmatrix, run as PTX on registers that are packed by CuTe's tables."""

import itertools

import numpy as np
import pytest

from tests.emulator import Machine, Output, Unsupported
from tests.emulator.native import library
from tests.emulator.test_fragments import MMA, ROW_16X8
from tests.emulator.test_tensor_core_rounding import bits, multiply, operands

HEADER = ".version 8.8\n.target sm_90a\n.address_size 64\n"
# modifiers, k, format of A and B, whether C and D are fp16, table of MMA
SHAPES = [
    ("m16n8k16.row.col.f32.f16.f16.f32", 16, "f16", False, "m16n8k16 16-bit"),
    ("m16n8k16.row.col.f16.f16.f16.f16", 16, "f16", True, "m16n8k16 16-bit"),
    ("m16n8k16.row.col.f32.bf16.bf16.f32", 16, "bf16", False, "m16n8k16 16-bit"),
    ("m16n8k8.row.col.f32.f16.f16.f32", 8, "f16", False, "m16n8k8 16-bit"),
    ("m16n8k8.row.col.f16.f16.f16.f16", 8, "f16", True, "m16n8k8 16-bit"),
    ("m16n8k8.row.col.f32.bf16.bf16.f32", 8, "bf16", False, "m16n8k8 16-bit"),
    ("m16n8k8.row.col.f32.tf32.tf32.f32", 8, "tf32", False, "m16n8k8 tf32"),
    ("m16n8k4.row.col.f32.tf32.tf32.f32", 4, "tf32", False, "m16n8k4 tf32"),
]


def names(prefix, count):
    return [f"%{prefix}{i}" for i in range(count)]


def braces(registers):
    return "{" + ", ".join(registers) + "}"


def kernel(shape, counts):
    """Loads each thread's registers of A, B and C, runs the instruction, and stores those of D."""
    lines = [HEADER + ".visible .entry k(.param .u64 d, .param .u64 a, .param .u64 b, .param .u64 c)\n{"]
    lines += [".reg .b32 %t; .reg .b64 %p, %o;"]
    lines += [f".reg .b32 %{x}<{n}>;" for x, n in counts.items()]
    lines += ["mov.u32 %t, %tid.x;"]
    for x in "abc":
        lines += [f"ld.param.u64 %p, [{x}]; mul.wide.u32 %o, %t, {4 * counts[x]}; add.s64 %p, %p, %o;"]
        lines += [f"ld.global.b32 %{x}{i}, [%p+{4 * i}];" for i in range(counts[x])]
    registers = ", ".join(braces(names(x, counts[x])) for x in "dabc")
    lines += [f"mma.sync.aligned.{shape} {registers};"]
    lines += [f"ld.param.u64 %p, [d]; mul.wide.u32 %o, %t, {4 * counts['d']}; add.s64 %p, %p, %o;"]
    lines += [f"st.global.b32 [%p+{4 * i}], %d{i};" for i in range(counts["d"])]
    return "\n".join([*lines, "ret;\n}"])


def pack(matrix, layout, element_bytes):
    """A column-major matrix's bit patterns as each lane's registers: (32, values) packed into uint32."""
    flat = matrix.T.reshape(-1)
    values = layout.size() // 32
    lanes = [[flat[layout(lane, value)] for value in range(values)] for lane in range(32)]
    word = np.uint16 if element_bytes == 2 else np.uint32
    return np.array(lanes, word).view(np.uint32).copy()


def unpack(registers, layout, element_bytes, shape):
    values = registers.view(np.uint16 if element_bytes == 2 else np.uint32)
    flat = np.empty(shape[0] * shape[1], values.dtype)
    for lane, value in itertools.product(range(32), range(values.shape[1])):
        flat[layout(lane, value)] = values[lane, value]
    return flat.reshape(shape[::-1]).T


def run(shape, kind, half, table, a, b, c, machine, *, undefined=()):
    """D's bit patterns, which of its elements are undefined, and the result of the launch.

    undefined: (operand, row, column) of elements that the kernel finds undefined.
    """
    element_bytes, _, layout_a, layout_b = MMA[table]
    out_bytes = 2 if half else 4
    arrays = {
        "a": pack(bits(a), layout_a, element_bytes),
        "b": pack(bits(b.T), layout_b, element_bytes),  # CuTe's B is 8×K
        "c": pack(bits(c), ROW_16X8, out_bytes),
    }
    d = np.zeros_like(arrays["c"])
    module = machine.load(kernel(shape, {x: v.shape[1] for x, v in {**arrays, "d": d}.items()}))
    layouts = {"a": (layout_a, 16), "b": (layout_b, 8), "c": (ROW_16X8, 16)}
    with machine.buffers(d=Output(d), **arrays) as placed:
        for operand, row, column in undefined:
            layout, rows = layouts[operand]
            size = out_bytes if operand == "c" else element_bytes
            index = column + rows * row if operand == "b" else row + rows * column
            values = layout.size() // 32
            (lane, value), *_ = (x for x in np.ndindex(32, values) if layout(*x) == index)
            library().emulator_set_undefined(placed[operand].pointer + size * (values * lane + value), size)
        result = module.launch("k", 1, 32, *(placed[x] for x in "dabc"))
        bytes_undefined = placed["d"].undefined().reshape(32, -1, out_bytes)
    whole = unpack(d, ROW_16X8, out_bytes, (16, 8))
    marks = bytes_undefined.any(axis=2).astype(np.uint16 if half else np.uint32)
    return whole, unpack(marks, ROW_16X8, out_bytes, (16, 8)) != 0, result


@pytest.mark.parametrize(("shape", "k", "kind", "half", "table"), SHAPES)
@pytest.mark.parametrize(
    ("device", "truncating", "major"), [("a100", False, 0), ("a100", True, 8), ("h100", True, 9)]
)
def test_mma_multiplies_the_fragments(shape, k, kind, half, table, device, truncating, major):
    a, b, c = operands(8, k, kind, half, np.random.default_rng(k), 3)
    machine = Machine(device, truncating=truncating)
    d, _, result = run(shape, kind, half, table, a, b, c, machine)
    result.assert_clean()
    np.testing.assert_array_equal(d, multiply(a, b, c, kind, major))
    exact = a.double() @ b.double() + c.double()
    magnitude = a.double().abs() @ b.double().abs() + c.double().abs()
    values = d.astype(np.uint16).view(np.float16) if half else d.view(np.float32)
    # Both factors of tf32 lose 13 bits of 23; f16 results round to 11 bits, in up to two blocks of k.
    relative = 2.0**-9 if half or kind == "tf32" else 2.0**-18
    assert (np.abs(values - exact.numpy()) <= relative * magnitude.numpy()).all()


@pytest.mark.parametrize(("shape", "k", "kind", "half", "table"), SHAPES)
def test_undefined_operands_make_rows_columns_and_elements_undefined(shape, k, kind, half, table):
    a, b, c = operands(8, k, kind, half, np.random.default_rng(0), 1)
    marked = [("a", 11, k - 1), ("b", k // 2, 5), ("c", 3, 6), ("c", 14, 1)]
    d, undefined, result = run(shape, kind, half, table, a, b, c, Machine("a100"), undefined=marked)
    assert result.kinds() == {"uninitialised"}
    expected = np.zeros((16, 8), bool)
    expected[11, :] = expected[:, 5] = expected[3, 6] = expected[14, 1] = True
    np.testing.assert_array_equal(undefined, expected)
    clean = multiply(a, b, c, kind, 0)
    np.testing.assert_array_equal(d[~expected], clean[~expected])


@pytest.mark.parametrize(
    "shape",
    [
        "m8n8k4.row.col.f32.f16.f16.f32",
        "m16n8k16.row.col.f32.f16.f16.f16",
        "m16n8k32.row.col.s32.s8.s8.s32",
        "m16n8k16.col.row.f32.f16.f16.f32",
    ],
)
def test_other_shapes_are_refused(shape):
    with pytest.raises(Unsupported, match="mma"):
        Machine("a100").load(kernel(shape, {"d": 4, "a": 4, "b": 2, "c": 4})).describe("k")


def test_mma_takes_a_whole_warp():
    machine = Machine("a100")
    module = machine.load(kernel(SHAPES[0][0], {"d": 4, "a": 4, "b": 2, "c": 4}))
    arrays = [np.zeros((32, n), np.uint32) for n in (4, 2, 4)]
    result = module.launch("k", 1, 24, Output(np.zeros((32, 4), np.uint32)), *arrays)
    assert "convergence" in result.kinds()


MOVE = """
.visible .entry k(.param .u64 from, .param .u64 to, .param .u64 moved, .param .u32 skew)
{{
.shared .align 16 .b8 source[1024];
.shared .align 16 .b8 target[512];
.reg .b32 %t, %s, %d, %w, %m, %n<4>; .reg .b64 %p, %q, %o; .reg .pred %z;
mov.u32 %t, %tid.x; mov.u32 %s, source; mov.u32 %d, target;
ld.param.u64 %p, [from]; mul.wide.u32 %o, %t, 16; add.s64 %p, %p, %o;
ld.param.u32 %m, [skew]; mad.lo.u32 %w, %t, 16, %m; add.u32 %s, %s, %w; mad.lo.u32 %d, %t, 16, %d;
ld.global.v4.b32 {{%n0, %n1, %n2, %n3}}, [%p];
st.shared.b32 [%s], %n0; st.shared.b32 [%s+4], %n1; st.shared.b32 [%s+8], %n2; st.shared.b32 [%s+12], %n3;
bar.warp.sync -1;
ldmatrix.sync.aligned.{load}.shared.b16 {registers}, [%s];
stmatrix.sync.aligned.{store}.shared.b16 [%d], {registers};
movmatrix.sync.aligned.m8n8.trans.b16 %m, %n0;
bar.warp.sync -1;
setp.ge.u32 %z, %t, {rows};
ld.param.u64 %q, [moved]; mul.wide.u32 %o, %t, 4; add.s64 %q, %q, %o; st.global.b32 [%q], %m;
@%z ret;
ld.param.u64 %p, [to]; mul.wide.u32 %o, %t, 16; add.s64 %p, %p, %o;
ld.shared.v4.b32 {{%n0, %n1, %n2, %n3}}, [%d]; st.global.v4.b32 [%p], {{%n0, %n1, %n2, %n3}};
ret;
}}
"""


def move(matrices, load, store, skew=0):
    """Eight rows of each 8×8 matrix through ldmatrix and stmatrix, and the first matrix through movmatrix."""
    registers = braces(names("n", matrices))
    text = HEADER + MOVE.format(load=load, store=store, registers=registers, rows=8 * matrices)
    given = np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8)
    to, moved = np.zeros((matrices, 8, 8), np.uint16), np.zeros((8, 8), np.uint16)
    module = Machine("h100").load(text)
    result = module.launch("k", 1, 32, given, Output(to), Output(moved), np.uint32(skew))
    return given[:matrices], to, moved, result


@pytest.mark.parametrize("matrices", [1, 2, 4])
@pytest.mark.parametrize("load_transposed", [False, True])
@pytest.mark.parametrize("store_transposed", [False, True])
def test_matrices_move_and_transpose(matrices, load_transposed, store_transposed):
    # Both orders of the modifiers, as nvcc and LLVM write them.
    load = f"m8n8.x{matrices}" + (".trans" if load_transposed else "")
    store = f"x{matrices}" + (".trans" if store_transposed else "") + ".m8n8"
    given, to, moved, result = move(matrices, load, store)
    result.assert_clean()
    turned = load_transposed != store_transposed
    np.testing.assert_array_equal(to, given.transpose(0, 2, 1) if turned else given)
    np.testing.assert_array_equal(moved, given[0] if load_transposed else given[0].T)
    for opcode in ("ldmatrix", "stmatrix"):
        assert result.only.total("shared_requests", opcode) == matrices
        assert result.only.total("wavefronts", opcode) == matrices  # 8 rows of 16 bytes: all 32 banks once


def test_rows_are_aligned_to_16_bytes():
    assert "misaligned" in move(4, "m8n8.x4", "m8n8.x4", skew=4)[3].kinds()
