"""What a swap, or packing, did, for people and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from fused_lora.targets import Skipped, collapsed


@dataclass(frozen=True)
class Swapped:
    """A layer that now runs fused, and how many parameters its adapters hold."""

    name: str
    in_features: int
    out_features: int
    adapter_parameters: int
    note: str = ""  # what is not fused of it, and why


@dataclass(frozen=True)
class Packed:
    """A layer whose weight is packed, and the bytes that it takes."""

    name: str
    bytes: int


@dataclass
class PackReport:
    """Which weights are packed, and which are left plain and why. print() it.

    `packed` lists them (`name`, `bytes`), and `left_plain` the others (`name`, `reason`).
    """

    packed: list[Packed] = field(default_factory=list)
    left_plain: list[Skipped] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.packed)

    def __str__(self) -> str:
        lines = [f"packed weights: {len(self.packed)}, {self.bytes / 2**20:,.1f} MiB"]
        lines += _counted(collapsed(p.name) for p in self.packed)
        if self.left_plain:
            lines.append(f"{len(self.left_plain)} left plain")
            lines += _counted(f"{collapsed(s.name)}: {s.reason}" for s in self.left_plain)
        return "\n".join(lines)


@dataclass
class GroupReport:
    """Which layers share their input and are computed together, and which are not any more. print() it."""

    groups: list[tuple[str, ...]] = field(default_factory=list)
    apart: list[Skipped] = field(default_factory=list)

    def __str__(self) -> str:
        lines = _grouped(self.groups)
        if self.apart:
            lines.append(f"{len(self.apart)} computed by themselves")
            lines += _counted(f"{collapsed(s.name)}: {s.reason}" for s in self.apart)
        return "\n".join(lines)


@dataclass
class Report:
    """What was swapped, what was not and why, and what trains. print() it.

    `swapped` lists the layers, `skipped` what stays as it is (`name`, `reason`), `unfused_adapters` adapters
    of swapped layers that do not run fused, `groups` the names of layers that share an input; `trained` and
    `total` count parameters.
    """

    title: str
    swapped: list[Swapped] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    unfused_adapters: list[Skipped] = field(default_factory=list)  # of layers that were swapped
    groups: list[tuple[str, ...]] = field(default_factory=list)  # the names of layers that share an input
    trained: int = 0
    total: int = 0

    def count_parameters(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            self.total += parameter.numel()
            self.trained += parameter.numel() if parameter.requires_grad else 0

    @property
    def trained_share(self) -> float:
        return self.trained / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = [f"{self.title}: {len(self.swapped)} layers swapped"]
        sizes: Counter[tuple[str, str]] = Counter()
        counts: Counter[tuple[str, str]] = Counter()
        for s in self.swapped:
            kind = f"{collapsed(s.name)}  {s.in_features}→{s.out_features}", s.note
            counts[kind] += 1
            sizes[kind] += s.adapter_parameters
        for kind, n in counts.items():
            name, note = kind
            lines.append(f"  {n} × {name}, {sizes[kind]:,} adapter parameters")
            if note:
                lines.append(f"    {note}")
        if self.groups:
            lines += _grouped(self.groups)
        if self.skipped:
            lines.append(f"{len(self.skipped)} left as they are")
            lines += _counted(f"{collapsed(s.name)}: {s.reason}" for s in self.skipped)
        if self.unfused_adapters:
            lines.append(f"{len(self.unfused_adapters)} adapters of swapped layers do not run fused")
            lines += _counted(f"{collapsed(s.name)}: {s.reason}" for s in self.unfused_adapters)
        lines.append(
            f"{self.trained:,} of {self.total:,} parameters train ({100 * self.trained_share:.3f} %)"
        )
        return "\n".join(lines)


def _counted(lines: Iterable[str]) -> list[str]:
    return [f"  {n} × {line}" for line, n in Counter(lines).items()]


def _grouped(groups: list[tuple[str, ...]]) -> list[str]:
    layers = sum(map(len, groups))
    return [
        f"{layers} share an input with others, in {len(groups)} group{'s' if len(groups) != 1 else ''}",
        *_counted(map(_siblings, groups)),
    ]


def _siblings(names: tuple[str, ...]) -> str:
    parents, _, _ = names[0].rpartition(".")
    own = " + ".join(name.rpartition(".")[2] for name in names)
    return f"{collapsed(parents)}: {own}" if parents else own
