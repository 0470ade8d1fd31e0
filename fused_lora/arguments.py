"""What the op demands of its arguments, for the plain-torch path. The compiled path checks the same rules
with the same words (csrc/torch/checks.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)
MASK_LANES = 8  # columns of a dropout mask that one Philox call decides
PANEL_ROWS = 32  # rows of a weight that lie together where it is packed
_LINEAR = "lora_linear"
_ADD = "lora_add"


def check_arguments(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    column_offset: int = 0,
) -> None:
    """Raises ValueError for a shape, device or probability, TypeError for a dtype."""
    _check_base_shapes(x, weight)
    _check_adapter_shapes(weight, lora_a, lora_b, "lora_a", "lora_b")
    _check_base_dtypes(x, weight)
    _check_adapter_dtypes(x, lora_a, lora_b, "lora_a", "lora_b")
    for tensor, name in ((weight, "weight"), (lora_a, "lora_a"), (lora_b, "lora_b")):
        _device(tensor, name, x)
    _check_dropout(x, dropout_p, seed)
    _check_column_offset(column_offset)
    _check_x(x, weight, bias)


def check_mixed_arguments(
    x: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    adapter_index: Tensor,
    bias: Tensor | None,
    scaling: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    dtypes: bool = True,
) -> None:
    """Raises ValueError for a shape, device or probability, TypeError for a dtype, and for an index on the
    CPU IndexError. dtypes: whether those of x, the weight and the adapters must fit each other."""
    _check_base_shapes(x, weight)
    if not lora_a:
        raise ValueError("lora_linear: lora_a must have at least 1 entry, got none")
    for values, name in ((lora_b, "lora_b"), (scaling, "scaling")):
        check_count("lora_linear", values, name, len(lora_a), "lora_a")
    if dtypes:
        _check_base_dtypes(x, weight)
    _device(weight, "weight", x)
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        names = f"lora_a[{i}]", f"lora_b[{i}]"
        _check_adapter_shapes(weight, a, b, *names)
        if dtypes:
            _check_adapter_dtypes(x, a, b, *names)
            _dtype(a, names[0], lora_a[0].dtype, "lora_a[0]")
        _device(a, names[0], x)
        _device(b, names[1], x)
    if adapter_index.dtype != torch.int64:
        raise TypeError(f"lora_linear: adapter_index must be torch.int64, got {adapter_index.dtype}")
    _device(adapter_index, "adapter_index", x)
    dims = adapter_index.dim()
    if dims >= x.dim() or adapter_index.shape != x.shape[:dims]:
        raise ValueError(
            f"lora_linear: adapter_index must have the first dimensions of x ({list(x.shape)}), got shape "
            f"{list(adapter_index.shape)}"
        )
    _check_dropout(x, dropout_p, seed)
    _check_x(x, weight, bias, dtypes)
    if adapter_index.device.type == "cpu" and not torch.compiler.is_compiling():
        beyond = adapter_index[adapter_index >= len(lora_a)]
        if beyond.numel():
            raise IndexError(
                f"lora_linear: adapter_index must be below {len(lora_a)} (the adapters given), or negative "
                f"for none, got {int(beyond[0])}"
            )


def check_add_arguments(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    column_offset: int = 0,
    dtypes: bool = True,
) -> None:
    """As check_arguments, of lora_add. dtypes: whether those of x and the adapter must fit each other."""
    if x.dim() < 1:
        raise ValueError(f"{_ADD}: x must have at least 1 dimension, got shape {list(x.shape)}")
    _dims(lora_a, "lora_a", 2, "rank×in_features", _ADD)
    _dims(lora_b, "lora_b", 2, "out_features×rank", _ADD)
    _size(lora_b, "lora_b", 1, "rank", lora_a.shape[0], "lora_a", op=_ADD)
    if lora_a.shape[0] < 1:
        raise ValueError(f"{_ADD}: lora_a must have rank ≥ 1, got shape {list(lora_a.shape)}")
    if dtypes:
        _float(x, "x", _ADD)
        _check_adapter_dtypes(x, lora_a, lora_b, "lora_a", "lora_b", _ADD)
    _device(lora_a, "lora_a", x, _ADD)
    _device(lora_b, "lora_b", x, _ADD)
    _check_dropout(x, dropout_p, seed, _ADD)
    _check_column_offset(column_offset, _ADD)
    _size(x, "x", x.dim() - 1, "in_features", lora_a.shape[1], "lora_a", "-1", _ADD)
    if base.dim() != x.dim():
        shape = list(base.shape)
        raise ValueError(f"{_ADD}: base must have as many dimensions as x ({x.dim()}), got shape {shape}")
    for dim in range(x.dim() - 1):
        _size(base, "base", dim, "rows", x.shape[dim], "x", op=_ADD)
    _size(base, "base", base.dim() - 1, "out_features", lora_b.shape[0], "lora_b", "-1", _ADD)
    _float(base, "base", _ADD)
    _device(base, "base", x, _ADD)


def _check_base_shapes(x: Tensor, weight: Tensor) -> None:
    if x.dim() < 1:
        raise ValueError(f"lora_linear: x must have at least 1 dimension, got shape {list(x.shape)}")
    _dims(weight, "weight", 2, "out_features×in_features")


def _check_adapter_shapes(weight: Tensor, lora_a: Tensor, lora_b: Tensor, name_a: str, name_b: str) -> None:
    _dims(lora_a, name_a, 2, "rank×in_features")
    _dims(lora_b, name_b, 2, "out_features×rank")
    out_features, in_features = weight.shape
    _size(lora_a, name_a, 1, "in_features", in_features, "weight")
    _size(lora_b, name_b, 0, "out_features", out_features, "weight")
    _size(lora_b, name_b, 1, "rank", lora_a.shape[0], name_a)
    if lora_a.shape[0] < 1:
        raise ValueError(f"lora_linear: {name_a} must have rank ≥ 1, got shape {list(lora_a.shape)}")


def _check_base_dtypes(x: Tensor, weight: Tensor) -> None:
    _float(x, "x")
    _dtype(weight, "weight", x.dtype, "x")


def _check_adapter_dtypes(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, name_a: str, name_b: str, op: str = _LINEAR
) -> None:
    if lora_a.dtype != x.dtype and not (lora_a.dtype == torch.float32 and x.dtype in _HALF):
        masters = " or torch.float32 (masters)" if x.dtype in _HALF else ""
        raise TypeError(f"{op}: {name_a} must be {x.dtype} (as x){masters}, got {lora_a.dtype}")
    _dtype(lora_b, name_b, lora_a.dtype, name_a, op)


def _check_dropout(x: Tensor, dropout_p: float, seed: Tensor | None, op: str = _LINEAR) -> None:
    check_probability(op, dropout_p, "dropout_p")
    if dropout_p > 0.0:
        if seed is None:
            raise ValueError(f"{op}: seed must be given with dropout_p > 0")
        _seed(op, seed)
        _device(seed, "seed", x, op)


def _check_column_offset(column_offset: int, op: str = _LINEAR) -> None:
    if column_offset < 0 or column_offset % MASK_LANES:
        raise ValueError(
            f"{op}: column_offset must be a multiple of {MASK_LANES} and ≥ 0, got {column_offset}"
        )


def _check_x(x: Tensor, weight: Tensor, bias: Tensor | None, dtypes: bool = True) -> None:
    out_features, in_features = weight.shape
    _size(x, "x", x.dim() - 1, "in_features", in_features, "weight", dim_name="-1")
    if bias is not None:
        _dims(bias, "bias", 1, "out_features")
        _size(bias, "bias", 0, "out_features", out_features, "weight")
        if dtypes:
            _dtype(bias, "bias", x.dtype, "x")
        _device(bias, "bias", x)


def check_packed(weight: Tensor) -> None:
    """Raises ValueError for a device or a shape, TypeError for a dtype, that no packed weight has."""
    if weight.device.type not in ("cpu", "meta"):
        raise ValueError(f"lora_linear: packed weights serve on the CPU alone, got one on {weight.device}")
    if weight.dtype not in (torch.float32, torch.bfloat16):
        allowed = "torch.float32 or torch.bfloat16"
        raise TypeError(f"lora_linear: a packed weight must be {allowed}, got {weight.dtype}")
    together = 1 if weight.dtype == torch.float32 else 2
    width = PANEL_ROWS * together
    if weight.dim() != 3 or weight.shape[2] != width:
        raise ValueError(
            f"lora_linear: a packed weight in {weight.dtype} must be out_features/32 × in_features/{together}"
            f" × {width}, as pack_weight makes it, got shape {list(weight.shape)}"
        )
    if not weight.is_contiguous():
        strides = list(weight.stride())
        raise ValueError(f"lora_linear: a packed weight must be contiguous, got strides {strides}")
    if weight.requires_grad:
        raise ValueError(
            "lora_linear: weight is packed, and packed weights are frozen: unpack it to train it"
        )


def check_mask_arguments(
    seed: Tensor, rows: int, columns: int, p: float, row_offset: int, column_offset: int
) -> None:
    """Raises ValueError for a size, an offset or a probability, TypeError for the seed's dtype."""
    _seed("dropout_mask", seed)
    check_probability("dropout_mask", p, "p")
    counts = {"rows": rows, "columns": columns, "row_offset": row_offset, "column_offset": column_offset}
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"dropout_mask: {name} must be ≥ 0, got {count}")


