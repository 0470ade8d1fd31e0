"""The launches of a backward: what each reads, and how it cuts it."""

from __future__ import annotations

from docs.drawings.canvas import Drawing

LEFT = 330  # of the pictures


def draw() -> Drawing:
    d = Drawing(
        736,
        566,
        "The backward in four launches",
        "g and dB from one read of dy; dx in the frozen GEMM's accumulators, masked between the rank's tiles "
        "and the frozen ones; dA from x and the mask drawn again; the partial sums added in order.",
    )
    d.heading("The backward in four launches", "what each reads, and how it cuts it")
    _one_read(d, 86)
    _dx(d, 250)
    _grad(d, 368)
    _sums(d, 508)
    return d


def _launch(d: Drawing, y: float, number: int, equation: str, notes: tuple[str, ...]) -> None:
    d.text(20, y + 12, str(number), "quiet", bold=True)
    d.text(40, y + 12, equation, bold=True)
    d.notes(40, y + 34, *notes)


def _one_read(d: Drawing, y: float) -> None:
    notes = (
        "One read of dy serves both. A block owns",
        "128 rows and goes through all columns:",
        "g's sums stay in registers, dB's of a slice",
        "are stored with each tile, in float32.",
        "At higher ranks two reads of dy cost less,",
        "and launch 3 makes dB beside dA.",
    )
    _launch(d, y, 1, "g = s · dy B   and   dB = dyᵀ h", notes)
    for slice_ in range(3):
        top = y + 6 + 32 * slice_
        for tile in range(6):
            d.box(LEFT + 34 * tile, top, 32, 30, "y" if slice_ == 1 else "plain", dashed=slice_ != 1)
        d.box(LEFT + 222, top, 16, 30, "r" if slice_ == 1 else "plain", dashed=slice_ != 1)
    d.text(LEFT + 100, y - 2, "dy: M×N", "y-ink", anchor="middle", size=12)
    d.text(LEFT + 230, y - 2, "g", "r-ink", anchor="middle", size=12)
    d.text(LEFT + 252, y + 58, "128 rows: a slice", "quiet", size=12)
    d.arrow((LEFT + 85, y + 70), (LEFT + 85, y + 112))
    for tile in range(6):
        d.box(LEFT + 34 * tile, y + 114, 32, 13, "r")
    d.text(LEFT + 212, y + 125, "dBᵀ, the slice's partial sums", "r-ink", size=12)


def _dx(d: Drawing, y: float) -> None:
    notes = (
        "The forward's kernel on other operands:",
        "[g | dy] · [A ; W] in one accumulator, with",
        "the mask drawn again between the two.",
    )
    _launch(d, y, 2, "dx = dy W + mask ∘ (g A) / (1 − p)", notes)
    steps = (("g A", "r"), ("mask ∘ g A / (1−p)", "m"), ("… + dy W", "y"), ("dx", "x"))
    words = ("rank tiles", "once", "frozen tiles", "stored")
    x: float = LEFT
    for i, ((label, kind), word) in enumerate(zip(steps, words, strict=True)):
        width = 32 + 6.2 * len(label)
        if i:
            d.arrow((x + 2, y + 24), (x + 16, y + 24))
            x += 18
        d.box(x, y + 8, width, 32, kind)
        d.text(x + width / 2, y + 29, label, anchor="middle", size=12)
        d.text(x + width / 2, y + 58, word, "quiet", anchor="middle", size=12)
        x += width
    d.text(LEFT, y + 82, "one tile's sums, in registers from beginning to end", "quiet", size=12)


def _grad(d: Drawing, y: float) -> None:
    notes = (
        "x is read once, and its mask drawn again by",
        "the threads that copied a chunk: one Philox",
        "call for eight numbers. The rows are split,",
        "to give every multiprocessor a share.",
    )
    _launch(d, y, 3, "dA = gᵀ drop(x)", notes)
    d.box(LEFT, y + 14, 16, 96, "r")
    d.text(LEFT + 8, y + 6, "g", "r-ink", anchor="middle", size=12)
    for share in range(3):
        for column in range(6):
            chosen = (share, column) == (1, 2)
            d.box(
                LEFT + 28 + 34 * column,
                y + 14 + 32 * share,
                32,
                30,
                "x" if chosen else "plain",
                dashed=not chosen,
            )
    d.box(LEFT + 28 + 68, y + 46, 32, 30, "x")
    for i in range(4):
        for j in range(4):
            if (i * 3 + j * 5) % 4 == 0:
                d.box(LEFT + 28 + 68 + 8 * j, y + 46 + 7.5 * i, 8, 7.5, "m")
    d.text(LEFT + 128, y + 6, "x: M×K, some of it dropped", "x-ink", anchor="middle", size=12)
    d.notes(LEFT + 246, y + 48, "a block: 64 or 128", "columns of a share", "of the rows")


def _sums(d: Drawing, y: float) -> None:
    _launch(d, y, 4, "partial sums of dA and dB", ("Added in order: the same bits every time.",))
    x = LEFT
    for i in range(3):
        d.box(x, y + 6, 60, 15, "r")
        d.text(x + 30, y + 18, f"share {i}", anchor="middle", size=11)
        d.text(x + 70, y + 18, "+" if i < 2 else "=", anchor="middle")
        x += 80
    d.box(x, y + 6, 60, 15, "r")
    d.text(x + 30, y + 18, "dA", anchor="middle", size=11)
