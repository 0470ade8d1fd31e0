"""Every synchronisation of a kernel is taken away or weakened in turn: the checks must notice.

Both orders of the blocks are tried, as a contributor's tests would. What no order can show is listed below with the
reason why the kernel is right without it.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.emulator import EmulatorError, Machine, Output, Result
from tests.emulator.cuda_runtime import reset
from tests.emulator.mutations import mutants, registered_ptx, replaced
from tests.emulator.oracles.cutlass import GEMMS
from tests.emulator.oracles.run import Operands, run_gemm
from tests.emulator.toolchain import compile_ptx

pytest_plugins = ["tests.emulator.oracles.conftest"]

SOURCE = Path(__file__).parent / "kernels" / "tiled_gemm.cu"
ORDERS = ("forward", "reverse")
# Several times what a run without a mutation takes: a mutant that goes astray ends.
MAX_INSTRUCTIONS = 1_000_000

REDUNDANT: dict[str, dict[str, str]] = {}


@dataclasses.dataclass(frozen=True)
class Run:
    findings: tuple[str, ...]
    completed: bool
    product: torch.Tensor | None
    result: Result | None


class RecordingMachine(Machine):
    """Keeps the last result where the host code around the launch gives up."""

    last: Result | None = None

    def run(self, call):
        self.last = None
        self.last = super().run(call)
        return self.last


def observe(machine: RecordingMachine, launch: Callable[[], torch.Tensor]) -> Run:
    machine.last = None
    product = None
    try:
        product = launch()
    except (AssertionError, EmulatorError):
        pass  # a launch that failed
    finally:
        reset()
    result = machine.last
    if result is None:
        return Run((), False, None, None)
    completed = product is not None and all(launch.completed for launch in result.launches)
    return Run(tuple(map(str, result.findings)), completed, product, result)


class OwnKernel:
    """A kernel of tiled_gemm.cu: eight tiles of C in two blocks, or in three slices of k, each longer than the stages."""

    def __init__(self, kernel, _launchers):
        generator = torch.Generator().manual_seed(0)
        self.kernel = kernel
        self.m, self.n, self.k = (100, 72, 424) if kernel == "split_k_gemm" else (200, 72, 200)
        self.a, self.b = (
            torch.randn(rows, self.k, generator=generator).bfloat16() for rows in (self.m, self.n)
        )
        self.exact = self.a.double() @ self.b.double().T
        self.ptx = compile_ptx(SOURCE).read_text()

    def run(self, ptx, order):
        machine = RecordingMachine("a100", order=order, max_instructions=MAX_INSTRUCTIONS)
        c = torch.empty(self.m, self.n, dtype=torch.bfloat16 if self.kernel == "tiled_gemm_bf16" else torch.float32)

        def launch():
            arguments = [self.a, self.b, Output(c), self.m, self.n, self.k]
            grid = (2, 1)
            if self.kernel == "split_k_gemm":
                grid = (4, 3)
                tickets = torch.zeros(4, dtype=torch.int32)
                arguments += [Output(torch.empty(4 * 3 * 64 * 64)), tickets]
            module = machine.load(ptx)
            try:
                module.launch(self.kernel, grid, 128, *arguments)
            finally:
                module.unload()
            return c

        return observe(machine, launch)


class CutlassKernel:
    """A CUTLASS launcher's kernel, several times as deep in k as its stages; on sm_90 a block makes several tiles."""

    def __init__(self, name, launchers):
        self.gemm = next(gemm for gemm in GEMMS if gemm.launcher == name)
        self.launchers = launchers(self.gemm.arch)
        self.hopper = self.gemm.arch == "sm_90a"
        self.slices = 3 if self.gemm.splits_k else 1
        m, n, k = (136, 136, 1096) if self.hopper else (136, 72, 264)
        self.operands = Operands(self.gemm, m, n, k)
        self.exact = self.operands.exact
        launched = self.launch(self.machine("forward"))[1].only
        self.kernel, self.ptx = launched.kernel, registered_ptx(launched.kernel)

    def machine(self, order):
        machine = RecordingMachine("h100" if self.hopper else "a100", order=order, max_instructions=MAX_INSTRUCTIONS)
        if self.hopper:
            machine.device = dataclasses.replace(machine.device, multiprocessors=2)
        return machine

    def launch(self, machine):
        return run_gemm(machine, self.launchers, self.gemm, self.operands, slices=self.slices)

    def run(self, ptx, order):
        machine = self.machine(order)
        with replaced(machine, self.kernel, ptx):
            return observe(machine, lambda: self.launch(machine)[0])


SUBJECTS = {
    "tiled_gemm_f32": OwnKernel,
    "tiled_gemm_bf16": OwnKernel,
    "split_k_gemm": OwnKernel,
    "cutlass_sm80_bf16_tn": CutlassKernel,
    "cutlass_sm80_f16_tn_serial": CutlassKernel,
    "cutlass_sm90_bf16_tn": CutlassKernel,
    "cutlass_sm90_bf16_nt_pingpong": CutlassKernel,
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_checks_notice_missing_synchronisation(name, launchers, record_property):
    subject = SUBJECTS[name](name, launchers)
    clean = subject.run(subject.ptx, "forward")
    assert clean.completed and not clean.findings, clean.findings
    assert torch.allclose(clean.product.double(), subject.exact, rtol=2**-7, atol=1e-2 * subject.exact.abs().max())
    total, by_checks, caught = Counter(), Counter(), Counter()
    missed = {}
    begin = time.process_time()
    for mutant in mutants(subject.ptx, clean.result.only):
        ptx = mutant.apply(subject.ptx)
        runs = []
        for order in ORDERS:
            t0 = time.process_time()
            runs.append(subject.run(ptx, order))
            if time.process_time() - t0 > 0.5:
                print("SLOW", mutant.key, time.process_time() - t0)
            if runs[-1].findings:
                break
        found = any(run.findings for run in runs)
        wrong = any(not run.completed or not torch.equal(run.product, clean.product) for run in runs)
        total[mutant.kind] += 1
        by_checks[mutant.kind] += found
        caught[mutant.kind] += found or wrong
        if not found:
            missed[mutant.key] = f"{'wrong' if wrong else 'right'} line {mutant.line}: {mutant.original}"
    for kind in total:
        print(f"{name:32} {kind:28} {total[kind]:4} {by_checks[kind]:4} {caught[kind]:4}")
    print(name, total.total(), by_checks.total(), caught.total(), time.process_time() - begin)
    for key, why in missed.items():
        print("MISSED", key, "|", why)
