"""Every synchronisation of a kernel is taken away or weakened in turn: the checks must notice.

A mutant is run with the blocks in forward and in reverse order, and is caught if a check finds something in
either. What no order can show is listed in REDUNDANT with the reason why the kernel is right without it. The
ordinals there count in the PTX that nvcc 13.0 makes of CUTLASS 4: other releases may need new ones.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulator import Machine, Output
from tests.emulator.cuda_runtime import reset
from tests.emulator.mutations import Mutant, mutants, registered_ptx, replaced
from tests.emulator.native import build_library, library
from tests.emulator.oracles.cutlass import GEMMS, compile_gemms
from tests.emulator.oracles.run import Operands, run_gemm
from tests.emulator.toolchain import compile_ptx

SOURCE = Path(__file__).parent / "kernels" / "tiled_gemm.cu"
ORDERS = ("forward", "reverse")
# Many times what any of the runs takes: a mutant that goes astray ends.
MAX_INSTRUCTIONS = 1_000_000
SHARE_CAUGHT = 0.95


@dataclasses.dataclass(frozen=True)
class Redundant:
    """Mutants that are right. Where they stand in for one another, all of them at once are not."""

    reason: str
    keys: tuple[str, ...]
    stand_in_for_one_another: bool = False


def keys(kind, ordinals, *changes):
    return tuple(f"{kind} {ordinal}: {change}" for ordinal in ordinals for change in changes)


SM80_DRAIN = Redundant(
    "drains copies of which there are none: the last steps of the main loop issue none, their groups are "
    "empty",
    (*keys("cp.async.commit_group", [3], "delete"), *keys("cp.async.wait_all", [0], "delete")),
)


def producer_tail(waits, flips):
    return Redundant(
        "the producer's last waits, so that no block of its cluster signals a block that is gone: the "
        "cluster has one block, and nothing follows the waits (with the other parity some wait for a phase "
        "that is over, or comes too)",
        (*keys("mbarrier.wait", waits, "pass"), *keys("mbarrier.wait", flips, "flip the parity")),
    )


STEADY_WGMMA_FENCE = Redundant(
    "in the main loop nothing but wgmma of one shape touches the accumulators, and that needs no fence "
    "(PTX ISA, wgmma.fence)",
    keys("wgmma.fence", [1], "delete"),
)

REDUNDANT = {
    "cutlass_sm80_bf16_tn": (
        SM80_DRAIN,
        Redundant(
            "the end of the main loop and the start of the epilogue, with no access to shared memory between",
            keys("bar.sync", [2, 3], "delete"),
            stand_in_for_one_another=True,
        ),
    ),
    "cutlass_sm80_f16_tn_serial": (
        SM80_DRAIN,
        Redundant(
            "the end of the main loop, the end of the wait for the slice before, and the start of the "
            "epilogue (of the first slice, of the others): the wait's own bar.red is among them, with no "
            "access to shared memory between",
            keys("bar.sync", [2, 3, 4, 12], "delete"),
        ),
    ),
    "cutlass_sm90_bf16_tn": (
        producer_tail(range(5, 18), [6, 8, 12, 14, 15, 16]),
        STEADY_WGMMA_FENCE,
        Redundant(
            "each comes after the initialisation of the mbarriers that the async proxy signals",
            keys("fence.mbarrier_init", [0, 1], "delete"),
            stand_in_for_one_another=True,
        ),
        Redundant(
            "the pipeline that loads C, which beta = 0 leaves idle",
            keys("mbarrier.init", range(26, 32), "one arrival more"),
        ),
        Redundant(
            "protects the epilogue's two buffers from being written again, but a tile has only two parts; "
            "the copies are waited for at the end",
            (
                *keys("cp.async.bulk.commit_group", [0], "delete"),
                *keys("cp.async.bulk.wait_group", [0, 1], "delete", "wait for one group less"),
                *keys("bar.sync", [2, 4], "delete"),
            ),
        ),
    ),
    "cutlass_sm90_bf16_nt_pingpong": (
        producer_tail(range(7, 21), [7, 9, 11, 13, 15, 17, 18, 20]),
        STEADY_WGMMA_FENCE,
        Redundant(
            "each comes after the initialisation of the mbarriers that the async proxy signals",
            keys("fence.mbarrier_init", range(4), "delete"),
            stand_in_for_one_another=True,
        ),
        Redundant(
            "makes the loads of C wait for those of A and B, but beta = 0 leaves them out: nobody waits",
            (
                *keys("mbarrier.init", [28, 29], "one arrival more"),
                *keys("mbarrier.arrive", [4], "delete"),
            ),
        ),
        Redundant(
            "lets the warpgroups' epilogues take turns, but this epilogue uses no shared memory",
            keys("mbarrier.wait", [5], "pass"),
        ),
    ),
}


class RecordingMachine(Machine):
    """Keeps the result of the last run where the host code around the launch gives up."""

    last = None

    def run(self, call):
        self.last = super().run(call)
        return self.last


@dataclasses.dataclass(frozen=True)
class Run:
    result: object
    product: torch.Tensor | None  # None: the launch did not complete


class OwnKernel:
    """A kernel of tiled_gemm.cu: four tiles a block, or three slices of k; each deeper than the three stages.

    split_k_gemm's slices are nine or ten steps, the other kernels' tiles seven.
    """

    def __init__(self, kernel):
        generator = torch.Generator().manual_seed(0)
        self.kernel = kernel
        self.splits_k = kernel == "split_k_gemm"
        self.m, self.n, self.k = (100, 72, 904) if self.splits_k else (200, 72, 200)
        self.a, self.b = (
            torch.randn(rows, self.k, generator=generator).bfloat16() for rows in (self.m, self.n)
        )
        self.exact = self.a.double() @ self.b.double().T
        self.magnitude = self.a.double().abs() @ self.b.double().abs().T
        self.output = torch.bfloat16 if kernel == "tiled_gemm_bf16" else torch.float32
        self.ptx = compile_ptx(SOURCE).read_text()

    def run(self, ptx, order):
        machine = Machine("a100", order=order, max_instructions=MAX_INSTRUCTIONS)
        module = machine.load(ptx)
        c = torch.empty(self.m, self.n, dtype=self.output)
        arguments = [self.a, self.b, Output(c), self.m, self.n, self.k]
        if self.splits_k:
            tickets = torch.zeros(4, dtype=torch.int32)
            arguments += [Output(torch.empty(4 * 3 * 64 * 64)), tickets]
        result = module.launch(self.kernel, (4, 3) if self.splits_k else 2, 128, *arguments)
        module.unload()
        right = result.only.completed and not (self.splits_k and tickets.any())
        return Run(result, c if right else None)


# m, n, k. On sm_80 three stages of 32: nine steps, or three slices of five or six. On sm_90a thirteen or
# fourteen stages of 64: 27 steps, or ten for each of the three tiles that a block makes.
CUTLASS_SIZES = {
    "cutlass_sm80_bf16_tn": (136, 72, 264),
    "cutlass_sm80_f16_tn_serial": (136, 72, 504),
    "cutlass_sm90_bf16_tn": (72, 40, 1704),
    "cutlass_sm90_bf16_nt_pingpong": (136, 72, 584),
}


class CutlassKernel:
    """A CUTLASS launcher's kernel."""

    def __init__(self, name):
        self.gemm = next(gemm for gemm in GEMMS if gemm.launcher == name)
        self.output = torch.float16 if self.gemm.output == "f16" else torch.bfloat16
        self.launchers = load_launchers(self.gemm.arch)
        self.operands = Operands(self.gemm, *CUTLASS_SIZES[name])
        self.exact, self.magnitude = self.operands.exact, self.operands.magnitude
        self.kernel = self.launch(self.machine("forward"))[1].only.kernel
        self.ptx = registered_ptx(self.kernel)

    def machine(self, order):
        hopper = self.gemm.arch == "sm_90a"
        machine = RecordingMachine(
            "h100" if hopper else "a100", order=order, max_instructions=MAX_INSTRUCTIONS
        )
        if hopper:
            machine.device = dataclasses.replace(machine.device, multiprocessors=2)
        return machine

    def launch(self, machine):
        slices = 3 if self.gemm.splits_k else 1
        return run_gemm(machine, self.launchers, self.gemm, self.operands, slices=slices)

    def run(self, ptx, order):
        machine = self.machine(order)
        product = None
        with replaced(machine, self.kernel, ptx):
            try:
                product = self.launch(machine)[0]
            except AssertionError:  # the launcher returned an error
                reset()
        return Run(machine.last, product)


