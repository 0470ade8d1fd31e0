"""How the CPU kernels cut a product for registers and caches."""

from __future__ import annotations

from docs.drawings.canvas import Drawing

LEFT, TOP, ROWS, COLUMNS, RANK, DEPTH, GAP = 28, 86, 44, 58, 26, 132, 8


def draw() -> Drawing:
    d = Drawing(
        736,
        412,
        "Panels and tiles on the CPU",
        "A chunk of W lies in panels in the second cache, a few rows of x in the first, and their product in "
        "registers; the low-rank operands come before in the same tile.",
    )
    d.heading("Panels and tiles on the CPU", "with AVX-512 a tile is 14 rows × 32 columns, in 28 registers")
    deep = RANK + GAP + DEPTH
    out_x, out_y = LEFT + deep + 16, TOP + deep + 16
    for panel in range(4):
        x = out_x + panel * COLUMNS
        now = panel == 1
        d.box(x, TOP, COLUMNS - 4, RANK, "r" if now else "plain", dashed=not now)
        d.box(x, TOP + RANK + GAP, COLUMNS - 4, DEPTH, "w" if now else "plain", dashed=not now)
        d.box(x, out_y, COLUMNS - 4, ROWS, "y" if now else "plain", dashed=not now)
    now_x = out_x + COLUMNS
    for line in range(1, 12):
        d.line((now_x, TOP + RANK + GAP + 11 * line), (now_x + COLUMNS - 4, TOP + RANK + GAP + 11 * line))
    d.box(LEFT, out_y, RANK, ROWS, "r")
    d.box(LEFT + RANK + GAP, out_y, DEPTH, ROWS, "x")
    middle = (now_x + COLUMNS / 2 - 2, out_y + ROWS / 2 + 4)
    d.text(*middle, "y", anchor="middle", size=14)
    d.text(LEFT + RANK / 2, out_y + ROWS / 2 + 4, "h", anchor="middle")
    d.text(LEFT + RANK + GAP + DEPTH / 2, out_y + ROWS / 2 + 4, "x", anchor="middle")
    d.text(out_x - 10, TOP + 17, "Bᵀ", "r-ink", anchor="end", size=12)
    d.text(out_x - 10, TOP + 50, "Wᵀ, in panels of 32 columns", "w-ink", anchor="end", size=12)
    d.arrow((LEFT, out_y + ROWS + 12), (LEFT + deep, out_y + ROWS + 12))
    d.text(LEFT, out_y + ROWS + 30, "the rank first, then 320 units of the depth", "quiet", size=12)

    x = out_x + 4 * COLUMNS + 18
    d.text(x, TOP + 12, "second cache", bold=True)
    d.notes(
        x,
        TOP + 31,
        "a chunk of W, laid out once for",
        "all rows of a block; a packed",
        "weight lies so already",
    )
    d.text(x, TOP + 102, "first cache", bold=True)
    d.notes(x, TOP + 121, "14 rows of x, copied to where", "they meet every panel")
    d.text(x, out_y + 14, "registers", bold=True)
    d.notes(x, out_y + 33, "the tile's sums, the low-rank", "product's among them")
    d.notes(
        20,
        374,
        "Up to 16 rows, and outputs of few columns or rows (h, g, dA, dB), have ways of their own,",
        "which read W and x where they lie, in long runs.",
    )
    return d
