"""The main loop of a kernel's machine code, and what it is made of.

Read from the text of `nvdisasm -c`. A mix counts the instructions that one warp issues in one iteration and
knows nothing of their time.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import reduce
from operator import and_


@dataclass(frozen=True)
class LoopMix:
    """The instructions of a loop's body, by kind."""

    matrix: int  # HMMA, IMMA, HGMMA, QGMMA, UTCHMMA, ...
    shared_loads: int  # LDSM, LDS
    shared_stores: int  # STS, STSM
    async_copies: int  # LDGSTS (cp.async), UTMALDG and the like (TMA)
    global_loads: int
    global_stores: int
    local_accesses: int  # spilled registers, and arrays indexed at run time
    barriers: int  # barriers, fences, commits and waits
    branches: int  # the loop's own among them
    other: int

    @property
    def total(self) -> int:
        return sum(astuple(self))

    @property
    def others_per_matrix(self) -> float:
        """Instructions that are neither matrix nor shared load nor asynchronous copy, per matrix instruction.

        A GEMM's tile sizes dictate those three; the rest is overhead. nan without matrix instructions.
        """
        if self.matrix == 0:
            return math.nan
        return (self.total - self.matrix - self.shared_loads - self.async_copies) / self.matrix


def main_loops(machine_code: str) -> dict[str, LoopMix | None]:
    """The main loop of every function that nvdisasm printed, by mangled name; None for one without a loop.

    Loops that hold matrix instructions are considered or, where there are none, all loops; of these the
    innermost, and of these the one with the most matrix instructions. So neither a wait that spins inside
    the main loop nor a loop over tiles around it is taken for it. Of several with as many matrix
    instructions it is the smallest: a kernel that leaves the ragged ends of its reduction to loops of their
    own spends its time in the other. Where no loop has any, it is the largest. Subroutines that a loop calls
    are not counted. Raises ValueError for a jump to targets that are not named.
    """
    return {name: _main_loop(instructions) for name, instructions in _functions(machine_code).items()}


_JUMPS = ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU")
_KINDS: Mapping[str, str] = {
    opcode: kind
    for kind, opcodes in {
        "shared_loads": "LDSM LDS",
        "shared_stores": "STS STSM",
        "async_copies": "LDGSTS UTMALDG UTMASTG UTMAREDG UBLKCP UBLKRED",
        "global_loads": "LDG LD",
        "global_stores": "STG ST",
        "local_accesses": "LDL STL",
        "barriers": "BAR DEPBAR LDGDEPBAR SYNCS ARRIVES WARPSYNC WARPGROUP MEMBAR FENCE UTMACMDFLUSH UTCBAR "
        "UCGABAR_ARV UCGABAR_WAIT",
        "branches": " ".join(_JUMPS),
    }.items()
    for opcode in opcodes.split()
}
_SECTION = re.compile(r"^\s*\.section\s+", re.MULTILINE)
_LABEL = re.compile(r"\.L_\w+")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?([A-Z]\w*)[^\s;]*\s*([^;]*)")


@dataclass(frozen=True)
class _Instruction:
    kind: str  # a field of LoopMix
    successors: tuple[int, ...]  # positions in the function


def _functions(machine_code: str) -> dict[str, list[_Instruction]]:
    functions = {}
    for section in _SECTION.split(machine_code):
        name = re.match(r"\.text\.([^,]+)", section)
        if name is None:
            continue
        labels: dict[str, int] = {}
        lines: list[tuple[str | None, str, str]] = []
        for line in section.splitlines():
            if label := _LABEL.match(line):
                labels[label[0]] = len(lines)
            elif match := _INSTRUCTION.match(line):
                lines.append((match[1], match[2], match[3]))
        functions[name[1]] = [
            _Instruction(
                _kind(predicate, opcode),
                tuple(_successors(position, predicate, opcode, operands, labels)),
            )
            for position, (predicate, opcode, operands) in enumerate(lines)
        ]
    return functions


def _kind(predicate: str | None, opcode: str) -> str:
    if predicate in ("!PT", "!UPT"):  # never executed: padding, which only takes an issue slot
        return "other"
    return "matrix" if opcode.endswith("MMA") else _KINDS.get(opcode, "other")


def _successors(
    position: int, predicate: str | None, opcode: str, operands: str, labels: Mapping[str, int]
) -> Iterable[int]:
    jumps = opcode in _JUMPS
    if jumps:
        targets = _LABEL.findall(operands)
        if not targets:
            raise ValueError(f"nvdisasm names no target of {opcode} {operands}")
        yield from (labels[target] for target in targets)
    # A branch may also test a predicate among its operands, as in BRA.U !UP0, `(.L_x_1).
    conditional = predicate is not None or (opcode == "BRA" and "," in operands)
    if conditional or not (jumps or opcode in ("EXIT", "RET")):
        yield position + 1


def _main_loop(instructions: Sequence[_Instruction]) -> LoopMix | None:
    loops = _natural_loops([instruction.successors for instruction in instructions])
    if not loops:
        return None
    matrix = {loop: sum(instructions[position].kind == "matrix" for position in loop) for loop in loops}
    considered = [loop for loop in loops if matrix[loop]] or loops
    innermost = [loop for loop in considered if not any(other < loop for other in considered)]
    body = max(innermost, key=lambda loop: (matrix[loop], -len(loop) if matrix[loop] else len(loop)))
    kinds = Counter(instructions[position].kind for position in body)
    return LoopMix(**{field.name: kinds[field.name] for field in fields(LoopMix)})


def _natural_loops(successors: Sequence[Sequence[int]]) -> list[frozenset[int]]:
    """The natural loops of a flow graph that is entered at node 0, one for each header.

    Addresses alone would mislead, since code that was placed out of line jumps back without closing a loop. A
    jump closes one if its target dominates it, that is, lies on every path to it from the entry.
    """
    predecessors: dict[int, list[int]] = {0: []}
    unvisited = [0]
    while unvisited:
        node = unvisited.pop()
        for successor in successors[node]:
            if successor not in predecessors:
                predecessors[successor] = []
                unvisited.append(successor)
            predecessors[successor].append(node)
    reached = sorted(predecessors)

    # The largest solution of dominators(n) = {n} ∪ ⋂ dominators(p), p the predecessors of n, as bit masks.
    dominators = dict.fromkeys(reached, (1 << len(successors)) - 1)
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for node in reached[1:]:
            mask = reduce(and_, (dominators[before] for before in predecessors[node])) | 1 << node
            changed |= mask != dominators[node]
            dominators[node] = mask

    loops: dict[int, set[int]] = {}
    for node in reached:
        for header in successors[node]:
            if dominators[node] >> header & 1:
                body = loops.setdefault(header, {header})
                unvisited = [node]
                while unvisited:
                    inner = unvisited.pop()
                    if inner not in body:
                        body.add(inner)
                        unvisited.extend(predecessors[inner])
    return [frozenset(body) for body in loops.values()]
