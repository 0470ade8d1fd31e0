"""Which path and which kernels a call takes, and why, in words."""

from __future__ import annotations

from typing import Any

import torch

from fused_lora import choices, paths
from fused_lora.binary import BINARY
from fused_lora.grouped import how_computed

# Compute capability, multiprocessors, and shared memory that a block may ask for: what plans depend on.
GPUS = {
    "A100": (80, 108, 163 << 10),
    "L4": (89, 58, 99 << 10),
    "RTX 4090": (89, 128, 99 << 10),
    "H100": (90, 132, 227 << 10),
    "B200": (100, 148, 227 << 10),
    "RTX 5090": (120, 170, 99 << 10),
}
_HALF = (torch.bfloat16, torch.float16)


def explain(
    device: torch.device | str = "cpu",
    *,
    rows: int | None = None,
    in_features: int | None = None,
    out_features: int | None = None,
    rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype | None = None,
    autocast: bool = False,
    bias: bool = False,
    dropout: bool = False,
    weight_transposed: bool = False,
    weight_packed: bool = False,
    adapters: int = 1,
    layers: int = 1,
    adapter_alone: bool = False,
    gpu: str = "A100",
) -> str:
    """Which path a call on `device` takes now, and why, in one line; with a shape, which kernels as well.

    Args:
        rows: of x, all leading dimensions together. Given together with in_features and out_features.
        rank: of the adapter.
        dtype: of x and the weight.
        adapter_dtype: of A and B; float32 masters where none is given and dtype is of 16 bits.
        autocast: whether masters are rounded, as under autocast.
        weight_transposed: whether the weight is stored in_features×out_features, as Conv1D does.
        weight_packed: whether the weight is packed (fused_lora.pack), on the CPU.
        adapters: of a mixed batch (use_adapters, adapter_names), among which the rows are divided; each of
            this rank.
        layers: that share x (fused_lora.group), each of these sizes.
        adapter_alone: whether the frozen layer computes by itself, as a quantised one does, and the adapter
            is added in place to what it gives (by `lora_add_`): then there is no weight.
        gpu: whose figures plans are made for where no GPU is at hand: "A100", "L4", "RTX 4090", "H100",
            "B200" or "RTX 5090".

    Raises ValueError and TypeError for what does not fit, by the argument's name.
    """
    device = torch.device(device)
    line = _path(device)
    for name, count in (("adapters", adapters), ("layers", layers)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"explain: {name} must be a number ≥ 1, got {count}")
    if adapter_alone and (adapters > 1 or layers > 1):
        raise ValueError(
            f"explain: adapter_alone is of one adapter and one layer, got {adapters=} and {layers=}"
        )
    if adapters > 1 and layers > 1:
        raise ValueError(
            f"explain: layers: a mixed batch ({adapters} adapters) computes each by itself, got {layers}"
        )
    told = []
    if adapters > 1:
        told.append(_mixed(adapters, line))
    if layers > 1:
        told.append(f"{layers} layers of one x: {how_computed(layers, rows, dropout, autocast)}")
    shape = {"rows": rows, "in_features": in_features, "out_features": out_features}
    if all(size is None for size in shape.values()):
        return "\n".join([line, *told])
    for name, size in [*shape.items(), ("rank", rank)]:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"explain: {name} must be a number ≥ 1, got {size}")
    if device.type not in ("cpu", "cuda") or line.startswith("reference"):
        return "\n".join([line, *told])
    if dtype == torch.float64 or (device.type == "cpu" and dtype == torch.float16):
        line = f"composed: there are no fused kernels for {dtype} tensors on {device.type!r}"
        return "\n".join([line, *told])
    if dtype not in (torch.float32, *_HALF):
        raise TypeError(f"explain: dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    adapter_dtype = adapter_dtype or torch.float32
    if adapter_dtype not in (dtype, torch.float32):
        raise TypeError(f"explain: adapter_dtype must be {dtype} or torch.float32, got {adapter_dtype}")
    assert BINARY.module is not None
    if weight_packed and (device.type != "cpu" or not BINARY.module.fits_panels(out_features, in_features)):
        raise ValueError(
            f"explain: weight_packed: a weight of {in_features}→{out_features} on {device} cannot be packed"
        )
    if device.type == "cpu":
        if line.startswith("composed"):
            return "\n".join([line, *told])
        threads = torch.get_num_threads()
        classes: dict[str, tuple[str, bool]] = BINARY.module.explain_cpu_shape(
            **shape,
            rank=rank * adapters,
            bfloat16=dtype == torch.bfloat16,
            masters=adapter_dtype != dtype,
            round_adapters=autocast,
            bias=bias,
            dropout=dropout,
            weight_transposed=weight_transposed,
            weight_packed=weight_packed,
            adapter_alone=adapter_alone,
            threads=threads,
            mixed=adapters if adapters > 1 else 0,
        )
        kernels = f"kernels: {BINARY.module.cpu_level()}, {threads} threads"
        return "\n".join([line, *told, kernels, *_choices("cpu", classes)])
    if adapters > 1:
        return "\n".join([line, *told, "kernels: plans are told for one adapter"])
    label, figures, found_device = _gpu(device, gpu)
    found: dict[str, tuple[str, str, bool]] = BINARY.module.explain_shape(
        **shape,
        rank=rank,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        round_adapters=autocast,
        bias=bias,
        dropout=dropout,
        weight_transposed=weight_transposed,
        adapter_alone=adapter_alone,
        figures=figures,
    )
    lines = [line, *told, f"kernels, for {label}:"]
    lines += [f"  {half}: {plan}" for half, (_, plan, _) in found.items()]
    lines += _choices(found_device, {half: (shape, fast) for half, (shape, _, fast) in found.items()})
    return "\n".join(lines)


def _path(device: torch.device) -> str:
    asked = paths.asked()
    if asked != "auto":
        problem = paths.obstacle(asked, device.type, device.index)
        return f"{asked}: asked for" + (f", but {problem}" if problem else "")
    problem = paths.obstacle("composed", device.type, device.index)
    if problem is not None:
        return f"reference: {problem}"
    problem = paths.obstacle("fused", device.type, device.index)
    if problem is not None:
        return f"composed: {problem}"
    return "fused or composed: whichever is faster, once for each class of shapes (fused_lora.choices)"


def _mixed(adapters: int, path: str) -> str:
    by = "the adapters one after another" if path.startswith("reference") else "one call for all rows"
    return (
        f"a mixed batch of {adapters} adapters: {by} (lora_linear_mixed); where they differ in dtype, or in "
        "training in dropout, the adapters by themselves, in plain torch"
    )


def _gpu(device: torch.device, name: str) -> tuple[str, tuple[int, int, int], str | None]:
    """A name, its figures, and the GPU that has them as choices know it; None where none is at hand."""
    if torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
        module: Any = BINARY.module
        return torch.cuda.get_device_name(index), module.device_figures(index), f"cuda:{index}"
    if name not in GPUS:
        raise ValueError(f"explain: gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return f"the figures of an {name} (no GPU is at hand)", GPUS[name], None


def _choices(device: str | None, classes: dict[str, tuple[str, bool]]) -> list[str]:
    """What auto does with the classes of a forward and a backward; nothing where a path was asked for."""
    if paths.asked() != "auto":
        return []
    return ["choices:", *(f"  {half}: {_choice(device, *what)}" for half, what in classes.items())]


def _choice(device: str | None, shape: str, presumed_faster: bool) -> str:
    if torch.are_deterministic_algorithms_enabled():
        choice: choices.Choice | None = choices.untimed(presumed_faster, "deterministic algorithms")
    else:
        choice = None if device is None else choices.made(device, shape)
        if choice is None and choices.several_ranks():
            choice = choices.untimed(presumed_faster, "several ranks")
    return f"{choice.path}: {choice.reason}" if choice else "made at the first call, by timing both"
