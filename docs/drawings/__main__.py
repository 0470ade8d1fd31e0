"""Writes the drawings anew."""

from docs.drawings import DRAWINGS, FOLDER

for name, draw in DRAWINGS.items():
    (FOLDER / f"{name}.svg").write_text(str(draw()), encoding="utf-8")
