"""What is measured: the grid of layers and the whole model, as a list of cases in the order of running."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product

FORWARD, BOTH = "forward", "forward + backward"
STEP, DECODING = "training step", "greedy decoding"
MIXED, SHARED = "forward of a mixed batch", "forward + backward of layers of one x"
DTYPES = ("float32", "bfloat16")
RANKS = (8, 16, 64)
ROWS = (1, 16, 128, 512, 2048)
DECODE_ROWS = 16  # up to here a forward is one of decoding
DROPOUTS = (0.0, 0.1)
SMOLLM2, LLAMA = "SmolLM2-135M", "Llama-2-7B"
TARGETS = ("o_proj", "o_proj+fc2", "qkv+o_proj", "all")
SHORT_TARGETS = ("o_proj", "all")
BATCH, TOKENS = 4, 128  # of a training step
PROMPT, DECODED = 16, 32  # tokens
ADAPTERS, ROWS_OF_ADAPTER = 8, 8  # of a mixed batch
SHARED_OUT = (576, 192, 192)  # out_features of SmolLM2's q, k and v
SHARED_ROWS = (1, 16, 128, 512)


@dataclass(frozen=True)
class Layer:
    """A linear, in_features→out_features; for the whole model its target set, and no sizes."""

    model: str
    name: str
    in_features: int = 0
    out_features: int = 0

    def __str__(self) -> str:
        return f"{self.in_features}→{self.out_features}" if self.in_features else self.name


LAYERS = (
    Layer(SMOLLM2, "q, o", 576, 576),
    Layer(SMOLLM2, "gate, up", 576, 1536),
    Layer(SMOLLM2, "down", 1536, 576),
    Layer(SMOLLM2, "k, v", 576, 192),
    Layer(LLAMA, "qkv, o", 4096, 4096),
    Layer(LLAMA, "gate, up", 4096, 11008),
    Layer(LLAMA, "down", 11008, 4096),
)


@dataclass(frozen=True)
class Case:
    """One comparison: every side of it runs interleaved with the others."""

    threads: int
    half: str  # FORWARD or BOTH of a layer, MIXED or SHARED, STEP or DECODING of the model
    rank: int
    dtype: str
    dropout: float
    layer: Layer
    rows: int  # of x: tokens of a batch

    @property
    def whole_model(self) -> bool:
        return self.half in (STEP, DECODING)

    @property
    def of_one_layer(self) -> bool:
        return self.half in (FORWARD, BOTH)

    @property
    def frozen_flops(self) -> float:
        """Of the frozen products of a layer: y, and dx in a backward."""
        halves = 1 if self.half in (FORWARD, MIXED) else 2
        return 2.0 * halves * self.rows * self.layer.in_features * self.layer.out_features

    @property
    def flops(self) -> float:
        """All that an adapted layer needs: the frozen products, of h and y, then of g, dx, dA and dB."""
        products = 1 if self.half in (FORWARD, MIXED) else 3
        layers = len(SHARED_OUT) if self.half == SHARED else 1
        sizes = layers * self.layer.in_features + self.layer.out_features
        return self.frozen_flops + 2.0 * products * self.rows * self.rank * sizes

    def __str__(self) -> str:
        what = f"{self.layer.model} {self.layer}"
        if self.half != DECODING:
            what += f", {self.rows} row{'s' if self.rows > 1 else ''}"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.half}, {what}, r={self.rank}, {self.dtype}, dropout {self.dropout:g}, {threads}"

    def cells(self) -> dict[str, object]:
        """As columns of a table of results."""
        layer = asdict(self.layer)
        layer["layer"] = layer.pop("name")
        return {**{key: value for key, value in vars(self).items() if key != "layer"}, **layer}

    @staticmethod
    def of_cells(cells: dict[str, str]) -> Case:
        sizes = int(cells["in_features"]), int(cells["out_features"])
        return Case(
            int(cells["threads"]),
            cells["half"],
            int(cells["rank"]),
            cells["dtype"],
            float(cells["dropout"]),
            Layer(cells["model"], cells["layer"], *sizes),
            int(cells["rows"]),
        )


def layer_cases(
    layers: Iterable[Layer],
    ranks: Sequence[int],
    rows: Sequence[int],
    dtypes: Sequence[str],
    dropouts: Sequence[float],
    threads: Sequence[int],
    halves: Sequence[str] = (FORWARD, BOTH),
) -> list[Case]:
    """The grid. One number of threads after the other, so that no thread is left over from the last case;
    then by layer and rows, small ones first, so that an interrupted run has whole figures to show."""
    grid = product(threads, ranks, layers, rows, dtypes, dropouts, halves)
    return [Case(t, half, r, dtype, p, layer, m) for t, r, layer, m, dtype, p, half in grid]


def model_cases(
    targets: Iterable[str], ranks: Sequence[int], dtypes: Sequence[str], threads: int
) -> list[Case]:
    halves = ((STEP, BATCH * TOKENS), (DECODING, 1))
    grid = product(ranks, dtypes, targets, halves)
    return [
        Case(threads, half, r, dtype, 0.0, Layer(SMOLLM2, names), m) for r, dtype, names, (half, m) in grid
    ]


def batch_cases(ranks: Sequence[int], dtypes: Sequence[str], threads: Sequence[int]) -> list[Case]:
    """Rows of several adapters, and layers that share their input."""
    mixed = Layer(SMOLLM2, f"q, o by {ADAPTERS} adapters", 576, 576)
    shared = Layer(SMOLLM2, "q, k and v", 576, sum(SHARED_OUT))
    grid = [(MIXED, mixed, ADAPTERS * ROWS_OF_ADAPTER), *((SHARED, shared, rows) for rows in SHARED_ROWS)]
    return [
        Case(t, half, r, dtype, 0.0, layer, m)
        for t, r, dtype, (half, layer, m) in product(threads, ranks, dtypes, grid)
    ]
