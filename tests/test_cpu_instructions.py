"""What the built extension holds: no instruction of a level may reach a processor without it."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fused_lora.binary import BINARY

CSRC = Path(__file__).resolve().parents[1] / "csrc"
LEVELS = sorted(path.name for path in (CSRC / "cpu" / "fused").glob("level_*.cpp"))

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels are x86's")
pytestmark = pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils are not here")

WIDE = re.compile(r"%[yz]mm\d|%[xy]mm(1[6-9]|2\d|3[01])|\{%k[1-7]\}")


def functions() -> Iterator[tuple[str, bool]]:
    """(name, whether an instruction is wide) for each function of the extension."""
    assert BINARY.module is not None
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(BINARY.module.__file__)]
    name, wide = "", False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            begins = re.fullmatch(r"[0-9a-f]+ <(.*)>:\n", line)
            if begins:
                yield name, wide
                name, wide = begins[1], False
            elif not wide and WIDE.search(line):
                wide = True
    yield name, wide


@x86
def test_only_the_levels_own_functions_use_wide_registers():
    found = dict(functions())
    wide = {name for name, is_wide in found.items() if is_wide}
    assert wide, "the extension has no levels"
    of_levels = re.compile(r"fused_lora::cpu::fused::\(anonymous namespace\)::")
    strangers = {name for name in wide if not of_levels.search(name)}
    assert not strangers
    entries = {name for name in found if re.search(r"fused::kernels_\w+\(\)$", name)}
    assert len(entries) == len(LEVELS)
    assert not entries & wide


@pytest.mark.parametrize("name", LEVELS)
def test_a_level_includes_no_header_with_functions_to_share(name):
    """Inline functions of torch or of the standard library, compiled here, would carry the level's
    instructions to whoever the linker gives them."""
    command = ["g++", "-std=c++20", f"-I{CSRC}", "-M", str(CSRC / "cpu" / "fused" / name)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    headers = [Path(path) for path in listed if path.endswith(".h") or "/c++/" in path]
    assert headers
    assert not [path for path in headers if {"ATen", "c10", "torch"} & set(path.parts)]
    assert not [path for path in headers if path.name in ("algorithm", "vector", "string", "functional")]
