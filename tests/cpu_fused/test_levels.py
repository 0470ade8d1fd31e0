"""What the objects of the levels hold: no instruction of a level may reach a processor without it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.cpu_fused.library import LEVELS, library, objects, supported_levels

pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils are not here"),
    pytest.mark.skipif(not supported_levels()[1:], reason="not a processor with levels"),
]

ENTRY = re.compile(r"fused_lora::cpu::fused::kernels_\w+\(\)")


def disassembly(name: str) -> str:
    command = ["objdump", "-d", "--no-show-raw-insn", str(objects()[name])]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def defined(name: str) -> list[tuple[str, str]]:
    """(kind, name) of what an object defines for other files, as nm tells it."""
    command = ["nm", "--demangle", "--defined-only", "--extern-only", str(objects()[name])]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [(kind, symbol) for _, kind, symbol in (line.split(" ", 2) for line in listed.splitlines())]


@pytest.mark.parametrize("name", ["level_plain", "lora_linear"])
def test_the_plain_objects_hold_no_wide_register(name):
    text = disassembly(name)
    assert "xmm" in text or name == "lora_linear"
    assert not re.search(r"%[yz]mm|%k[0-7]\b|\bv[a-z]+ps\b", text)


def test_each_level_uses_its_own_instructions_and_no_wider():
    avx2, avx512, bf16 = (disassembly(f"level_{level}") for level in LEVELS[1:])
    assert "%ymm" in avx2
    assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]\b", avx2)
    assert "%zmm" in avx512
    assert not re.search(r"\tv\w*bf16", avx512)
    assert "vdpbf16ps" in bf16


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_shares_nothing_but_its_entry(level):
    """An inline function that the linker may take from here would run with the level's instructions."""
    symbols = defined(f"level_{level}")
    assert len(symbols) == 1
    kind, symbol = symbols[0]
    assert kind == "T"
    assert ENTRY.fullmatch(symbol)
    entry = re.search(
        rf"<_ZN[^>]*kernels_{level}Ev>:\n(.*?)\n\n", disassembly(f"level_{level}") + "\n\n", re.S
    )
    assert entry is not None
    assert not re.search(r"%[yz]mm", entry[1])


def test_this_processor_takes_its_widest_level():
    assert LEVELS[library().level_best()] == supported_levels()[-1]
