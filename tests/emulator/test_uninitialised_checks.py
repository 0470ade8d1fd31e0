"""Undefined data are found where they matter: stored to global memory, as an address, deciding a branch."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator import Machine, Output

HEADER = ".version 8.8\n.target sm_80\n.address_size 64\n"
REGISTERS = """
.reg .b64 %in, %out, %at, %w<8>;
.reg .b32 %t, %r<16>;
.reg .b16 %h<8>;
.reg .pred %p, %q;
"""
PROLOGUE = """
ld.param.u64 %in, [in];
ld.param.u64 %out, [out];
mov.u32 %t, %tid.x;
mul.wide.u32 %at, %t, 4;
add.s64 %in, %in, %at;
add.s64 %out, %out, %at;
"""
STORE = "st.global.u32 [%out], %r1;"


def run(body, *, threads=32, declarations=""):
    """Runs the body with %in and %out at the thread's words of the buffers, in[t] = t."""
    entry = f".visible .entry test(.param .u64 in, .param .u64 out)\n{{\n{REGISTERS}{declarations}"
    text = f"{HEADER}{entry}{PROLOGUE}{body}\nret;\n}}\n"
    out = np.zeros(threads, np.uint32)
    data = np.arange(threads, dtype=np.uint32)
    result = Machine("a100").load(text).launch("test", 1, threads, data, Output(out), names=["in", "out"])
    assert all(f.check == "uninitialised" for f in result.findings), result.findings
    return result, out, text


def assert_found(body, opcode, use, **options):
    result, _, text = run(body, **options)
    found = [f for f in result.findings if f.ptx_text.startswith(opcode) and use in f.message]
    assert found, result.findings
    assert opcode in text.splitlines()[found[0].ptx_line - 1]
    return found[0]


def test_a_register_that_was_never_written():
    finding = assert_found(STORE, "st.global", "stores an undefined value to `out`")
    assert (finding.buffer, finding.offset, finding.lane, finding.kernel) == ("out", 0, 0, "test")


def test_an_accumulator_that_happens_to_be_zero():
    # Registers are zero here: the sum is right, and nothing but the check can tell.
    body = "ld.global.u32 %r2, [%in];\nadd.u32 %r1, %r1, %r2;\n" + STORE
    result, out, _ = run(body)
    assert (out == np.arange(32)).all()
    assert result.kinds() == {"uninitialised"}


CARRIERS = {
    "integer arithmetic": "mad.lo.u32 %r1, %r9, 3, 5;",
    "floating-point arithmetic": "fma.rn.f32 %r1, %r9, %r9, 0f3F800000;",
    "a conversion": "cvt.rn.f32.s32 %r1, %r9;",
    "a selection": "setp.eq.u32 %p, %t, 0;\nselp.b32 %r1, %r9, %r9, %p;",
    "an undefined predicate": "setp.eq.u32 %p, %r9, 0;\nselp.b32 %r1, 1, 2, %p;",
    "packing": "mov.b32 {%h1, %h2}, %r9;\nmov.b32 %r1, {%h2, %h1};",
    "a permutation": "prmt.b32 %r1, %r9, %t, 0x5410;",
    "a shuffle": "mov.u32 %r2, %t;\nsetp.eq.u32 %p, %t, 3;\n@%p mov.u32 %r2, %r9;\n"
    "shfl.sync.idx.b32 %r1, %r2, 3, 31, -1;",
    "a vote": "setp.eq.u32 %p, %r9, 0;\nvote.sync.ballot.b32 %r1, %p, -1;",
    "shared memory": "mov.u32 %r2, tile;\nshl.b32 %r3, %t, 2;\nadd.u32 %r2, %r2, %r3;\n"
    "st.shared.u32 [%r2], %r9;\nld.shared.u32 %r1, [%r2];",
    "local memory": "mov.u64 %w1, stack;\nst.local.u32 [%w1], %r9;\nld.local.u32 %r1, [%w1];",
}
MEMORY = ".shared .align 16 .b8 tile[256];\n.local .align 4 .b8 stack[16];\n"


@pytest.mark.parametrize("carrier", CARRIERS.values(), ids=CARRIERS)
def test_carried_through(carrier):
    assert_found(f"{carrier}\n{STORE}", "st.global", "stores an undefined value", declarations=MEMORY)
    # The same code on a value that is defined is clean.
    result, _, _ = run(f"ld.global.u32 %r9, [%in];\n{carrier}\n{STORE}", declarations=MEMORY)
    result.assert_clean()


def multiply(initialise):
    return f"""
{initialise}
mov.u32 %r5, 0;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%r1, %r2, %r3, %r4}}, {{%r5, %r5, %r5, %r5}},
    {{%r5, %r5}}, {{%r6, %r6, %r6, %r6}};
{STORE}"""


def test_carried_through_a_matrix_multiplication():
    assert_found(multiply(""), "st.global", "stores an undefined value")
    run(multiply("mov.u32 %r6, 0;"))[0].assert_clean()


