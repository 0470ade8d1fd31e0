"""What one block of lora_gemm reads and writes."""

from __future__ import annotations

from docs.drawings.canvas import Drawing

TILE, DEPTH, DEPTHS, GAP = (
    66,
    21,
    8,
    8,
)  # a tile's side, a depth tile, how many, and what sets the rank's apart
LEFT, TOP = 32, 86


def draw() -> Drawing:
    d = Drawing(
        736,
        556,
        "One block of lora_gemm",
        "The output tile, the stripe of x and the stripe of W that it sums over in depth tiles, and before "
        "them the tiles of h and B, which enter the same sums.",
    )
    deep = DEPTH + GAP + DEPTHS * DEPTH
    out_x, out_y = LEFT + deep + 18, TOP + deep + 18
    d.heading("y = [h | x] · [B | W]ᵀ", "rank tiles first, then the frozen product, in the same accumulators")

    # x and h on the left, W and B above, y where they meet; all three of them in three tiles.
    row, column = out_y + TILE, out_x + TILE
    for i in range(3):
        for j in range(3):
            if (i, j) != (1, 1):
                d.box(out_x + j * TILE, out_y + i * TILE, TILE, TILE, dashed=True)
    for i in (0, 2):
        d.box(LEFT, out_y + i * TILE, DEPTH, TILE, dashed=True)
        d.box(LEFT + DEPTH + GAP, out_y + i * TILE, DEPTHS * DEPTH, TILE, dashed=True)
        d.box(out_x + i * TILE, TOP, TILE, DEPTH, dashed=True)
        d.box(out_x + i * TILE, TOP + DEPTH + GAP, TILE, DEPTHS * DEPTH, dashed=True)
    for i in range(-1, DEPTHS):
        kind = "r" if i < 0 else None
        at = (i + 1) * DEPTH + (GAP if i >= 0 else 0)
        label = "h" if i < 0 else "…" if i == DEPTHS - 1 else str(i)
        d.box(LEFT + at, row, DEPTH, TILE, kind or "x")
        d.text(LEFT + at + DEPTH / 2, row + TILE / 2 + 4, label, anchor="middle", size=12)
        d.box(column, TOP + at, TILE, DEPTH, kind or "w")
        label = "Bᵀ" if i < 0 else label
        d.text(column + TILE / 2, TOP + at + 15, label, anchor="middle", size=12)
    d.box(column, row, TILE, TILE, "y")
    d.text(column + TILE / 2, row + TILE / 2 + 5, "y", anchor="middle", size=15)

    d.text(LEFT, out_y - 10, "h: M×r", "r-ink", size=12)
    d.text(LEFT + 62, out_y - 10, "x: M×K", "x-ink", size=12)
    d.text(out_x - 10, TOP + 14, "Bᵀ: r×N", "r-ink", anchor="end", size=12)
    d.text(out_x - 10, TOP + 44, "Wᵀ: K×N", "w-ink", anchor="end", size=12)
    d.text(out_x, out_y + 3 * TILE + 18, "y: M×N", "y-ink", size=12)
    d.arrow((LEFT, row + TILE + 10), (LEFT + deep, row + TILE + 10))
    d.text(LEFT + 40, row + TILE + 28, "order of the sum", "quiet", size=12)
    d.arrow((column + TILE + 12, TOP), (column + TILE + 12, TOP + deep))

    # The tile, enlarged.
    side, zx, zy = 128, 536, 100
    d.text(zx, zy - 14, "one tile, 128×128", bold=True, size=13)
    for i in range(2):
        for j in range(2):
            d.box(zx + j * side / 2, zy + i * side / 2, side / 2, side / 2, "y")
            d.text(
                zx + j * side / 2 + side / 4,
                zy + i * side / 2 + side / 4 + 4,
                f"warp {2 * i + j}",
                anchor="middle",
                size=12,
            )
    d.notes(
        zx,
        zy + side + 24,
        *("four warps, 64×64 each:", "128 registers of a thread", "hold its sums in float32", ""),
        *("a depth tile: 64 bytes of", "a row, 32 numbers in bf16", ""),
        *("three stages of shared", "memory: 3 × (8 + 8) KiB,", "so two blocks share an SM"),
    )
    return d
