"""Where each byte goes: what every launch reads and writes, PEFT's and ours."""

from __future__ import annotations

from benchmarks.sequences import FROZEN, FUSED, PEFT_DROPOUT, Kernel, Sequence
from docs.drawings.canvas import Drawing

# What a launch reads and what it writes, by its name in benchmarks.sequences; for names that stand in both
# halves, the half's as well.
OPERANDS = {
    "dropout": ("x", "x̂ mask"),
    "x Wᵀ": ("x W", "y"),
    "S = x Aᵀ": ("x̂ A", "S"),
    "S Bᵀ": ("S B", "z"),
    "× scaling": ("z", "z"),
    "forward add": ("y z", "y"),
    "s · dy": ("dy", "dz"),
    "dB": ("dz S", "dB"),
    "dS": ("dz B", "dS"),
    "dA": ("x̂ dS", "dA"),
    "dS A": ("dS A", "dx̂"),
    "dy W": ("dy W", "dx"),
    "dropout's backward": ("dx̂ mask", "dx̂"),
    "backward add": ("dx dx̂", "dx"),
    "h = s drop(x) Aᵀ": ("x A", "h"),
    "y = [x | h] [W | B]ᵀ": ("x h W B", "y"),
    "g = s dy B, dB = dyᵀ h": ("dy B h", "g dB"),
    "dA = gᵀ drop(x)": ("x g", "dA"),
    "dx = dy W + mask (g A)": ("dy g W A", "dx"),
    "sums of dA and dB": ("parts", "dA dB"),
}
# The colour of an operand, and its bytes for each element; 0 where it is of the rank's size.
SIZES = {
    **dict.fromkeys(("x", "x̂", "dx", "dx̂"), ("x", 2)),
    **dict.fromkeys(("y", "z", "dy", "dz"), ("y", 2)),
    "W": ("w", 2),
    "mask": ("m", 1),
}
RANK = ("r", 0)
BYTE, THIN, HIGH, ROW = 14, 7, 17, 23


def draw() -> Drawing:
    d = Drawing(
        736,
        634,
        "Where each byte goes",
        "The operands that each launch of PEFT and of the fused op reads and writes, forward and backward, "
        "in 16 bits with dropout.",
    )
    d.heading(
        "Where each byte goes", "one layer in 16 bits with dropout: what a launch reads → what it writes"
    )
    _sequence(d, 20, PEFT_DROPOUT, "PEFT", 138)
    _sequence(d, 388, FUSED, "fused", 160)

    y = 500
    d.line((20, y - 22), (716, y - 22))
    for i, (label, sequence) in enumerate((("PEFT", PEFT_DROPOUT), ("fused", FUSED), ("frozen", FROZEN))):
        _sum(d, y + 27 * i, label, sequence)
    key = (("x", "size of x (u)"), ("y", "size of y (v)"), ("w", "size of W (w)"), ("m", "mask"))
    x = 20
    for kind, words in (*key, ("r", "of the rank's size, thin")):
        d.box(x, y + 92, 12, 12, kind)
        d.text(x + 18, y + 102, words, "quiet", size=12)
        x += 36 + 7 * len(words)
    d.text(
        20,
        y + 123,
        "Bytes for each element. Nothing stays in a cache from one launch to the next.",
        "quiet",
        size=12,
    )
    return d


def _sequence(d: Drawing, left: float, sequence: Sequence, title: str, indent: float) -> None:
    launches = len(sequence.forward) + len(sequence.backward)
    d.text(left, 80, f"{title}: {launches} launches", bold=True)
    y = 92.0
    for half, kernels in (("forward", sequence.forward), ("backward", sequence.backward)):
        d.text(left, y + 12, half, "quiet", size=12)
        y += ROW - 3
        for kernel in kernels:
            d.text(left, y + 13, kernel.name, size=12)
            x = left + indent
            reads, writes = operands(half, kernel)
            for name in reads:
                x = _box(d, x, y, name)
            d.arrow((x + 1, y + HIGH / 2), (x + 13, y + HIGH / 2))
            x += 16
            for name in writes:
                x = _box(d, x, y, name)
            y += ROW
        y += 6


def operands(half: str, kernel: Kernel) -> tuple[list[str], list[str]]:
    """What a launch reads and writes. Raises ValueError where that are not the bytes it is said to move."""
    reads, writes = OPERANDS.get(kernel.name) or OPERANDS[f"{half} {kernel.name}"]
    moved = dict.fromkeys("xywmr", 0)
    for name in (*reads.split(), *writes.split()):
        kind, size = SIZES.get(name, RANK)
        moved[kind] += size
    if (moved["x"] + moved["m"], moved["y"], moved["w"]) != (kernel.u, kernel.v, kernel.w):
        raise ValueError(f"{half} {kernel.name}: {reads} → {writes} are not {kernel}")
    return reads.split(), writes.split()


def _box(d: Drawing, x: float, y: float, name: str) -> float:
    kind, size = SIZES.get(name, RANK)
    width = size * BYTE or THIN
    d.box(x, y, width, HIGH, kind)
    if size > 1:
        d.text(x + width / 2, y + 12, name, anchor="middle", size=11)
    return x + width + 3


def _sum(d: Drawing, y: float, label: str, sequence: Sequence) -> None:
    kernels = sequence.forward + sequence.backward
    x, byte = 76.0, 9.6
    d.text(20, y + 13, label)
    sums = [sum(getattr(kernel, unit) for kernel in kernels) for unit in "uvw"]
    for kind, total in zip("xyw", sums, strict=True):
        d.box(x, y, total * byte, HIGH, kind)
        d.text(x + total * byte / 2, y + 13, f"{total:g}", anchor="middle", size=12)
        x += total * byte
    words = " + ".join(f"{total:g}{unit}" for total, unit in zip(sums, "uvw", strict=True))
    d.text(x + 8, y + 13, words, "quiet", size=12)
