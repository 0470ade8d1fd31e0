"""What ptxas makes of lora_gemm, on every architecture that it is compiled for: no spills, and its main loop
beside CUTLASS's of the same tile, compiled in the same run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.emulator import Machine
from tests.emulator.devices import DEVICES
from tests.emulator.mutations import registered_ptx
from tests.emulator.oracles.conftest import load_launchers
from tests.emulator.oracles.cutlass import GEMMS
from tests.emulator.oracles.run import Operands, run_gemm
from tests.emulator.static_report import static_report

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = CSRC / "kernels"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")


def large(reports):
    """lora_gemm's large tiles by whether W's reduction is contiguous."""
    found = {r.name: r for r in reports if "kLarge" in r.name}
    return {("Lb1E" in name): report for name, report in found.items()}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def bf16(request):
    return static_report(KERNELS / "lora_gemm" / "lora_gemm_bf16_sm80.cu", arch=request.param, include=[CSRC])


@pytest.fixture(scope="module")
def cutlass(tmp_path_factory):
    """CUTLASS's bf16 kernel of 128×128×32 and 3 stages, both operands contiguous along k."""
    gemm = GEMMS[0]
    _, result = run_gemm(Machine("a100"), load_launchers("sm_80"), gemm, Operands(gemm, 128, 128, 64))
    path = tmp_path_factory.mktemp("cutlass") / "cutlass.ptx"
    path.write_text(registered_ptx(result.only.kernel))
    return next(r for r in static_report(path, arch="sm_80") if r.name == result.only.kernel)


def test_the_main_loop_is_no_worse_than_cutlasss(bf16, cutlass):
    theirs = cutlass.main_loop
    assert (theirs.matrix, theirs.shared_loads, theirs.async_copies) == (64, 16, 8)
    assert theirs.others_per_matrix < 1.25
    for report in large(bf16).values():
        ours = report.main_loop
        assert (ours.matrix, ours.shared_loads, ours.async_copies) == (64, 16, 8)
        assert ours.others_per_matrix <= 1.25
        assert ours.branches == 1
        assert ours.global_loads == ours.shared_stores == ours.local_accesses == 0


def test_occupancy_is_no_worse_than_cutlasss(bf16, cutlass):
    # Both launch 128 threads with three stages of 16 KiB.
    shared = 3 * 2 * 128 * 64
    for device in DEVICES.values():
        theirs = occupancy_of(cutlass, device, shared)
        for report in large(bf16).values():
            assert occupancy_of(report, device, shared) >= theirs


def occupancy_of(report, device, shared):
    return replace(report, threads=128, dynamic_shared=shared).occupancy(device).blocks


def test_lora_gemm_does_not_spill(bf16):
    assert_no_spills(bf16)


@pytest.mark.parametrize("name", ["fp16", "fp16_masters", "tf32"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nor_for_other_elements(name, arch):
    assert_no_spills(
        static_report(KERNELS / "lora_gemm" / f"lora_gemm_{name}_sm80.cu", arch=arch, include=[CSRC])
    )


def assert_no_spills(reports):
    for report in reports:
        used = report.resources
        assert (used.spill_stores, used.spill_loads) == (0, 0), report.demangled
