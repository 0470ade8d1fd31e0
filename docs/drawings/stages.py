"""How depth tiles pass through the stages of shared memory."""

from __future__ import annotations

from docs.drawings.canvas import Drawing

STAGES, STEPS = 3, 8
LEFT, WIDE, HIGH = 126, 72, 30


def draw() -> Drawing:
    d = Drawing(
        736,
        262,
        "Three stages of shared memory",
        "While a tile is multiplied the next one but one is copied into the stage that the tile before left. "
        "The rank's tile goes through first.",
    )
    d.heading(
        "Three stages of shared memory", "a step multiplies a tile while the tile two further on is under way"
    )
    d.text(20, 95, "copy begins")
    d.text(20, 135, "multiplied")
    ahead = STAGES - 1
    for step in range(STEPS):
        x = LEFT + step * WIDE
        _tile(d, x, 76, step - 1)
        if step >= ahead:
            _tile(d, x, 116, step - 1 - ahead)
    masked = LEFT + (ahead + 1) * WIDE - 2
    d.line((masked, 112), (masked, 172), dashed=True)
    d.text(masked + 6, 166, "backward: the mask falls on the sums here, of g·A alone", "m-ink", size=12)
    d.text(20, 210, "in the stages")
    for stage in range(STAGES):
        x = LEFT + stage * 194
        d.box(x, 191, 180, HIGH)
        kept = [_name(tile) for tile in range(-1, STEPS) if (tile + 1) % STAGES == stage]
        d.text(x + 90, 210, ", ".join(kept[:3]) + ", …", anchor="middle", size=12)
    words = "A stage is filled again when every warp has passed the barrier behind its last read of it."
    d.text(LEFT, 243, words, "quiet", size=12)
    return d


def _tile(d: Drawing, x: float, y: float, tile: int) -> None:
    d.box(x, y, WIDE - 4, HIGH, "r" if tile < 0 else "x")
    d.text(x + (WIDE - 4) / 2, y + 20, _name(tile), anchor="middle", size=12)


def _name(tile: int) -> str:
    return "rank" if tile < 0 else f"tile {tile}"
