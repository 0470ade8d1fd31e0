"""One LoRA linear on a GPU: fused and composed beside PEFT and the frozen linear.

python -m benchmarks.gpu writes a table, CSV and a plot to out/gpu. The shapes are those of the LoRAFusion
paper, forward and backward, and those of decoding, forward. Sides run interleaved with a cold cache; ratios
are medians of the rounds' own.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import peft
import torch

import fused_lora
from benchmarks.gpu import output, results, sides
from benchmarks.gpu.timing import CudaTimer, Timer, interleaved
from benchmarks.shapes import DECODE, TRAINING, Shape
from fused_lora import paths
from fused_lora.binary import BINARY

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu needs a CUDA GPU, and torch.cuda.is_available() is False "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}). Nothing was measured.",
            file=sys.stderr,
        )
        return 1
    problem = paths.obstacle("fused", "cuda")
    if problem is not None:
        print(f"benchmarks.gpu has no fused kernels to measure: {problem}", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    timer = CudaTimer(device, graph=asked.mode == "graph")
    rows, notes = measure(asked, device, timer, report=lambda line: print(line, flush=True))
    if not rows:
        print("benchmarks.gpu: no side could be measured:", *notes, sep="\n  ", file=sys.stderr)
        return 1
    run = describe(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    written = output.write(run, rows, notes, asked.out)
    print(output.table(run, rows, notes))
    print("written:", *written)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="the directory to write to")
    parser.add_argument("--rounds", type=int, default=50, help="times that each side runs (default: 50)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument(
        "--mode", choices=["graph", "eager"], default="graph", help="CUDA graphs, or as called"
    )
    parser.add_argument("--only", choices=["training", "decode"], help="one set of shapes")
    parser.add_argument("--quick", action="store_true", help="two shapes of each set, ten rounds")
    asked = parser.parse_args(arguments)
    if asked.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {asked.rounds}")
    if any(not 0 <= p < 1 for p in asked.dropout):
        parser.error(f"--dropout must be at least 0 and below 1, got {asked.dropout}")
    if asked.quick:
        asked.rounds = min(asked.rounds, 10)
    return asked


def measure(
    asked: argparse.Namespace,
    device: torch.device,
    timer: Timer,
    *,
    report: Callable[[str], None],
    training: Sequence[Shape] = TRAINING,
    decode: Sequence[Shape] = DECODE,
) -> tuple[list[results.Row], list[str]]:
    """Every row, and a note for every side of a shape that could not be measured."""
    rows: list[results.Row] = []
    notes: list[str] = []
    for half, shape, dropout in _plan(asked, training, decode):
        built = sides.build(shape, getattr(torch, asked.dtype), dropout, device, backward=half != "forward")
        times, failed = interleaved(built.steps, asked.rounds, timer)
        made = results.rows(half, shape, asked.dtype, dropout, asked.mode, times)
        rows += made
        notes += [f"{side}: {reason}" for side, reason in {**built.missing, **failed}.items()]
        told = ", ".join(f"{row.side} {row.microseconds:.1f} µs" for row in made)
        report(f"{half}, {shape.name} {shape}, dropout {dropout:g}: {told or 'nothing could be measured'}")
    return rows, notes


def _plan(
    asked: argparse.Namespace, training: Sequence[Shape], decode: Sequence[Shape]
) -> Iterable[tuple[str, Shape, float]]:
    if asked.quick:
        training, decode = training[:: max(len(training) - 1, 1)], decode[:: max(len(decode) - 1, 1)]
    if asked.only != "decode":
        for dropout in asked.dropout:
            yield from (("forward + backward", shape, dropout) for shape in training)
        yield from (("forward", shape, 0.0) for shape in training)
    if asked.only != "training":
        yield from (("forward", shape, 0.0) for shape in decode)


def describe(device: str, capability: tuple[int, int]) -> results.Run:
    return results.Run(
        device=device,
        capability=".".join(map(str, capability)),
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        peft=peft.__version__,
        fused_lora=fused_lora.__version__,
        commit=BINARY.facts.get("commit", "not built"),
        date=datetime.date.today().isoformat(),
    )


if __name__ == "__main__":
    sys.exit(main())