@cache
def load_launchers(arch):
    library()  # first: the launchers resolve the CUDA runtime's symbols in it
    return ctypes.CDLL(str(compile_gemms(arch, build_library())))


SUBJECTS = {
    "tiled_gemm_f32": OwnKernel,
    "tiled_gemm_bf16": OwnKernel,
    "split_k_gemm": OwnKernel,
    **dict.fromkeys(CUTLASS_SIZES, CutlassKernel),
}


def catch(subject, ptx, product):
    """In either order of the blocks: whether a check finds something, whether anything is wrong at all."""
    wrong = False
    for order in ORDERS:
        run = subject.run(ptx, order)
        if run.result.findings:
            return True, True
        wrong = wrong or run.product is None or not torch.equal(run.product, product)
    return False, wrong


@pytest.fixture(scope="module")
def table():
    """Counts by kind over all kernels; printed at the end."""
    rows = {}
    yield rows
    print(f"\n{'':28}{'mutants':>9}{'redundant':>11}{'others':>8}{'caught':>8}{'by checks':>11}")
    for kind in sorted(rows):
        row = rows[kind]
        others = row["mutants"] - row["redundant"]
        numbers = f"{row['mutants']:9}{row['redundant']:11}{others:8}{row['caught']:8}{row['by checks']:11}"
        print(f"{kind:28}{numbers}")


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_checks_notice_missing_synchronisation(name, table, record_property):
    subject = SUBJECTS[name](name)
    for order in ORDERS:
        clean = subject.run(subject.ptx, order)
        clean.result.assert_clean()
    # Half a unit in the last place for the output and for each of at most three slices, and fp32 sums.
    rounding = (4 * torch.finfo(subject.output).eps + 2.0**-20) * subject.magnitude
    assert ((clean.product.double() - subject.exact).abs() <= rounding).all()

    redundant = {key for group in REDUNDANT.get(name, ()) for key in group.keys}
    all_mutants = {mutant.key: mutant for mutant in mutants(subject.ptx, clean.result.only)}
    assert redundant <= all_mutants.keys(), "listed, but no such mutants"
    total, missed, needed = Counter(), {}, []
    for key, mutant in all_mutants.items():
        by_checks, wrong = catch(subject, mutant.apply(subject.ptx), clean.product)
        total["mutants", mutant.kind] += 1
        if key in redundant:
            total["redundant", mutant.kind] += 1
            if by_checks or wrong:
                needed.append(key)
            continue
        total["caught", mutant.kind] += wrong
        total["by checks", mutant.kind] += by_checks
        if not by_checks:
            missed[key] = f"line {mutant.line}: {mutant.original} -> {mutant.changed}"
    for (column, kind), count in total.items():
        table.setdefault(kind, Counter())[column] += count
        record_property(f"{kind}, {column}", count)
    assert not needed, "listed as redundant, and needed"
    others = len(all_mutants) - len(redundant)
    assert others - len(missed) >= SHARE_CAUGHT * others, missed


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (name, group)
        for name, groups in REDUNDANT.items()
        for group in groups
        if group.stand_in_for_one_another
    ],
    ids=lambda value: value if isinstance(value, str) else value.keys[0].partition(" ")[0],
)
def test_one_of_those_that_stand_in_for_one_another_is_needed(name, group):
    subject = SUBJECTS[name](name)
    clean = subject.run(subject.ptx, "forward")
    ptx = subject.ptx
    for mutant in mutants(subject.ptx, clean.result.only):
        if mutant.key in group.keys:
            ptx = mutant.apply(ptx)
    by_checks, _ = catch(subject, ptx, clean.product)
    assert by_checks


