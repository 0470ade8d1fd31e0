"""The shapes that the GPU benchmarks and the predictions go over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One adapted linear: rows×in_features → rows×out_features."""

    name: str
    rows: int
    in_features: int
    out_features: int
    rank: int = 16

    def __str__(self) -> str:
        return f"{self.rows}×{self.in_features}→{self.out_features}"


# As the LoRAFusion paper measures (arXiv 2510.00206): square weights of 7B to 70B models.
TRAINING = tuple(
    Shape(f"square {width}", rows, width, width)
    for width in (4096, 5120, 8192)
    for rows in (2048, 4096, 6144, 8192)
)

# The projections of Llama-2-7B and of SmolLM2-135M, at the rows of decoding and of short batches.
PROJECTIONS = (
    ("Llama-2-7B qkv, o", 4096, 4096),
    ("Llama-2-7B gate, up", 4096, 11008),
    ("Llama-2-7B down", 11008, 4096),
    ("SmolLM2-135M q, o", 576, 576),
    ("SmolLM2-135M gate, up", 576, 1536),
    ("SmolLM2-135M down", 1536, 576),
)
DECODE_ROWS = (1, 4, 16, 64)
DECODE = tuple(Shape(name, rows, k, n) for name, k, n in PROJECTIONS for rows in DECODE_ROWS)
