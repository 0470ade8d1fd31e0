"""SVG by hand: boxes in the colours of the operands, arrows and text, for light and for dark pages."""

from __future__ import annotations

from html import escape

# What a box holds, and its (fill, line) on light and on dark ground.
COLOURS = {
    "x": (("#dbe8fb", "#2f6fce"), ("#1d3557", "#7fb0f5")),  # x and dx
    "y": (("#fde6d0", "#c8691b"), ("#54341a", "#f0a35e")),  # y and dy
    "w": (("#e6e7ea", "#7a808a"), ("#383b41", "#a3a9b3")),  # W
    "r": (("#d5f0df", "#22834f"), ("#17432c", "#62c98f")),  # of the rank's size: A, B, h, g
    "m": (("#f1dcf3", "#9a3fa5"), ("#4a2350", "#d68be0")),  # the dropout mask and its seed
}
# ink, quiet ink, ground, edge
_LIGHT = ("#1f2328", "#5b636e", "#fdfdfc", "#d9dce1")
_DARK = ("#e8e8e8", "#a9b1bb", "#17191c", "#34383e")
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def style(dark: bool = False) -> str:
    """The rules of one scheme."""
    ink, quiet, ground, edge = _DARK if dark else _LIGHT
    rules = [
        f".ground{{fill:{ground};stroke:{edge}}}",
        f"text{{fill:{ink}}}.quiet{{fill:{quiet}}}",
        f".line{{stroke:{quiet}}}.head{{fill:{quiet}}}",
        f".plain{{fill:none;stroke:{quiet}}}",
    ]
    for name, schemes in COLOURS.items():
        fill, line = schemes[dark]
        rules.append(f".{name}{{fill:{fill};stroke:{line}}}.{name}-ink{{fill:{line}}}")
        rules.append(f".{name}-line{{stroke:{line}}}")
    return "".join(rules)


class Drawing:
    """A picture with a ground of its own, so that it can be read on a page of either kind."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self.size = (width, height)
        self._about = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        self._parts: list[str] = []

    def heading(self, words: str, note: str) -> None:
        self.text(20, 30, words, bold=True, size=14)
        self.text(20, 50, note, "quiet", size=12)

    def box(
        self, x: float, y: float, width: float, height: float, kind: str = "plain", *, dashed: bool = False
    ) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        at = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"'
        self._parts.append(f'<rect class="{kind}" {at}{dash}/>')

    def text(
        self,
        x: float,
        y: float,
        words: str,
        kind: str = "",
        *,
        anchor: str = "start",
        size: float = 13,
        bold: bool = False,
    ) -> None:
        """kind: "quiet", or "x-ink" and the like."""
        looks = f'text-anchor="{anchor}" font-size="{size:g}"' + (' font-weight="600"' if bold else "")
        of = f' class="{kind}"' if kind else ""
        self._parts.append(f'<text{of} x="{x:g}" y="{y:g}" {looks}>{escape(words)}</text>')

    def notes(self, x: float, y: float, *lines: str) -> None:
        for i, words in enumerate(lines):
            self.text(x, y + 18 * i, words, "quiet", size=12)

    def line(self, *points: tuple[float, float], dashed: bool = False, kind: str = "") -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(f'<polyline class="{kind and kind + "-"}line" points="{path}" fill="none"{dash}/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line of horizontal and vertical parts with a head at its end."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        self.line(*points[:-1], (x - 5 * dx, y - 5 * dy))
        back, side = (x - 7 * dx, y - 7 * dy), (3.5 * dy, 3.5 * dx)
        left, right = ((back[0] + sign * side[0], back[1] + sign * side[1]) for sign in (-1, 1))
        head = " ".join(f"{px:g},{py:g}" for px, py in ((x, y), left, right))
        self._parts.append(f'<polygon class="head" points="{head}"/>')

    def __str__(self) -> str:
        width, height = self.size
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" role="img" font-family="{escape(_FONT)}">',
                self._about,
                f"<style>{style()}",
                f"@media(prefers-color-scheme:dark){{{style(dark=True)}}}</style>",
                f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
                *self._parts,
                "</svg>\n",
            ]
        )
