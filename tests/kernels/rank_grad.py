"""What test_rank_grad.py and test_rank_down_grad.py share: operands, kinds of products, and the launchers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.emulator import Machine, native
from tests.emulator.devices import device
from tests.kernels import bridge
from tests.kernels.structures import (
    Arithmetic,
    Device,
    MatrixView,
    Partials,
    RankDownGrad,
    RankGrad,
)
from tests.operands import BF16, F16, F32

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FOLDER = CSRC / "kernels" / "rank_grad"
SOURCES = sorted(FOLDER.glob("*.cu"))
# What fp32 sums may lose of the sum of the magnitudes.
ACCUMULATION = 2.0**-20


@dataclass(frozen=True)
class Kind:
    """dtype of the long operand, dtype of the adapters, and what products are made of."""

    dtype: torch.dtype
    adapters: torch.dtype
    arithmetic: Arithmetic

    def __str__(self) -> str:
        return f"{self.dtype}-{self.adapters}-{self.arithmetic.name}".replace("torch.", "")

    @property
    def rank_dtype(self) -> torch.dtype:
        return self.dtype if self.arithmetic == Arithmetic.HALF else F32

    def rounded(self, operand: torch.Tensor) -> torch.Tensor:
        """An operand as the products see it, in float64."""
        if self.arithmetic == Arithmetic.HALF:
            return operand.to(self.dtype).double()
        return tf32(operand) if self.arithmetic == Arithmetic.TF32 else operand.double()


def tf32(operand: torch.Tensor) -> torch.Tensor:
    """To nearest, ties away from zero, in float64."""
    bits = operand.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(F32).double()


KINDS = [
    Kind(BF16, BF16, Arithmetic.HALF),
    Kind(BF16, F32, Arithmetic.HALF),
    Kind(BF16, F32, Arithmetic.HALF_MASTERS),
    Kind(F16, F16, Arithmetic.HALF),
    Kind(F16, F32, Arithmetic.HALF_MASTERS),
    Kind(F32, F32, Arithmetic.TF32),
]


def add_up(launchers: ctypes.CDLL, sums: Sequence[Partials]) -> int:
    return int(launchers.reduce_partials((Partials * len(sums))(*sums), len(sums)))


def load_launchers() -> ctypes.CDLL:
    sources = [FOLDER / "rank_grad.cpp", *SOURCES]
    structures = (RankGrad, RankDownGrad, Partials, Device)
    library = bridge.load("rank_grad_launcher.cpp", sources, structures)
    for name in ("rank_grad_obstacle", "rank_down_grad_obstacle"):
        getattr(library, name).restype = ctypes.c_char_p
    library.packed_rank.restype = ctypes.c_int64
    library.packed_rank.argtypes = [ctypes.c_int, ctypes.c_int64]
    return library


def device_of(name: str) -> Device:
    figures = device(name)
    major, minor = figures.compute_capability
    return Device(10 * major + minor, figures.multiprocessors, figures.shared_memory_per_block_optin)


def seed_of(key: int) -> int:
    return 0x1234_5678_9ABC_DEF0 + key


def draw(rows: int, columns: int, dtype: torch.dtype, key: int, gap: int = 0) -> torch.Tensor:
    """rows×columns with `gap` elements of NaN between the rows."""
    generator = torch.Generator().manual_seed(key)
    whole = torch.full((rows, columns + gap), float("nan"), dtype=dtype)
    view = whole[:, :columns]
    return view.copy_(torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype))


@contextmanager
def far_apart(machine: Machine, x: torch.Tensor, stride: int) -> Iterator[MatrixView]:
    """x on the device with its rows `stride` elements apart; the memory between is never committed."""
    item, columns = x.element_size(), x.shape[1]
    address = machine.allocate(((x.shape[0] - 1) * stride + columns) * item)
    for i, row in enumerate(x):
        native.library().emulator_write(address + i * stride * item, row.data_ptr(), columns * item)
    try:
        yield MatrixView(address, stride, 1)
    finally:
        machine.free(address)


def assert_close(ours: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, what: str) -> None:
    """One rounding of the result, and what fp32 sums of products may lose."""
    assert ours.shape == exact.shape, what
    bound = torch.finfo(ours.dtype).eps / 2 * exact.abs() + 2 * ACCUMULATION * magnitude
    excess = ((ours.double() - exact).abs() - bound).max() if exact.numel() else 0
    assert excess <= 0, f"{what}: {excess} beyond the bound"
