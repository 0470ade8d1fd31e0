"""The kernels compile for GPUs newer than what they are written for, without spilled registers.

Each file for one architecture, so that a family's files, one for a dtype, are spread over all of them:
compiling every file for every architecture takes minutes. lora_gemm's have tests of their own.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.emulator.static_report import static_report
from tests.emulator.toolchain import ToolkitMissing, find_toolkit

CSRC = Path(__file__).parent.parent.parent / "csrc"
ARCHITECTURES = ("sm_89", "sm_90", "sm_100", "sm_120")
SOURCES = [source for source in sorted((CSRC / "kernels").rglob("*.cu")) if source.parent.name != "lora_gemm"]
PAIRS = [(source, ARCHITECTURES[index % len(ARCHITECTURES)]) for index, source in enumerate(SOURCES)]


@pytest.fixture(scope="module")
def reports():
    try:
        find_toolkit()
    except ToolkitMissing as missing:
        pytest.skip(str(missing))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = {
            source: pool.submit(static_report, source, arch=arch, include=[CSRC]) for source, arch in PAIRS
        }
        return {source: future.exception() or future.result() for source, future in futures.items()}


@pytest.mark.parametrize(("source", "arch"), PAIRS, ids=lambda value: getattr(value, "stem", value))
def test_it_compiles_and_does_not_spill(reports, source, arch):
    if isinstance(reports[source], Exception):
        raise reports[source]
    assert reports[source]
    for report in reports[source]:
        used = report.resources
        assert report.arch == arch
        assert (used.spill_stores, used.spill_loads) == (0, 0), report.demangled
