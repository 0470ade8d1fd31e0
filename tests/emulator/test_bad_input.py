"""Whatever is passed, the answer is a plain exception that says what was wrong, and never a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.emulator import ArgumentError, Machine, Output, ParseError, Unsupported
from tests.emulator.toolchain import compile_ptx

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).parent / "kernels" / "checks.cu"
HEADER = ".version 8.8\n.target sm_80\n.address_size 64\n"


@pytest.fixture(scope="module")
def module():
    return Machine("a100").load(compile_ptx(SOURCE))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "hello",
        "\x7fELF\x02\x01",
        "a\0b",
        "__global__ void f() {}",
        HEADER + ".entry f(",
        HEADER + "}",
    ],
    ids=["empty", "blank", "prose", "binary", "zero byte", "CUDA", "cut", "stray brace"],
)
def test_what_is_not_ptx(text):
    with pytest.raises(ParseError):
        Machine("a100").load(text)


# Each variant of a real file is loaded, and its kernels are bound; a crash would end the process.
FUZZ = """
import json
import random
import sys
from pathlib import Path
from tests.emulator import Machine, ParseError, Unsupported

text = Path(sys.argv[1]).read_text()
machine = Machine("a100")
draw = random.Random(7)
counts = {"loaded": 0, "ParseError": 0, "Unsupported": 0}

def attempt(variant):
    try:
        module = machine.load(variant)
    except (ParseError, Unsupported) as error:
        counts[type(error).__name__] += 1
        return
    try:
        for kernel in module.kernels[:1]:
            module.describe(kernel)
        counts["loaded"] += 1
    except (ParseError, Unsupported) as error:
        counts[type(error).__name__] += 1
    finally:
        module.unload()

short = text[: text.index(".visible .entry", text.index(".visible .entry") + 1)]
for end in range(0, len(short), 7):
    attempt(short[:end])
for _ in range(150):
    attempt(text[: draw.randrange(len(text))])
