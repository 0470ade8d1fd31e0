"""The structs of csrc/kernels/lora_linear.h and stages.h for ctypes, field by field.

Every bridge exports `<struct>_bytes` for those it takes, and `check_sizes` compares.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch

from fused_lora import reference
from tests.emulator.machine import Buffer


class DType(IntEnum):
    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2


class Arithmetic(IntEnum):
    HALF = 0
    HALF_MASTERS = 1
    TF32 = 2
    FLOAT32 = 3


class MaskDType(IntEnum):
    BOOL = 0
    FLOAT32 = 1
    FLOAT64 = 2
    BFLOAT16 = 3
    FLOAT16 = 4


DTYPE_OF = {torch.float32: DType.FLOAT32, torch.bfloat16: DType.BFLOAT16, torch.float16: DType.FLOAT16}
MASK_DTYPE_OF = {
    torch.bool: MaskDType.BOOL,
    torch.float32: MaskDType.FLOAT32,
    torch.float64: MaskDType.FLOAT64,
    torch.bfloat16: MaskDType.BFLOAT16,
    torch.float16: MaskDType.FLOAT16,
}
_int64, _pointer, _bool, _float, _enum = (
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_bool,
    ctypes.c_float,
    ctypes.c_int32,
)


def _fields(*groups: tuple[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for names, kind in groups for name in names.split())


class MatrixView(ctypes.Structure):
    _fields_ = _fields(("data", _pointer), ("row_stride column_stride", _int64))

    @staticmethod
    def of(buffer: Buffer) -> MatrixView:
        """A placed matrix's view of its device memory."""
        rows, columns = buffer.array.stride()
        return MatrixView(buffer.pointer, rows, columns)

    def transposed(self) -> MatrixView:
        return MatrixView(self.data, self.column_stride, self.row_stride)


class Dropout(ctypes.Structure):
    _fields_ = _fields(
        ("seed", _pointer), ("keep", ctypes.c_uint32), ("scale", _float), ("first_block", _int64)
    )

    @staticmethod
    def none() -> Dropout:
        return Dropout(None, 65536, 1.0)

    @staticmethod
    def of(p: float, seed: int, column_offset: int = 0) -> Dropout:
        """seed: the address of one int64 in device memory."""
        keep, scale = reference.dropout_rule(p)
        return Dropout(seed, keep, scale, column_offset // 8)


class Problem(ctypes.Structure):
    _fields_ = _fields(
        ("rows in_features out_features rank", _int64),
        ("dtype adapter_dtype", _enum),
        ("round_adapters allow_tf32", _bool),
    )


class ForwardCall(ctypes.Structure):
    _fields_ = _fields(
        ("problem", Problem),
        ("x weight lora_a lora_b", MatrixView),
        ("bias", _pointer),
        ("scaling", ctypes.c_double),
        ("dropout", Dropout),
        ("row_adapters base", _pointer),
        ("base_stride", _int64),
        ("y h", _pointer),
        ("h_stride", _int64),
    )


class BackwardCall(ctypes.Structure):
    _fields_ = _fields(
        ("problem", Problem),
        ("dy x weight lora_a lora_b", MatrixView),
        ("h", _pointer),
        ("h_stride", _int64),
        ("scaling", ctypes.c_double),
        ("dropout", Dropout),
        ("row_adapters", _pointer),
        ("adds_to_dx", _bool),
        ("dx dlora_a dlora_b", _pointer),
    )


class Device(ctypes.Structure):
    _fields_ = _fields(("compute_capability multiprocessors shared_memory_per_block", ctypes.c_int))


class MaskCall(ctypes.Structure):
    _fields_ = _fields(
        ("seed", _pointer),
        ("keep", ctypes.c_uint32),
        ("rows columns row_offset column_offset", _int64),
        ("dtype", _enum),
        ("out", _pointer),
    )


class PackFactor(ctypes.Structure):
    _fields_ = _fields(
        ("factor", MatrixView),
        ("factor_dtype", _enum),
        ("extent rank", _int64),
        ("depth_contiguous", _bool),
        ("stride", _int64),
        ("packed", _pointer),
    )


class RankDown(ctypes.Structure):
    _fields_ = _fields(
        ("arithmetic dtype factor_dtype", _enum),
        ("rows columns rank", _int64),
        ("x factor", MatrixView),
        ("alpha", _float),
        ("row_adapters", _pointer),
        ("dropout", Dropout),
        ("out", _pointer),
        ("out_stride", _int64),
        ("packed", _pointer),
        ("partner", PackFactor),
    )


class LoraGemm(ctypes.Structure):
    _fields_ = _fields(
        ("arithmetic dtype", _enum),
        ("rows depth columns rank", _int64),
        ("x weight", MatrixView),
        ("bias row_adapters", _pointer),
        ("dropout", Dropout),
        ("addend", _pointer),
        ("addend_stride", _int64),
        ("out", _pointer),
        ("out_stride", _int64),
        ("packed_low packed_factor", _pointer),
        ("packed_factor_stride", _int64),
        ("low", _pointer),
        ("low_stride", _int64),
        ("factor", MatrixView),
        ("factor_dtype", _enum),
    )


class RankGrad(ctypes.Structure):
    _fields_ = _fields(
        ("arithmetic dtype", _enum),
        ("rows columns rank", _int64),
        ("x", MatrixView),
        ("low", _pointer),
        ("low_stride", _int64),
        ("alpha", _float),
        ("row_adapters", _pointer),
        ("dropout", Dropout),
        ("transposed", _bool),
        ("splits", ctypes.c_int),
        ("partials out", _pointer),
        ("out_dtype", _enum),
    )


class RankDownGrad(ctypes.Structure):
    _fields_ = _fields(("down", RankDown), ("grad", RankGrad))


class Partials(ctypes.Structure):
    _fields_ = _fields(
        ("partials", _pointer),
        ("splits", ctypes.c_int),
        ("count", _int64),
        ("out", _pointer),
        ("out_dtype", _enum),
    )


def check_sizes(library: ctypes.CDLL, structures: Sequence[type[ctypes.Structure]]) -> None:
    for structure in structures:
        size = getattr(library, f"{structure.__name__}_bytes")
        size.restype = ctypes.c_size_t
        ours, theirs = ctypes.sizeof(structure), size()
        assert ours == theirs, f"{structure.__name__} has {theirs} bytes in C++, {ours} in structures.py"
