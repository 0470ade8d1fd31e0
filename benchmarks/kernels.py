"""What can be known of the CUDA kernels without a GPU: counted traffic, the compiler's facts, a prediction.

python -m benchmarks.kernels prints all three; --only chooses. Nothing here is a time that was measured.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from benchmarks import roofline
from benchmarks.shapes import Shape
from tests.emulator.devices import DEVICES
from tests.emulator.toolchain import CompileError, ToolkitMissing

TABLES = ("traffic", "static", "prediction")


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    tables: dict[str, Callable[[], str]] = {
        "traffic": lambda: _traffic(asked),
        "static": lambda: _static(asked),
        "prediction": lambda: roofline.report(asked.device or tuple(DEVICES)),
    }
    try:
        for name in asked.only:
            print(tables[name]() + "\n", flush=True)
    except (CompileError, FileNotFoundError, ModuleNotFoundError, ToolkitMissing) as error:
        print(f"benchmarks.kernels: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument(
        "--shape",
        type=shape,
        nargs="+",
        default=[shape("2048x512x2048"), shape("16x1024x1024")],
        help="of the traffic table: ROWSxINxOUT",
    )
    parser.add_argument("--rank", type=int, default=16, help="of the traffic table")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the traffic table")
    parser.add_argument("--arch", nargs="+", help="of the static table, such as sm_80; by default all five")
    parser.add_argument(
        "--all", action="store_true", help="the static table: every kernel's resources as well"
    )
    parser.add_argument(
        "--device", nargs="+", choices=list(DEVICES), help="of the prediction; by default all"
    )
    return parser.parse_args(arguments)


def shape(text: str) -> Shape:
    sizes = re.fullmatch(r"(\d+)[x×](\d+)[x×](\d+)", text)
    if sizes is None or "0" in sizes.groups():
        raise argparse.ArgumentTypeError(f"a shape is like 2048x512x2048, got {text!r}")
    return Shape(text, *map(int, sizes.groups()))


def _traffic(asked: argparse.Namespace) -> str:
    from benchmarks import traffic

    shapes = (Shape(s.name, s.rows, s.in_features, s.out_features, asked.rank) for s in asked.shape)
    return "\n\n".join(traffic.report(it, dropout=asked.dropout) for it in shapes)


def _static(asked: argparse.Namespace) -> str:
    from benchmarks import static_facts

    architectures = asked.arch or static_facts.ARCHITECTURES
    parts = [static_facts.main_loop_report(architectures)]
    if asked.all:
        sources = static_facts.all_sources()
        parts += [static_facts.resources_report(sources, arch) for arch in architectures]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