characters = "{}[]();,.%@+-0x\\"/*\\n \\t_a$<>!|&\\x01\\x80"
for _ in range(600):
    at = draw.randrange(len(short))
    kept = draw.randrange(3)
    middle = draw.choice(characters) if kept else ""
    attempt(short[:at] + middle + short[at + draw.randrange(1, 20) * (kept != 1) :])
print(json.dumps(counts))
"""


def test_damaged_ptx_never_crashes():
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(compile_ptx(SOURCE))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    counts = json.loads(done.stdout)
    assert counts["ParseError"] > 100, counts
    assert counts["loaded"] > 10, counts


def body(instruction):
    return f"{HEADER}.visible .entry f()\n{{\n.reg .b32 %r<4>;\n.reg .pred %p;\n{instruction}\nret;\n}}\n"


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.b32 %r1, %r2;",
        "add.fancy.u32 %r1, %r2, %r3;",
        "mov.u33 %r1, %r2;",
        "tex.2d.v4.f32.s32 %r1, %r2;",
        "bar.dance 0;",
        "ld.attic.u32 %r1, [%r2];",
        "st.const.u32 [%r2], %r1;",
        "atom.global.divide.u32 %r1, [%r2], %r3;",
        "mbarrier.juggle.shared.b64 [%r1];",
        "cp.async.reduce.shared.global [%r1], [%r2], 4;",
    ],
)
def test_unknown_instructions_name_their_line(instruction):
    module = Machine("a100").load(body(instruction))
    with pytest.raises(Unsupported, match="PTX line 8: unsupported"):
        module.launch("f", 1, 32)


@pytest.mark.parametrize(
    "instruction",
    ["bra NOWHERE;", "mov.u32 %x, 1;", "mov.u32 %r1;", "ld.param.u32 %r1, [nothing];", "add.u32 %r1, %r2;"],
)
def test_wrong_operands_name_their_line(instruction):
    with pytest.raises((ParseError, Unsupported), match="PTX line 8"):
        Machine("a100").load(body(instruction)).launch("f", 1, 32)


def test_an_unknown_kernel(module):
    with pytest.raises(ArgumentError, match="nonesuch") as error:
        module.launch("nonesuch", 1, 1)
    assert "read_at" in str(error.value)
    assert "write_at" in str(error.value)


OUT = np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "takes 2 arguments, not 0"),
        ((OUT, 0, 0), "takes 2 arguments, not 3"),
        ((OUT, np.int32(0)), "argument 1: 4 bytes for a parameter of 8"),
        ((OUT, 2**64), "argument 1: 18446744073709551616 does not fit in 8 bytes"),
        ((OUT, -(2**63) - 1), "does not fit in 8 bytes"),
        ((np.float32(1), 0), "argument 0: 4 bytes for a parameter of 8"),
        ((b"123", 0), "argument 0: 3 bytes for a parameter of 8"),
        ((OUT, OUT[0]), "argument 1: 4 bytes for a parameter of 8"),
        ((np.zeros(2, object), 0), "an array of Python objects, dtype object"),
        ((object(), 0), "argument 0: a object cannot be passed to a kernel"),
        ((None, 0), "argument 0: a NoneType cannot be passed to a kernel"),
        (("text", 0), "argument 0: 16 bytes for a parameter of 8"),
        (([1.0, 2.0], 0), "argument 0"),
        ((Output(3), 0), "neither a numpy array nor a torch tensor: int"),
    ],
    ids=str,
)
def test_wrong_arguments(module, arguments, message):
    with pytest.raises(ArgumentError) as error:
        module.launch("write_at", 1, 1, *arguments)
    assert message in str(error.value)


def test_a_float_for_a_narrow_parameter():
    text = f"{HEADER}.visible .entry f(.param .u8 small)\n{{\nret;\n}}\n"
    with pytest.raises(ArgumentError, match="argument 0: a float for a parameter of 1 bytes"):
        Machine("a100").load(text).launch("f", 1, 1, 1.5)


@pytest.mark.parametrize("shape", [0, -1, (), (1, 0), (1, 1, 1, 1), (2, -2)], ids=str)
@pytest.mark.parametrize("which", ["grid", "block"])
def test_wrong_shapes(module, which, shape):
    grid, block = (shape, 1) if which == "grid" else (1, shape)
    with pytest.raises(ArgumentError, match=f"{which} is one to three positive numbers"):
        module.launch("write_at", grid, block, OUT, 0)


@pytest.mark.parametrize(
    ("grid", "block", "shared"),
    [
        (1, 1025, 0),
        (1, (32, 32, 2), 0),
        (1, (1, 1, 65), 0),
        ((1, 65536), 1, 0),
        (2**31, 1, 0),
        (1, 1, 1 << 20),
    ],
    ids=str,
)
def test_beyond_the_device(module, grid, block, shared):
    with pytest.raises(ArgumentError):
        module.launch("write_at", grid, block, OUT, 0, shared=shared)


class ElsewhereTensor:
    """What a tensor on a GPU shows of itself."""

    class device:
        type = "cuda"

        def __str__(self):
            return "cuda:0"

    device = device()  # type: ignore[misc,assignment]

    def data_ptr(self):
        raise AssertionError("its memory cannot be reached")


def test_a_tensor_on_a_gpu(module):
    with pytest.raises(ArgumentError, match="a tensor on cuda:0: only CPU tensors can be passed"):
        module.launch("write_at", 1, 1, ElsewhereTensor(), 0)


@pytest.mark.parametrize("order", ["", "backwards", "Forward", None])
def test_unknown_orders(order):
    with pytest.raises(ArgumentError, match="order is one of forward, reverse, random, not"):
        Machine("a100", order=order)


def test_an_unknown_device():
    with pytest.raises((ValueError, ArgumentError), match="voodoo"):
        Machine("voodoo")


def test_an_error_leaves_the_machine_usable(module):
    with pytest.raises(ArgumentError):
        module.launch("write_at", 1, 2000, OUT, 0)
    out = np.zeros(4, np.float32)
    module.launch("write_at", 1, 4, out, 0).assert_clean()
    assert (out == 1).all()
