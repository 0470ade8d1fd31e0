"""What the compiler made of a kernel: resources, the instructions of its main loop, and occupancy.

    python -m tests.emulator.static_report kernel.cu --arch sm_80 --dynamic-shared 49152

ptxas states the resources, and the main loop is found in the machine code that nvdisasm prints. Nothing is
run, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from tests.emulator.devices import DEVICES, Device
from tests.emulator.main_loop import LoopMix, main_loops
from tests.emulator.occupancy import Occupancy, occupancy
from tests.emulator.toolchain import CompileError, compile_ptx, find_toolkit


@dataclass(frozen=True)
class Resources:
    """What a kernel occupies, sizes in bytes. None: a cubin does not tell."""

    registers: int  # per thread
    stack: int  # per thread
    spill_stores: int | None  # per thread
    spill_loads: int | None  # per thread
    static_shared: int  # per block
    constant: int  # parameters included
    barriers: int | None  # per block


@dataclass(frozen=True)
class KernelReport:
    """Static facts of one kernel, and the launch that its occupancy is computed for."""

    name: str  # mangled
    demangled: str
    arch: str
    resources: Resources
    main_loop: LoopMix | None  # None: the kernel has no loop
    threads: int | None  # per block; None: stated neither by the caller nor by the PTX
    dynamic_shared: int  # bytes per block

    def occupancy(self, device: Device) -> Occupancy:
        """Occupancy of this machine code on a device. Raises ValueError where `threads` is None."""
        if self.threads is None:
            raise ValueError(f"threads must be given for {_shorten(self.demangled, 90)}")
        shared = self.resources.static_shared + self.dynamic_shared
        barriers = self.resources.barriers or 0
        return occupancy(device, self.threads, self.resources.registers, shared, barriers=barriers)


def static_report(
    source: Path | str,
    *,
    arch: str | None = None,
    threads: int | None = None,
    dynamic_shared: int = 0,
    include: Sequence[Path] = (),
    defines: Sequence[str] = (),
    nvcc_options: Sequence[str] = (),
    ptxas_options: Sequence[str] = (),
) -> list[KernelReport]:
    """Reports on every kernel of a .cu, .ptx or .cubin file, in the order of their names.

    arch: such as "sm_80"; by default what the PTX or the cubin states. threads: per block, by default the
    kernel's .reqntid or .maxntid. dynamic_shared: bytes per block. include, defines, nvcc_options: for a .cu.
    ptxas_options: such as "-maxrregcount=64".

    Raises FileNotFoundError for a source or a tool that is missing, CompileError for what nvcc or ptxas
    refuse, and ValueError for any other argument that does not fit.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"source must be a file, got {path}")
    if path.suffix not in (".cu", ".ptx", ".cubin"):
        raise ValueError(f"source must end in .cu, .ptx or .cubin, got {path}")
    if arch is not None and not re.fullmatch(r"sm_\d+[af]?", arch):
        raise ValueError(f"arch must be like 'sm_80' or 'sm_90a', got {arch!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if dynamic_shared < 0:
        raise ValueError(f"dynamic_shared must be at least 0, got {dynamic_shared}")
    if path.suffix == ".cu":
        if arch is None:
            raise ValueError(f"arch must be given to compile {path}")
        path = compile_ptx(path, arch=arch, include=include, defines=defines, options=nvcc_options)

    bounds: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if path.suffix == ".ptx":
            ptx = path.read_text()
            arch = arch or _target(ptx, path)
            bounds = _thread_bounds(ptx)
            cubin = Path(scratch, "kernels.cubin")
            options = ("-v", f"-arch={arch}", *ptxas_options)
            log = _run([find_toolkit().ptxas, *options, path, "-o", cubin], CompileError).stderr
            resources = _resources_from_ptxas(log)
        else:
            cubin = path
            usage = _run([_binary_tool("cuobjdump"), "-res-usage", cubin], ValueError).stdout
            resources = _resources_from_cuobjdump(usage)
        machine_code = _run([_binary_tool("nvdisasm"), "-c", cubin], ValueError).stdout

    if not resources:
        raise ValueError(f"source must hold a kernel, {path} has none")
    target = _target(machine_code, path)
    if arch not in (None, target):
        raise ValueError(f"arch is {arch!r}, but {path} holds code for {target}")
    loops = main_loops(machine_code)
    reports = []
    for (name, used), demangled in zip(resources.items(), _demangle(resources), strict=True):
        bound = bounds.get(name)
        if threads is not None and bound is not None and threads > bound:
            raise ValueError(f"threads is {threads}, but {_shorten(demangled, 90)} allows {bound} at most")
        reports.append(
            KernelReport(name, demangled, target, used, loops[name], threads or bound, dynamic_shared)
        )
    return sorted(reports, key=lambda report: report.demangled)


def _run(
    command: Sequence[Path | str], failure: type[CompileError | ValueError]
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise failure(f"{Path(command[0]).name} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result


def _binary_tool(name: str) -> Path:
    """nvdisasm or cuobjdump, from the package nvidia-cuda-<name> or else on the PATH."""
    nvidia = importlib.util.find_spec("nvidia")
    for directory in (nvidia and nvidia.submodule_search_locations) or ():
        for path in Path(directory).glob(f"*/bin/{name}"):
            return path
    on_path = shutil.which(name)
    if on_path is None:
        raise FileNotFoundError(f"{name} is neither installed as nvidia-cuda-{name} nor on the PATH")
    return Path(on_path)


def _demangle(names: Iterable[str]) -> list[str]:
    """Names as C++ spells them, or unchanged where no demangler is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return list(names)
    lines = "\n".join(names)
    return subprocess.run([tool], input=lines, capture_output=True, text=True, check=True).stdout.splitlines()


def _target(text: str, path: Path) -> str:
    """The architecture that PTX, or machine code as nvdisasm prints it, is for."""
    match = re.search(r"^\s*\.target\s+(sm_\w+)", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"source must name its .target, {path} does not")
    return match[1]


def _thread_bounds(ptx: str) -> dict[str, int]:
    """Threads per block by kernel, from .reqntid or .maxntid (PTX ISA, "Performance-Tuning Directives")."""
    ptx = re.sub(r"//.*|/\*[\s\S]*?\*/", "", ptx)
    bounds = {}
    for name, directives in re.findall(r"\.entry\s+([\w$%]+)\s*(?:\([^)]*\))?([^{;]*)", ptx):
        match = re.search(r"\.(?:req|max)ntid\s+(\d+(?:\s*,\s*\d+)*)", directives)
        if match is not None:
            bounds[name] = math.prod(int(extent) for extent in match[1].split(","))
    return bounds


def _resources_from_ptxas(log: str) -> dict[str, Resources]:
    """From what ptxas -v prints. The functions that a kernel calls have properties too, after its own."""
    resources = {}
    for entry in log.split("Compiling entry function '")[1:]:
        name = entry.split("'")[0]
        frame = re.search(
            rf"Function properties for {re.escape(name)}\s+"
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
            entry,
        )
        used = re.search(r"Used (\d+) registers, used (\d+) barriers(.*)", entry)
        if frame is None or used is None:
            raise ValueError(f"ptxas must print the resources of {name}, got: {entry.strip()}")
        static_shared = re.search(r"(\d+) bytes smem", used[3])
        resources[name] = Resources(
            registers=int(used[1]),
            stack=int(frame[1]),
            spill_stores=int(frame[2]),
            spill_loads=int(frame[3]),
            static_shared=int(static_shared[1]) if static_shared else 0,
            constant=sum(map(int, re.findall(r"(\d+) bytes cmem", used[3]))),
            barriers=int(used[2]),
        )
    return resources


def _resources_from_cuobjdump(usage: str) -> dict[str, Resources]:
    return {
        name: Resources(
            registers=int(registers),
            stack=int(stack),
            spill_stores=None,
            spill_loads=None,
            static_shared=int(shared),
            constant=sum(map(int, re.findall(r"CONSTANT\[\d+\]:(\d+)", rest))),
            barriers=None,
        )
        for name, registers, stack, shared, rest in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)(.*)", usage
        )
    }


_LIMITS = {"blocks": "b", "warps": "w", "registers": "r", "shared memory": "s", "barriers": "n"}


def format_report(reports: Sequence[KernelReport]) -> str:
    """Reports as text tables, with a row for each kernel."""
    resources = [[*_headers(Resources), "dynamic shared"]]
    mixes = [[*_headers(LoopMix), "others per matrix"]]
    blocks = [["threads", *(device.name for device in DEVICES.values())]]
    for report in reports:
        used = (*astuple(report.resources), report.dynamic_shared)
        resources.append(["?" if value is None else str(value) for value in used])
        mixes.append(_mix_cells(report.main_loop))
        blocks.append([str(report.threads or "?"), *(_blocks_cell(report, it) for it in DEVICES.values())])
    limits = ", ".join(f"{letter} {limit}" for limit, letter in _LIMITS.items())
    return "\n".join(
        [
            *(f"{row:>3}  {it.arch}  {_shorten(it.demangled, 90)}" for row, it in enumerate(reports, 1)),
            "",
            "resources, in bytes: stack and spills per thread, shared memory per block",
            *_table(resources),
            "",
            "main loop, in instructions",
            *_table(mixes),
            "",
            f"blocks per SM, occupancy, and what limits it: {limits}",
            *_table(blocks),
            "* does not run this machine code; compiled for it, the kernel may use other registers",
        ]
    )


def _headers(record: type[Resources | LoopMix]) -> list[str]:
    return [field.name.replace("_", " ") for field in fields(record)]


def _mix_cells(loop: LoopMix | None) -> list[str]:
    if loop is None:
        return ["-"] * (len(fields(LoopMix)) + 1)
    ratio = loop.others_per_matrix
    return [*map(str, astuple(loop)), "-" if math.isnan(ratio) else f"{ratio:.2f}"]


def _blocks_cell(report: KernelReport, device: Device) -> str:
    if report.threads is None:
        return "? "
    found = report.occupancy(device)
    limits = "".join(_LIMITS[limit] for limit in found.limited_by)
    return f"{found.blocks} {found.fraction:.0%} {limits}{' ' if _runs_on(report.arch, device) else '*'}"


def _runs_on(arch: str, device: Device) -> bool:
    """Machine code runs on its own major version from its minor one up; that of an "a" on its own alone."""
    major, minor = divmod(int(arch.strip("sm_af")), 10)
    if arch.endswith("a"):
        return device.compute_capability == (major, minor)
    return device.compute_capability[0] == major and device.compute_capability[1] >= minor


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, flush right: a header of two lines, and rows with their number in front."""
    header = [cell.rpartition(" ") for cell in rows[0]]
    lines = [
        ["", *(upper for upper, _, _ in header)],
        ["", *(lower for _, _, lower in header)],
        *([str(number), *row] for number, row in enumerate(rows[1:], 1)),
    ]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.rjust, line, widths)).rstrip() for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description="Static facts of CUDA kernels.")
    parser.add_argument("paths", nargs="+", metavar="path", help=".cu, .ptx or .cubin")
    parser.add_argument("--arch", help="such as sm_80; needed for a .cu")
    parser.add_argument("--threads", type=int, help="per block; by default the bound that a kernel states")
    parser.add_argument("--dynamic-shared", type=int, default=0, metavar="BYTES", help="per block")
    several = functools.partial(parser.add_argument, action="append", default=[])
    several("-I", dest="include", type=Path, metavar="DIRECTORY")
    several("-D", dest="defines", metavar="NAME[=VALUE]")
    several("--nvcc", dest="nvcc_options", metavar="OPTION", help="such as --nvcc=-std=c++17")
    several("--ptxas", dest="ptxas_options", metavar="OPTION", help="such as --ptxas=-maxrregcount=64")
    asked = vars(parser.parse_args())
    paths = asked.pop("paths")
    try:
        reports = [report for path in paths for report in static_report(path, **asked)]
    except (CompileError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(format_report(reports))


if __name__ == "__main__":
    main()
