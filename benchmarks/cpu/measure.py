"""One pytest-benchmark benchmark for each case, run by __main__.py; alone it has nothing to collect.

A benchmark's round is a round of turns: every side of the case, each timed on its own. So what
pytest-benchmark times is the round, and the sides' own seconds stand in its extra_info, in the same JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.cpu import batches, models, sides
from benchmarks.cpu.cases import BOTH, STEP, Case
from benchmarks.cpu.memory import peak_bytes
from benchmarks.cpu.peak import peak
from benchmarks.cpu.results import Measured, Result
from benchmarks.cpu.turns import Turns, rounds_within

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from benchmarks.cpu.plan import Plan
    from benchmarks.cpu.session import Session


def test_case(case: Case, benchmark: BenchmarkFixture, session: Session) -> None:
    session.took(measure(case, session.plan, benchmark))


def measure(case: Case, plan: Plan, benchmark: BenchmarkFixture) -> Result:
    torch.set_num_threads(case.threads)
    wanted = plan.sides_of(case)
    flops: dict[str, float] = {}
    if case.whole_model:
        built = models.build(case, wanted)
    else:
        flops = dict.fromkeys(wanted, case.flops)
        flops[sides.FROZEN] = case.frozen_flops
        gemm = None
        if sides.PEAK in wanted:
            gemm, flops[sides.PEAK] = peak(case.dtype, case.threads)
        built = sides.build(case, wanted, gemm) if case.of_one_layer else batches.build(case, wanted)
    peaks = peak_bytes(built.running) if case.half in (BOTH, STEP) else {}
    turns = Turns(built.running)
    rounds = rounds_within(plan.budget, turns.calibrate(), plan.rounds)
    benchmark.group = case.half
    benchmark.pedantic(turns.round, rounds=rounds)  # type: ignore[no-untyped-call]
    measured = {}
    for name in wanted:
        if name in built.running:
            note = built.running[name].note
            measured[name] = Measured(
                tuple(turns.seconds[name]), flops.get(name), built.saved.get(name), peaks.get(name), note
            )
        else:
            measured[name] = Measured(note=built.absent[name])
    benchmark.extra_info.update({name: vars(it) for name, it in measured.items()})
    torch._dynamo.reset()  # compiled code keeps the case's weights
    return Result(case, measured)