def check_probability(op: str, p: float, name: str) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {p:g}")


def _seed(op: str, seed: Tensor) -> None:
    if seed.dtype != torch.int64:
        raise TypeError(f"{op}: seed must be torch.int64, got {seed.dtype}")
    if seed.numel() != 1:
        raise ValueError(f"{op}: seed must hold one number, got shape {list(seed.shape)}")


def _dims(tensor: Tensor, name: str, dims: int, meaning: str, op: str = _LINEAR) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{op}: {name} must be {dims}-D ({meaning}), got shape {list(tensor.shape)}")


def _size(
    tensor: Tensor,
    name: str,
    dim: int,
    meaning: str,
    expected: int,
    source: str,
    dim_name: str = "",
    op: str = _LINEAR,
) -> None:
    if tensor.shape[dim] != expected:
        raise ValueError(
            f"{op}: {name} must have {meaning} = {expected} (as {source}) in dimension "
            f"{dim_name or dim}, got shape {list(tensor.shape)}"
        )


def _float(tensor: Tensor, name: str, op: str = _LINEAR) -> None:
    if tensor.dtype not in _DTYPES:
        allowed = "torch.float32, torch.float64, torch.bfloat16 or torch.float16"
        raise TypeError(f"{op}: {name} must be {allowed}, got {tensor.dtype}")


def _dtype(tensor: Tensor, name: str, expected: torch.dtype, source: str, op: str = _LINEAR) -> None:
    if tensor.dtype != expected:
        raise TypeError(f"{op}: {name} must be {expected} (as {source}), got {tensor.dtype}")


def _device(tensor: Tensor, name: str, x: Tensor, op: str = _LINEAR) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} (as x), got {tensor.device}")


def check_count(op: str, values: Sequence[object], name: str, expected: int, source: str) -> None:
    """Raises ValueError for a list that has not one value for each entry of another, the source."""
    if len(values) != expected:
        entries = "entry" if expected == 1 else "entries"
        raise ValueError(f"{op}: {name} must have {expected} {entries} (as {source}), got {len(values)}")
