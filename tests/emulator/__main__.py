"""Look into a kernel: what it is made of, what the compiler made of it, and what a run of it does.

    python -m tests.emulator kernel.cu --arch sm_80
    python -m tests.emulator kernel.cu --run scale --grid 4 --block 128 \\
        --args 'f32[512]' 'out:f32[512]' 2.0 512

An argument is a number, `TYPE[SHAPE]` for an array of random numbers, `out:TYPE[SHAPE]` for one that the
kernel writes, or `zeros:TYPE[SHAPE]`; TYPE is f16, bf16, f32, f64, or i8 to i64, SHAPE is like 64x32.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.emulator.devices import DEVICES
from tests.emulator.machine import ArgumentError, EmulatorError, Launch, Machine, Module, Output
from tests.emulator.static_report import format_report, static_report
from tests.emulator.toolchain import CompileError, ToolkitMissing, compile_ptx

TYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
}
_ARRAY = re.compile(r"(?:(out|zeros):)?(\w+)\[(\d+(?:x\d+)*)\]")


def parse_argument(text: str) -> Any:
    """A kernel argument as the command line spells it."""
    array = _ARRAY.fullmatch(text)
    if array is None:
        try:
            return float(text) if re.search(r"[.e]", text) else int(text, 0)
        except ValueError:
            raise ArgumentError(f"neither a number nor TYPE[SHAPE]: {text!r}") from None
    kind, name, sizes = array.groups()
    if name not in TYPES:
        raise ArgumentError(f"a type is one of {', '.join(TYPES)}, not {name!r}")
    shape, dtype = [int(n) for n in sizes.split("x")], TYPES[name]
    if kind == "out":
        return Output(torch.empty(shape, dtype=dtype))
    if kind == "zeros":
        return torch.zeros(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def three(text: str) -> tuple[int, ...]:
    """A grid or a block: "4", or "4x2"."""
    return tuple(int(n) for n in text.split("x"))


def print_kernels(module: Module) -> None:
    for name in module.kernels:
        print(f"kernel {name}")
        try:
            facts = module.describe(name)
        except EmulatorError as error:
            print(f"  cannot run: {error}")
            continue
        parameters = ", ".join(f"{p['bytes']} bytes" for p in facts["parameters"])
        shared = facts["static_shared_bytes"]
        print(f"  parameters: {parameters or 'none'}; static shared memory: {shared} bytes")
        roots = Counter(opcode.split(".")[0] for opcode in facts["opcodes"])
        print(f"  {len(facts['opcodes'])} opcodes of {', '.join(sorted(roots))}")


def print_run(launch: Launch) -> None:
    print(f"ran {launch.kernel}, grid {launch.grid}, block {launch.block}: {len(launch.findings)} findings")
    for finding in launch.findings:
        print(f"  {finding}")
    print("  instructions of warps:")
    for opcode, executed in sorted(launch.instructions.items(), key=lambda item: -item[1])[:20]:
        print(f"    {executed:>10}  {opcode}")
    sectors, ideal = launch.total("sectors"), launch.total("ideal_sectors")
    waves, ideal_waves = launch.total("wavefronts"), launch.total("ideal_wavefronts")
    print(f"  global sectors {sectors} (ideal {ideal}), shared wavefronts {waves} (ideal {ideal_waves})")
    for buffer in launch.buffers.values():
        print(
            f"  {buffer.name}: read {buffer.bytes_read} bytes ({buffer.unique_read} of them once), "
            f"written {buffer.bytes_written} ({buffer.unique_written})"
        )


def parse_command_line(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.emulator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="a .cu or a .ptx file")
    parser.add_argument("--arch", default="sm_80", help="what a .cu is compiled for")
    parser.add_argument("-I", "--include", action="append", default=[], metavar="DIRECTORY")
    parser.add_argument("-D", "--define", action="append", default=[], metavar="NAME[=VALUE]")
    parser.add_argument("--device", default="a100", choices=sorted(DEVICES))
    parser.add_argument("--order", default="forward", choices=("forward", "reverse", "random"))
    parser.add_argument("--run", metavar="KERNEL")
    parser.add_argument("--grid", type=three, default=(1,), metavar="XxYxZ")
    parser.add_argument("--block", type=three, metavar="XxYxZ", help="threads, of the report's occupancy too")
    parser.add_argument("--shared", type=int, default=0, metavar="BYTES", help="dynamic shared memory")
    parser.add_argument("--args", nargs="*", default=[], metavar="ARGUMENT")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_command_line(arguments)
    try:
        include = [Path(directory) for directory in options.include]
        ptx = options.file
        if ptx.suffix != ".ptx":
            ptx = compile_ptx(ptx, arch=options.arch, include=include, defines=options.define)
        module = Machine(options.device, order=options.order).load(ptx)
        print_kernels(module)
        print()
        reports = static_report(
            options.file,
            arch=options.arch,
            threads=None if options.block is None else math.prod(options.block),
            dynamic_shared=options.shared,
            include=include,
            defines=options.define,
        )
        print(format_report(reports))
        if options.run is None:
            return 0
        given = [parse_argument(text) for text in options.args]
        result = module.launch(options.run, options.grid, options.block or 32, *given, shared=options.shared)
        print()
        print_run(result.only)
        return 1 if result.findings else 0
    except (EmulatorError, CompileError, ToolkitMissing, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
