"""wgmma: operands wherever a descriptor may put them, and what may not happen while one is in flight."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tests.emulator import Machine, Output, Unsupported
from tests.emulator.native import library
from tests.emulator.test_fragments import MODES, address, descriptor
from tests.emulator.test_mma import HEADER, braces, names
from tests.emulator.test_tensor_core_rounding import bits, multiply, operands

BASE = 1024  # where a block's shared memory begins
SHARED = 48 * 1024
B_AT = 16 * 1024  # from the beginning


@dataclass
class Operand:
    """A (M×K) or Bᵀ (N×K) in shared memory."""

    values: torch.Tensor
    start: int  # shared address
    mode: int = 0  # swizzle
    mn_major: bool = False
    leading: int = field(init=False)
    stride: int = field(init=False)

    def __post_init__(self):
        rows, chunks = self.values.shape[0], MODES[self.mode][1]
        atom = 128 * chunks  # bytes: eight lines as wide as the pattern
        if self.mn_major and self.mode != 0:
            # Two atoms along K, then the next ones along M or N.
            self.leading, self.stride = 2 * atom, atom
        else:
            # Atoms along M or N, then the next chunk of K (which a swizzled K-major matrix has inside).
            per_atom = 16 // self.values.itemsize if self.mn_major else 8
            self.leading, self.stride = atom * (rows // per_atom), atom

    @property
    def descriptor(self):
        return descriptor(self.start, self.leading, self.stride, self.mode)

    def place(self, image):
        size = self.values.itemsize
        for (row, k), value in np.ndenumerate(bits(self.values)):
            at = address(self.descriptor, self.mn_major, size, row, k) - BASE
            image[at : at + size] = np.frombuffer(int(value).to_bytes(size, "little"), np.uint8)


def shape_of(n, kind):
    return f"m64n{n}k{8 if kind == 'tf32' else 16}"


FENCE, COMMIT = "wgmma.fence.sync.aligned;\n", "wgmma.commit_group.sync.aligned;\n"
WAIT = "wgmma.wait_group.sync.aligned 0;\n"
ISSUE = FENCE + "{mma}\n" + COMMIT + WAIT
PROLOGUE = """
.visible .entry k(.param .u64 out, .param .u64 image, .param .u64 c, .param .u64 a,
                  .param .u64 pa, .param .u64 pb)
{{
.shared .align 1024 .b8 tile[{bytes}];
.reg .b32 %t, %s, %x, %w, %r<4>, %d<{registers}>, %e<{registers}>; .reg .b64 %p, %o, %da, %db;
.reg .pred %yes, %no, %more, %q;
mov.u32 %t, %tid.x; shr.u32 %w, %t, 5; setp.eq.u32 %yes, %t, %t; setp.ne.u32 %no, %t, %t;
ld.param.u64 %da, [pa]; ld.param.u64 %db, [pb];
ld.param.u64 %p, [image]; mul.wide.u32 %o, %t, 4; add.s64 %p, %p, %o;
mov.u32 %s, tile; mad.lo.u32 %s, %t, 4, %s; mov.u32 %x, %t;
FILL: setp.lt.u32 %more, %x, {words};
@!%more bra FILLED;
ld.global.b32 %r0, [%p]; st.shared.b32 [%s], %r0;
add.s64 %p, %p, {step}; add.u32 %s, %s, {step}; add.u32 %x, %x, {threads};
bra FILL;
FILLED:
ld.param.u64 %p, [a]; mul.wide.u32 %o, %t, 16; add.s64 %p, %p, %o;
ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%p];
ld.param.u64 %p, [c]; mul.wide.u32 %o, %t, {row}; add.s64 %p, %p, %o;
"""


def kernel(registers, body, *, threads=128, words=SHARED // 4):
    """Fills shared memory from `image`, %d from `c` and %r from `a`, runs `body`, and stores %d."""
    text = HEADER + PROLOGUE.format(
        bytes=SHARED, words=words, registers=registers, threads=threads, step=4 * threads, row=4 * registers
    )
    lines = [f"ld.global.b32 %d{i}, [%p+{4 * i}];" for i in range(registers)]
    lines += ["fence.proxy.async.shared::cta;\nbar.sync 0;", body]
    lines += [f"ld.param.u64 %p, [out]; mul.wide.u32 %o, %t, {4 * registers}; add.s64 %p, %p, %o;"]
    lines += [f"st.global.b32 [%p+{4 * i}], %d{i};" for i in range(registers)]
    return text + "\n".join([*lines, "ret;\n}"])


def coordinates(registers, half):
    """The row and column of each value that a warpgroup's threads hold (PTX ISA 9.7.15.5.1)."""
    thread, value = np.mgrid[0:128, 0 : registers * (2 if half else 1)]
    rows = 16 * (thread // 32) + thread % 32 // 4 + 8 * (value // 2 % 2)
    return rows, 8 * (value // 4) + 2 * (thread % 4) + value % 2


def to_registers(matrix, registers, half):
    rows, columns = coordinates(registers, half)
    return bits(matrix)[rows, columns].astype(np.uint16 if half else np.uint32).view(np.uint32).copy()


def to_matrix(values, registers, half):
    rows, columns = coordinates(registers, half)
    matrix = np.zeros((64, columns.max() + 1), np.uint32)
    matrix[rows, columns] = values.view(np.uint16 if half else np.uint32)
    return matrix


def a_registers(a):
    """A's fragment: 8×(16 bytes) quarters, lower rows before right columns."""
    packed = 4 // a.itemsize
    thread, value = np.mgrid[0:128, 0 : 4 * packed]
    quarter = value // packed
    rows = 16 * (thread // 32) + thread % 32 // 4 + 8 * (quarter % 2)
    columns = packed * (thread % 4 + 4 * (quarter // 2)) + value % packed
    return bits(a)[rows, columns].astype(np.uint16 if a.itemsize == 2 else np.uint32).view(np.uint32).copy()


class Case:
    """64×N×K operands at two places in shared memory, and what the product must be."""

    def __init__(self, n=16, kind="bf16", half=False, mode=0, a_major=False, b_major=False, seed=0):
        self.n, self.kind, self.half = n, kind, half
        k = 8 if kind == "tf32" else 16
        rng = np.random.default_rng(seed)
        parts = [operands(n, k, kind, half, rng, 2) for _ in range(4)]
        self.a = torch.cat([part[0] for part in parts])
        self.b = parts[0][1]
        self.c = torch.cat([part[2] for part in parts])
        self.registers = n * (2 if half else 4) // 8
        self.in_a = Operand(self.a, BASE, mode, a_major)
        self.in_b = Operand(self.b.T.contiguous(), BASE + B_AT, mode, b_major)

    def image(self):
        image = np.zeros(SHARED, np.uint8)
        self.in_a.place(image)
        self.in_b.place(image)
        return image

    def instruction(self, *, d="d", a="%da", scale_d="%yes", signs=(1, 1)):
        types = f"{'f16' if self.half else 'f32'}.{self.kind}.{self.kind}"
        flags = []
        if self.kind != "tf32":
            flags = [int(self.in_a.mn_major)] * (a == "%da") + [int(self.in_b.mn_major)]
        immediates = ", ".join(map(str, [*signs, *flags]))
        registers = braces(names(d, self.registers))
        return (
            f"wgmma.mma_async.sync.aligned.{shape_of(self.n, self.kind)}.{types} "
            f"{registers}, {a}, %db, {scale_d}, {immediates};"
        )

    def expected(self, c, *, signs=(1, 1), major=0):
        """C + A·B as bit patterns."""
        a, b = (x * sign for x, sign in zip((self.a, self.b), signs, strict=True))
        rows = range(0, 64, 16)
        return np.concatenate([multiply(a[r : r + 16], b, c[r : r + 16], self.kind, major) for r in rows])

    def run(self, body, *, machine=None, threads=128, image=None, undefined=(), words=SHARED // 4):
        """D's bit patterns, its undefined elements, and the result."""
        machine = machine or Machine("h100")
        c = to_registers(self.c, self.registers, self.half)
        out = np.zeros((128, self.registers), np.uint32)
        arrays = {"image": self.image() if image is None else image, "c": c, "a": a_registers(self.a)}
        if threads > 128:
            arrays = {x: np.resize(v, (256, v.shape[1])) if x != "image" else v for x, v in arrays.items()}
            out = np.zeros((256, self.registers), np.uint32)
        module = machine.load(kernel(self.registers, body, threads=threads, words=words))
        with machine.buffers(out=Output(out), **arrays) as placed:
            for name, offset, count in undefined:
                library().emulator_set_undefined(placed[name].pointer + offset, count)
            result = module.launch(
                "k",
                1,
                threads,
                *(placed[x] for x in ("out", "image", "c", "a")),
                np.uint64(self.in_a.descriptor),
                np.uint64(self.in_b.descriptor),
            )
            marks = placed["out"].undefined()[: 128 * 4 * self.registers]
        marks = marks.reshape(128, -1, 2 if self.half else 4).any(axis=2)
        marks = marks.astype(np.uint16 if self.half else np.uint32)
        return (
            to_matrix(out[:128], self.registers, self.half),
            to_matrix(marks, self.registers, self.half) != 0,
            result,
        )


# ---- values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("a_major", "b_major"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("n", [8, 64, 256])
def test_operands_in_shared_memory(mode, a_major, b_major, n):
    case = Case(n, mode=mode, a_major=a_major, b_major=b_major)
    d, _, result = case.run(ISSUE.format(mma=case.instruction()))
    result.assert_clean()
    np.testing.assert_array_equal(d, case.expected(case.c))


@pytest.mark.parametrize(("kind", "half"), [("f16", False), ("f16", True), ("bf16", False), ("tf32", False)])
@pytest.mark.parametrize("a", ["%da", braces(names("r", 4))])
@pytest.mark.parametrize(("truncating", "major"), [(False, 0), (True, 9)])
def test_types_and_operands_in_registers(kind, half, a, truncating, major):
    case = Case(24, kind, half, mode=3)
    machine = Machine("h100", truncating=truncating)
    d, _, result = case.run(ISSUE.format(mma=case.instruction(a=a)), machine=machine)
    result.assert_clean()
    np.testing.assert_array_equal(d, case.expected(case.c, major=major))


@pytest.mark.parametrize("signs", list(itertools.product([1, -1], repeat=2)))
@pytest.mark.parametrize("a", ["%da", braces(names("r", 4))])
def test_imm_scale_negates_operands(signs, a):
    case = Case()
    d, _, result = case.run(ISSUE.format(mma=case.instruction(a=a, signs=signs)))
    result.assert_clean()
    np.testing.assert_array_equal(d, case.expected(case.c, signs=signs))


@pytest.mark.parametrize(
    ("scale_d", "kept"), [("%yes", True), ("!%no", True), ("1", True), ("%no", False), ("0", False)]
)
def test_scale_d_decides_whether_d_is_an_input(scale_d, kept):
    case = Case()
    d, _, result = case.run(ISSUE.format(mma=case.instruction(scale_d=scale_d)))
    result.assert_clean()
    np.testing.assert_array_equal(d, case.expected(case.c if kept else torch.zeros_like(case.c)))


def test_operations_on_the_same_accumulator_follow_one_another():
    """No fence between them is needed, nor after a wait, as long as nothing else touches the registers."""
    case = Case()
    mma, wait = case.instruction() + "\n", COMMIT + WAIT
    d, _, result = case.run(FENCE + mma + mma + wait + mma + wait)
    result.assert_clean()
    sums = case.c
    for _ in range(3):
        sums = torch.from_numpy(case.expected(sums).view(np.float32))
    np.testing.assert_array_equal(d, bits(sums))


def test_operations_of_another_shape_need_a_fence():
    first, second = (Case(16, kind).instruction() + "\n" for kind in ("bf16", "tf32"))
    assert Case().run(FENCE + first + second + COMMIT + WAIT)[2].kinds() == {"asynchronous"}
    Case().run(FENCE + first + FENCE + second + COMMIT + WAIT)[2].assert_clean()


def test_a_wait_leaves_later_groups_in_flight():
    """D of the first group is ready while the second, on %e, is not."""
    case = Case()
    first, second = case.instruction(), case.instruction(d="e", scale_d="0")
    issued = FENCE + first + "\n" + COMMIT + second + "\n" + COMMIT
    wait = "wgmma.wait_group.sync.aligned {};\n".format
    d, _, result = case.run(issued + wait(1))
    result.assert_clean()
    np.testing.assert_array_equal(d, case.expected(case.c))
    _, undefined, result = case.run(issued + wait(2))
    assert result.kinds() == {"uninitialised"}
    assert undefined.all()
    moves = "\n".join(f"mov.b32 %d{i}, %e{i};" for i in range(case.registers))
    assert case.run(issued + wait(1) + moves)[1].all()
    d, _, result = case.run(issued + wait(0) + moves)
    result.assert_clean()
    np.testing.assert_array_equal(d, case.expected(torch.zeros_like(case.c)))


# ---- undefined data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("a_major", "b_major"), [(False, False), (True, True)])
def test_undefined_operands_make_rows_columns_and_elements_undefined(a_major, b_major):
    case = Case(64, mode=1, a_major=a_major, b_major=b_major)
    at = {
        "a": address(case.in_a.descriptor, a_major, 2, 37, 3) - BASE,
        "b": address(case.in_b.descriptor, b_major, 2, 11, 15) - BASE,
    }
    # A warpgroup's thread 32·2 + 5, register 6: row 32 + 1 + 8, column 8 + 2.
    accumulator = ("c", 4 * (69 * case.registers + 6), 4)
    marked = [("image", at["a"], 2), ("image", at["b"], 2), accumulator]
    d, undefined, result = case.run(ISSUE.format(mma=case.instruction()), undefined=marked)
    assert result.kinds() == {"uninitialised"}
    expected = np.zeros((64, 64), bool)
    expected[37, :] = expected[:, 11] = expected[41, 10] = True
    np.testing.assert_array_equal(undefined, expected)
    np.testing.assert_array_equal(d[~expected], case.expected(case.c)[~expected])


def test_without_scale_d_an_undefined_accumulator_does_not_matter():
    case = Case()
    whole = [("c", 0, 128 * 4 * case.registers)]
    assert case.run(ISSUE.format(mma=case.instruction()), undefined=whole)[1].all()
    case.run(ISSUE.format(mma=case.instruction(scale_d="0")), undefined=whole)[2].assert_clean()


# ---- in flight ----------------------------------------------------------------------------------------

IN_REGISTERS = braces(names("r", 4))
# What is wrong, A's place, the body around {mma}, and the check that must notice.
WRONG = {
    "no fence at all": ("%da", "{mma}" + COMMIT + WAIT, "asynchronous"),
    "accumulator written after the fence": (
        "%da",
        FENCE + "mov.b32 %d3, %d3;\n{mma}" + COMMIT + WAIT,
        "asynchronous",
    ),
    "accumulator written between two operations": (
        "%da",
        FENCE + "{mma}" + COMMIT + WAIT + "add.f32 %d3, %d3, %d3;\n{mma}" + COMMIT + WAIT,
        "asynchronous",
    ),
    "A written after the fence": (
        IN_REGISTERS,
        FENCE + "mov.b32 %r1, %r1;\n{mma}" + COMMIT + WAIT,
        "asynchronous",
    ),
    "A written in flight": (
        IN_REGISTERS,
        FENCE + "{mma}" + COMMIT + "mov.b32 %r1, 0;\n" + WAIT,
        "asynchronous",
    ),
    "accumulator written in flight": (
        "%da",
        FENCE + "{mma}" + COMMIT + "mov.b32 %d1, 0;\n" + WAIT,
        "asynchronous",
    ),
    "accumulator read in flight": (
        "%da",
        FENCE + "{mma}" + COMMIT + "mov.b32 %e0, %d0;\n" + WAIT + "mov.b32 %d0, %e0;\n",
        "uninitialised",
    ),
    "no wait": ("%da", FENCE + "{mma}" + COMMIT, "uninitialised"),
    "no commit": ("%da", FENCE + "{mma}" + WAIT, "uninitialised"),
    "A refilled in flight": (
        "%da",
        FENCE + "{mma}" + COMMIT + "mov.u32 %x, tile; st.shared.b32 [%x], 0;\n" + WAIT,
        "asynchronous",
    ),
    "B refilled in flight": (
        "%da",
        FENCE + "{mma}" + COMMIT + "mov.u32 %x, tile; st.shared.b32 [%x+16384], 0;\n" + WAIT,
        "asynchronous",
    ),
    "B refilled by another warp without a barrier": (
        "%da",
        "setp.eq.u32 %q, %t, 96;\n"
        + FENCE
        + "{mma}"
        + COMMIT
        + WAIT
        + "mov.u32 %x, tile; @%q st.shared.b32 [%x+16384], 0;\n{mma}"
        + COMMIT
        + WAIT,
        "proxy",
    ),
    "descriptor differs between lanes": (
        "%da",
        "cvt.u64.u32 %o, %t; and.b64 %o, %o, 1; add.s64 %db, %db, %o;\n" + FENCE + "{mma}" + COMMIT + WAIT,
        "convergence",
    ),
    "descriptor differs between warps": (
        "%da",
        "cvt.u64.u32 %o, %w; add.s64 %db, %db, %o;\n" + FENCE + "{mma}" + COMMIT + WAIT,
        "convergence",
    ),
    "scale-d differs between lanes": (
        "%da",
        "setp.lt.u32 %yes, %t, 7;\n" + FENCE + "{mma}" + COMMIT + WAIT,
        "convergence",
    ),
    "descriptor outside shared memory": (
        "%da",
        "add.s64 %db, %db, 2048;\n" + FENCE + "{mma}" + COMMIT + WAIT,
        "out of bounds",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_must_not_happen_is_noticed(what):
    a, body, check = WRONG[what]
    case = Case()
    result = case.run(body.format(mma=case.instruction(a=a) + "\n"))[2]
    assert check in result.kinds(), [str(finding) for finding in result.findings]


def test_a_missing_proxy_fence_is_noticed():
    case = Case()
    text = ISSUE.format(mma=case.instruction())
    store = "mov.u32 %x, tile; setp.eq.u32 %q, %t, 0;\n"
    store += "@%q ld.shared.b32 %e0, [%x]; @%q st.shared.b32 [%x], %e0;\n"
    result = case.run("bar.sync 0;\n" + store + "bar.sync 0;\n" + text)[2]
    assert result.kinds() == {"proxy"}
    case.run("bar.sync 0;\n" + store + "fence.proxy.async;\nbar.sync 0;\n" + text)[2].assert_clean()


def test_the_data_is_read_as_late_as_it_may_be():
    """A store between issue and wait is a finding, and its value is what the operation sees."""
    case = Case()
    refill = "\n".join(f"st.shared.b32 [%s+{512 * i}], 0;" for i in range(64))
    body = FENCE + case.instruction() + "\n" + COMMIT
    body += "bar.sync 0; mov.u32 %s, tile; mad.lo.u32 %s, %t, 4, %s;\n" + refill
    d, _, result = case.run(body + "\nbar.sync 0;\n" + WAIT)
    assert result.kinds() == {"asynchronous"}
    np.testing.assert_array_equal(d, bits(case.c))


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("warp", range(4))
def test_one_warp_may_release_the_operands_for_all_four(order, warp):
    """Whoever has waited knows that the whole warpgroup's operation is done, so a fifth warp may refill."""
    case = Case()
    produce = "\n".join(f"st.shared.b32 [%s+{128 * i}], -1;" for i in range(SHARED // 128))
    body = f"""setp.ge.u32 %q, %w, 4;
        @%q bra PRODUCER;
        {FENCE}{case.instruction()}
        {COMMIT}{WAIT}setp.ne.u32 %q, %w, {warp};
        @%q bra DONE;
        bar.arrive 1, 64;
        bra DONE;
        PRODUCER: bar.sync 1, 64;
        mov.u32 %s, tile; and.b32 %x, %t, 31; mad.lo.u32 %s, %x, 4, %s;
        {produce}
        DONE:
    """
    d, _, result = case.run(body, machine=Machine("h100", order=order), threads=160)
    result.assert_clean()
    np.testing.assert_array_equal(d, case.expected(case.c))


def test_the_warps_of_a_warpgroup_run_the_same_instruction():
    case = Case()
    wider = f"wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {braces(names('d', 8) + names('e', 8))}"
    body = f"""{FENCE}setp.eq.u32 %q, %w, 2;
        @%q bra OTHER;
        {case.instruction()}
        bra ON;
        OTHER: {wider}, %da, %db, 0, 1, 1, 0, 0;
        ON: {COMMIT}{WAIT}
    """
    result = case.run(body)[2]
    assert "convergence" in result.kinds()
    assert not result.only.completed


def test_a_warpgroup_has_four_warps():
    case = Case()
    result = case.run(ISSUE.format(mma=case.instruction()), threads=96)[2]
    assert "convergence" in result.kinds()


def test_a_wait_takes_all_four_warps():
    case = Case()
    skip = "setp.eq.u32 %q, %w, 2;\n@%q bra OUT;\n"
    result = case.run(skip + ISSUE.format(mma=case.instruction()) + "OUT:\n")[2]
    assert "deadlock" in result.kinds()
    assert not result.only.completed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("m64n16k16", "m64n12k16"),
        ("m64n16k16", "m64n16k8"),
        ("m64n16k16", "m64n16k16.sp"),
        ("f32.bf16.bf16", "f16.bf16.bf16"),
        ("f32.bf16.bf16", "f32.e4m3.e4m3"),
        ("%yes, 1, 1,", "%yes, 2, 1,"),
        ("1, 0, 0;", "1, 0;"),
        ("{%d0, ", "{"),
    ],
)
def test_what_is_not_wgmma_is_refused(old, new):
    case = Case()
    text = kernel(case.registers, ISSUE.format(mma=case.instruction()))
    assert old in text
    with pytest.raises(Unsupported, match="wgmma"):
        Machine("h100").load(text.replace(old, new)).describe("k")