def test_shared_memory_that_was_never_written():
    body = "mov.u32 %r2, tile;\nld.shared.u32 %r1, [%r2];\n"
    assert_found(body + STORE, "st.global", "stores an undefined value", declarations=MEMORY)


def test_a_local_array_that_was_never_written():
    body = "mov.u64 %w1, stack;\nld.local.u32 %r1, [%w1+4];\n"
    assert_found(body + STORE, "st.global", "stores an undefined value", declarations=MEMORY)


def test_an_output_that_is_read_before_it_is_written():
    assert_found(f"ld.global.u32 %r1, [%out];\n{STORE}", "st.global", "stores an undefined value")
    run(f"st.global.u32 [%out], %t;\nld.global.u32 %r1, [%out];\n{STORE}")[0].assert_clean()


@pytest.mark.parametrize(("space", "load"), [("shared", "tile"), ("local", "stack")])
def test_as_an_address(space, load):
    body = f"mov.u32 %r2, {load};\nand.b32 %r9, %r9, 4;\nadd.u32 %r2, %r2, %r9;\nld.{space}.u32 %r1, [%r2];"
    if space == "local":
        body = body.replace("mov.u32 %r2, stack;", "mov.u64 %w1, stack;\ncvt.u32.u64 %r2, %w1;")
        body = body.replace("[%r2]", "[%w1]").replace("ld.local", "cvt.u64.u32 %w1, %r2;\nld.local")
    assert_found(body, f"ld.{space}", "is used as an address", declarations=MEMORY)


def test_as_a_global_address():
    body = "and.b32 %r9, %r9, 4;\ncvt.u64.u32 %w1, %r9;\nadd.s64 %in, %in, %w1;\nld.global.u32 %r1, [%in];"
    assert_found(body, "ld.global", "is used as an address")


def test_at_a_branch():
    body = "setp.eq.u32 %p, %r9, 7;\n@%p bra END;\nst.global.u32 [%out], %t;\nEND:"
    assert_found(body, "@%p bra", "decides whether the instruction runs")


def test_in_an_atomic():
    assert_found("red.global.add.u32 [%in], %r9;", "red.global", "stores an undefined value to `in`")


def test_in_the_lanes_that_it_concerns():
    body = f"setp.lt.u32 %p, %t, 5;\n@%p mov.u32 %r1, 1;\n{STORE}"
    result, _, _ = run(body)
    (finding,) = result.findings
    assert (finding.lane, finding.thread, finding.offset) == (5, (5, 0, 0), 20)
    assert finding.count == 27 * 4  # every byte of the other lanes' words


HARMLESS = {
    "copied and never used": "mov.u32 %r2, %r9;\nadd.u32 %r3, %r2, 1;\nmov.u32 %r1, %t;\n" + STORE,
    "kept in shared memory": "mov.u32 %r2, tile;\nshl.b32 %r3, %t, 2;\nadd.u32 %r2, %r2, %r3;\n"
    "st.shared.u32 [%r2], %r9;\nmov.u32 %r1, %t;\n" + STORE,
    "masked by and with 0": "and.b32 %r1, %r9, 0;\n" + STORE,
    "masked to its defined half": "ld.global.u16 %h1, [%in];\nmov.b32 %r2, {%h1, %h5};\n"
    "and.b32 %r1, %r2, 65535;\n" + STORE,
    "not selected": "ld.global.u32 %r2, [%in];\nsetp.eq.u32 %p, 0, 0;\nselp.b32 %r1, %r2, %r9, %p;\n" + STORE,
    "overwritten": "mov.u32 %r1, %r9;\nmov.u32 %r1, 4;\n" + STORE,
    "in lanes that are predicated off": "setp.lt.u32 %p, %t, 5;\n@%p mov.u32 %r1, 1;\n@%p " + STORE,
    "padding that is not stored": "mov.u64 %w1, stack;\nst.local.u8 [%w1], 1;\nst.local.u32 [%w1+4], %t;\n"
    "ld.local.v2.u32 {%r2, %r3}, [%w1];\nand.b32 %r2, %r2, 255;\nadd.u32 %r1, %r2, %r3;\n" + STORE,
}


@pytest.mark.parametrize("body", HARMLESS.values(), ids=HARMLESS)
def test_not_accused(body):
    declarations = MEMORY.replace(".align 4 .b8 stack", ".align 8 .b8 stack")
    run(body, declarations=declarations)[0].assert_clean()


def test_what_was_not_written_stays_known_as_undefined():
    machine = Machine("a100")
    text = (
        f"{HEADER}.visible .entry test(.param .u64 in, .param .u64 out)\n{{\n{REGISTERS}{PROLOGUE}"
        "setp.lt.u32 %p, %t, 5;\n@%p st.global.u32 [%out], %t;\nret;\n}\n"
    )
    buffer = machine.place(Output(np.zeros(8, np.uint32)), "out")
    machine.load(text).launch("test", 1, 8, np.zeros(8, np.uint32), buffer).assert_clean()
    assert (buffer.undefined().reshape(8, 4).all(1) == (np.arange(8) >= 5)).all()
    buffer.free()