PTX = """
.version 8.7
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 counter)
{
	.reg .pred %p<4>;
	.reg .b32 %r<4>;
	.reg .b64 %rd<4>;
	ld.param.u64 %rd1, [counter];
	mov.u32 %r1, %tid.x;
	setp.lt.u32 %p1, %r1, 7;
	bar.red.popc.u32 %r2, 0, !%p1;
	bar.red.or.pred %p2, 0, %p1;
	@%p2 bra LAST;
	bar.sync 0;
LAST:
	membar.gl; fence.acq_rel.gpu;
	bar.warp.sync 0xffffffff;
	@%p1 atom.acq_rel.gpu.global.add.u32 %r3, [%rd1], %r2;
	ret;
}
"""


def test_mutants_change_what_was_executed_and_nothing_else():
    counter = np.zeros(1, np.uint32)
    launch = Machine("h100").load(PTX).launch("kernel", 1, 32, counter).assert_clean().only
    assert counter[0] == 7 * 25
    found = mutants(PTX, launch)
    assert {mutant.key: mutant.changed for mutant in found} == {
        "bar.red 0: do not wait": "selp.u32 %r2, 0, 1, %p1;",
        "bar.red 1: do not wait": "mov.pred %p2, %p1;",
        "fence 0: delete": "",
        "fence 0: narrow to the block": "membar.cta;",
        "fence 1: delete": "",
        "fence 1: narrow to the block": "fence.acq_rel.cta;",
        "bar.warp.sync 0: delete": "",
        "release 0: relax": "@%p1 atom.relaxed.gpu.global.add.u32 %r3, [%rd1], %r2;",
    }
    for mutant in found:
        changed = mutant.apply(PTX)
        differing = [
            i for i, (a, b) in enumerate(zip(PTX.split("\n"), changed.split("\n"), strict=True), 1) if a != b
        ]
        assert differing == [mutant.line]
        Machine("h100").load(changed).launch("kernel", 1, 32, counter)  # still PTX


def test_a_mutant_belongs_to_its_ptx():
    mutant = Mutant("bar.sync", "delete", 0, 3, "bar.sync 0;", "")
    assert mutant.apply("a\nb\nbar.sync 0;\n") == "a\nb\n\n"
    with pytest.raises(ValueError, match=r"line 3 of ptx must hold 'bar.sync 0;' once"):
        mutant.apply("a\nbar.sync 0;\nc")


def test_the_ptx_of_an_unknown_kernel():
    with pytest.raises(LookupError, match="no loaded launcher has a kernel 'nothing'"):
        registered_ptx("nothing")
