"""Mutants of a kernel: each lacks one synchronisation, or has a weaker one, and the checks should notice.

A mutant is the kernel's PTX with one instruction changed. Only instructions that a run has executed are
changed: what never ran would survive any change.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.emulator.machine import Launch, Machine, Result
from tests.emulator.native import library


@dataclass(frozen=True)
class Mutant:
    """One change. `ordinal` counts the executed instructions of the same kind in the order of the text."""

    kind: str
    change: str
    ordinal: int
    line: int  # of the PTX, from 1
    original: str
    changed: str

    @property
    def key(self) -> str:
        """Stays the same for as long as the compiler makes the same instructions in the same order."""
        return f"{self.kind} {self.ordinal}: {self.change}"

    def apply(self, ptx: str) -> str:
        """The PTX with the change. Raises ValueError where it is not the PTX that this was made from."""
        lines = ptx.split("\n")
        if lines[self.line - 1].count(self.original) != 1:
            raise ValueError(
                f"line {self.line} of ptx must hold {self.original!r} once: {lines[self.line - 1]!r}"
            )
        lines[self.line - 1] = lines[self.line - 1].replace(self.original, self.changed)
        return "\n".join(lines)


@dataclass(frozen=True)
class _Instruction:
    guard: str
    opcode: str
    operands: list[str]

    def write(self, *, opcode: str | None = None, operands: list[str] | None = None) -> str:
        text = ", ".join(self.operands if operands is None else operands)
        return f"{self.guard}{opcode or self.opcode} {text}".rstrip() + ";"


# A change gives the new text, or None where it does not apply to this instruction.
_Change = Callable[[_Instruction], "str | None"]

_SCRATCH = "%mutated"  # a register of a scope of its own


def _delete(_: _Instruction) -> str:
    return ""


def _wait_for_one_group_less(instruction: _Instruction) -> str:
    return instruction.write(operands=[str(int(instruction.operands[0]) + 1)])


def _narrow_to_block(instruction: _Instruction) -> str | None:
    if instruction.opcode.startswith("membar"):
        return instruction.write(opcode="membar.cta")
    narrowed = re.sub(r"\.(gpu|sys|cluster)\b", ".cta", instruction.opcode)
    return instruction.write(opcode=narrowed) if narrowed != instruction.opcode else None


def _relax(instruction: _Instruction) -> str:
    return instruction.write(opcode=re.sub(r"\.(acquire|release|acq_rel)\b", ".relaxed", instruction.opcode))


def _reduce_without_waiting(instruction: _Instruction) -> str:
    """The thread's own predicate takes the place of all threads'."""
    predicate = instruction.operands[-1].removeprefix("!")
    negated = instruction.operands[-1].startswith("!")
    if ".popc." in instruction.opcode:
        values = ["0", "1"] if negated else ["1", "0"]
        return instruction.write(opcode="selp.u32", operands=[instruction.operands[0], *values, predicate])
    copy = "not.pred" if negated else "mov.pred"
    return instruction.write(opcode=copy, operands=[instruction.operands[0], predicate])


def _pass(instruction: _Instruction) -> str:
    return instruction.write(opcode="setp.eq.u32", operands=[instruction.operands[0], "0", "0"])


def _with_operand(instruction: _Instruction, index: int, operation: str, constant: int) -> str:
    """The same instruction on `operation operand, constant`."""
    operands = [*instruction.operands]
    prologue = f"{operation} {_SCRATCH}, {operands[index]}, {constant};"
    operands[index] = _SCRATCH
    return f"{{ .reg .b32 {_SCRATCH}; {prologue} {instruction.write(operands=operands)} }}"


def _flip_parity(instruction: _Instruction) -> str | None:
    return _with_operand(instruction, 2, "xor.b32", 1) if ".parity" in instruction.opcode else None


def _expect_half(instruction: _Instruction) -> str:
    return _with_operand(instruction, len(instruction.operands) - 1, "shr.u32", 1)


def _arrive_without_bytes(instruction: _Instruction) -> str | None:
    if ".arrive" not in instruction.opcode:
        return None
    return instruction.write(
        opcode=instruction.opcode.replace(".expect_tx", ""), operands=instruction.operands[:-1]
    )


def _one_arrival_more(instruction: _Instruction) -> str:
    return _with_operand(instruction, 1, "add.u32", 1)


_GROUPS: dict[str, _Change] = {"delete": _delete, "wait for one group less": _wait_for_one_group_less}
_FENCE: dict[str, _Change] = {"delete": _delete, "narrow to the block": _narrow_to_block}

# The first pattern that matches the opcode decides.
_KINDS: tuple[tuple[str, str, dict[str, _Change]], ...] = (
    ("bar.warp.sync", r"bar\.warp\.sync", {"delete": _delete}),
    ("bar.red", r"(bar|barrier)(\.cta)?\.red\b", {"do not wait": _reduce_without_waiting}),
    ("bar.sync", r"(bar|barrier)(\.cta)?\.(sync|arrive)\b", {"delete": _delete}),
    ("barrier.cluster", r"barrier\.cluster\.", {"delete": _delete}),
    ("cp.async.wait_group", r"cp\.async\.wait_group\b", _GROUPS),
    ("cp.async.wait_all", r"cp\.async\.wait_all\b", {"delete": _delete}),
    ("cp.async.commit_group", r"cp\.async\.commit_group\b", {"delete": _delete}),
    ("cp.async.bulk.wait_group", r"cp\.async\.bulk\.wait_group\b", _GROUPS),
    ("cp.async.bulk.commit_group", r"cp\.async\.bulk\.commit_group\b", {"delete": _delete}),
    ("fence.proxy.async", r"fence\.proxy\.async\b", {"delete": _delete}),
    ("fence.mbarrier_init", r"fence\.mbarrier_init\b", {"delete": _delete}),
    ("fence", r"(membar|fence)\.", _FENCE),
    ("wgmma.fence", r"wgmma\.fence\b", {"delete": _delete}),
    ("wgmma.commit_group", r"wgmma\.commit_group\b", {"delete": _delete}),
    ("wgmma.wait_group", r"wgmma\.wait_group\b", _GROUPS),
    ("mbarrier.init", r"mbarrier\.init\b", {"one arrival more": _one_arrival_more}),
    (
        "mbarrier.expect_tx",
        r"mbarrier\.(arrive\.)?expect_tx\b",
        {"delete": _delete, "expect half": _expect_half, "arrive without bytes": _arrive_without_bytes},
    ),
    ("mbarrier.arrive", r"mbarrier\.arrive\b", {"delete": _delete}),
    ("mbarrier.wait", r"mbarrier\.(try|test)_wait\b", {"pass": _pass, "flip the parity": _flip_parity}),
    ("acquire", r"(ld|atom)\b\S*\.acquire\b", {"relax": _relax}),
    ("release", r"(st|atom|red)\b\S*\.(release|acq_rel)\b", {"relax": _relax}),
)

_STATEMENT = re.compile(r"(?P<guard>@!?[%$\w]+\s+)?(?P<opcode>[a-z][\w.:]+)(?P<operands>(\s[^;]*)?);")


def _split_operands(text: str) -> list[str]:
    """At the commas outside brackets."""
    return [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", text) if part.strip()]


def mutants(ptx: str, launch: Launch) -> list[Mutant]:
    """The mutants of the kernel that `launch` ran from this PTX, in the order of the text."""
    lines = ptx.split("\n")
    ordinals: dict[str, int] = {}
    found = []
    for line in sorted({step.ptx_line for step in launch.steps if step.executed > 0}):
        for statement in _STATEMENT.finditer(lines[line - 1]):
            kind = next((k for k in _KINDS if re.match(k[1], statement["opcode"])), None)
            if kind is None:
                continue
            name, _, changes = kind
            ordinal = ordinals[name] = ordinals.get(name, -1) + 1
            instruction = _Instruction(
                statement["guard"] or "", statement["opcode"], _split_operands(statement["operands"])
            )
            for change, rewrite in changes.items():
                changed = rewrite(instruction)
                if changed is not None:
                    found.append(Mutant(name, change, ordinal, line, statement[0], changed))
    return found


def registered_ptx(kernel: str) -> str:
    """The PTX that loaded launchers launch `kernel` from. Raises LookupError."""
    function = library().emulator_runtime_ptx
    function.restype = ctypes.c_char_p
    text = function(kernel.encode())
    if text is None:
        raise LookupError(f"no loaded launcher has a kernel {kernel!r}")
    return str(text.decode())


@contextmanager
def replaced(machine: Machine, kernel: str, ptx: str) -> Iterator[None]:
    """Meanwhile launchers run the kernel of the same name from this PTX."""
    module = machine.load(ptx)
    library().emulator_runtime_replace(kernel.encode(), module._handle)
    try:
        yield
    finally:
        library().emulator_runtime_replace(kernel.encode(), 0)
        module.unload()


def unnoticed_mutants(run: Callable[[Machine], Result]) -> list[str]:
    """Of the synchronisations of the first kernel that `run` launches those that no check misses."""
    launch = run(Machine()).assert_clean().launches[0]
    ptx = registered_ptx(launch.kernel)
    unnoticed = []
    for mutant in mutants(ptx, launch):
        machine = Machine()
        with replaced(machine, launch.kernel, mutant.apply(ptx)):
            if not run(machine).findings:
                unnoticed.append(mutant.key)
    return unnoticed
