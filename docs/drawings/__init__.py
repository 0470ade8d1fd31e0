"""The manual's drawings: python -m docs.drawings writes each as an SVG into this folder.

They are made by a program so that what they show stays true: bytes of launches and measured figures come from
where the project states them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from docs.drawings import backward, layers, panels, stages, tile, traffic
from docs.drawings.canvas import Drawing

FOLDER = Path(__file__).parent
DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "tile": tile.draw,
    "stages": stages.draw,
    "traffic": traffic.draw,
    "backward": backward.draw,
    "panels": panels.draw,
    "layers": layers.draw,
}
