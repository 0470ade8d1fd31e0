"""What the compiler makes of lora_gemm, beside CUTLASS's GEMM of the same tile compiled in the same run.

Instructions are those of the main loop, of one warp in one iteration; "others" are neither matrix
instructions nor loads of shared memory nor asynchronous copies. Under a device stands how many blocks one of
its multiprocessors holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.tables import markdown
from benchmarks.traffic import short_name
from tests.emulator.devices import DEVICES, Device
from tests.emulator.oracles.cutlass import DIRECTORY as ORACLES
from tests.emulator.static_report import KernelReport, static_report
from tests.emulator.toolchain import cutlass_include

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
THREADS = 128
SHARED_BYTES = 3 * 2 * 128 * 64  # three stages of x and W, 128 rows of 64 bytes each
CUTLASS_LARGE = "GemmShapeILi128ELi128ELi32EE"  # as the name is mangled
HEADERS = (
    "kernel",
    "arch",
    "registers",
    "spills",
    "HMMA",
    "LDSM",
    "LDGSTS",
    "others per HMMA",
    "branches",
    *(device.name for device in DEVICES.values()),
)


def main_loop_report(architectures: Sequence[str] = ARCHITECTURES) -> str:
    """The large bf16 tile in both layouts of W, and CUTLASS's, for every architecture."""
    rows = []
    for arch in architectures:
        rows += [_row(name, report) for name, report in (*_ours(arch), ("CUTLASS x Wᵀ", _cutlass(arch)))]
    return "\n".join(
        [
            "# Static facts of lora_gemm, bf16, 128×128×32, 3 stages",
            (__doc__ or "").partition("\n\n")[2].strip(),
            "",
            markdown(HEADERS, rows),
        ]
    )


def resources_report(sources: Iterable[Path], arch: str) -> str:
    """Registers, spills and static shared memory of every kernel of some files."""
    rows = []
    for source in sources:
        for report in static_report(source, arch=arch, include=[CSRC]):
            used = report.resources
            spills = f"{used.spill_stores}+{used.spill_loads}"
            name = f"{source.stem}: {short_name(report.name)}"
            rows.append(
                [name, str(report.threads or "?"), str(used.registers), spills, str(used.static_shared)]
            )
    counted: dict[tuple[str, ...], int] = {}
    for row in rows:
        counted[tuple(row)] = counted.get(tuple(row), 0) + 1
    headers = ("kernel", "threads", "registers", "spill bytes", "static shared", "instances")
    return f"# Every kernel, {arch}\n\n" + markdown(
        headers, [[*row, str(count)] for row, count in counted.items()]
    )


def all_sources() -> list[Path]:
    return sorted((CSRC / "kernels").rglob("*.cu"))


def _ours(arch: str) -> list[tuple[str, KernelReport]]:
    source = CSRC / "kernels" / "lora_gemm" / "lora_gemm_bf16_sm80.cu"
    reports = static_report(source, arch=arch, include=[CSRC])
    large = [report for report in reports if "kLarge" in report.name]
    # The template's bool: whether W's reduction is contiguous.
    names = {True: "lora_gemm y (W N×K)", False: "lora_gemm dx (W N×K)"}
    return sorted((names["Lb1E" in report.name], report) for report in large)[::-1]


def _cutlass(arch: str) -> KernelReport:
    reports = static_report(
        ORACLES / "cutlass_sm80.cu",
        arch=arch,
        include=[cutlass_include()],
        defines=["NDEBUG"],
        nvcc_options=["--expt-relaxed-constexpr"],
    )
    (large,) = (report for report in reports if CUTLASS_LARGE in report.name)
    return large


def _row(name: str, report: KernelReport) -> list[str]:
    used, loop = report.resources, report.main_loop
    assert loop is not None, name
    return [
        name,
        report.arch,
        str(used.registers),
        f"{used.spill_stores}+{used.spill_loads}",
        str(loop.matrix),
        str(loop.shared_loads),
        str(loop.async_copies),
        f"{loop.others_per_matrix:.2f}",
        str(loop.branches),
        *(_blocks(report, device) for device in DEVICES.values()),
    ]


def _blocks(report: KernelReport, device: Device) -> str:
    """Blocks of one multiprocessor; nothing where a device takes other machine code than this."""
    major, minor = divmod(int(report.arch.removeprefix("sm_")), 10)
    if device.compute_capability != (major, minor):
        return ""
    launched = replace(report, threads=THREADS, dynamic_shared=SHARED_BYTES)
    return str(launched.occupancy(device).blocks)
