"""The frozen weights of a whole model, packed and plain again."""

from __future__ import annotations

import gc

import torch
from torch import nn

from fused_lora import paths
from fused_lora.binary import BINARY
from fused_lora.grouped import conclude
from fused_lora.packed import (
    WEIGHT,
    PacksWeight,
    pack_weight,
    packed_weight,
    plain_parameters,
    unpack_weight,
)
from fused_lora.report import Packed, PackReport
from fused_lora.targets import Skipped

_HELD = "something else refers to its weight (an optimizer, a variable, a view, a graph)"


def pack(model: nn.Module) -> PackReport:
    """Holds the frozen weights of the model's fused layers packed instead of plain, on the CPU.

    Packed, a weight lies as the kernels read it, from beginning to end: in the same memory's size, for
    forward and backward alike. That pays where few rows are computed at a time, as in serving. Layers are
    packed one by one, so at most one of them is held twice.

    Whatever looks at a packed weight finds the plain Parameter, the same object with the same values:
    `.weight`, parameters(), state_dict(), saving, copying, to(), merging, fuse and unfuse, disabled
    adapters, torch.compile. From then on that layer is plain, until `pack` is called again.

    Left plain, and reported with the reason: weights that train, are tied, or that something else refers to
    (an optimizer, a variable, a state dict that is kept); others than float32 and bfloat16 on the CPU; shapes
    without whole panels (out_features in multiples of 32, in_features of 2); layers whose forward needs the
    plain weight as they stand.

    Returns a PackReport; print it. Raises ValueError for a model without fused layers. `unpack` undoes it.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PacksWeight)}
    if not layers:
        raise ValueError("model: no layer of it runs fused; add_lora, or fuse for a PEFT model, makes them")
    conclude()  # what is held for a layer refers to its weight
    report = PackReport()
    owners = _owners(model)
    problem = paths.obstacle("fused", "cpu")
    collected = False
    for name, layer in layers.items():
        linear, transposed = layer.linear_to_pack()
        packed = packed_weight(linear)
        reason = None
        if packed is None:
            reason = problem or layer.needs_plain_weight() or _obstacle(linear, transposed, owners)
        if packed is None and reason is None:
            packed = pack_weight(linear, transposed)
            if packed is None and not collected:
                gc.collect()  # perhaps only garbage refers to it
                collected = True
                packed = pack_weight(linear, transposed)
        if packed is None:
            report.left_plain.append(Skipped(name, reason or _HELD))
        else:
            report.packed.append(Packed(name, packed.nbytes))
    return report


def unpack(model: nn.Module) -> nn.Module:
    """Makes every packed weight of the model plain. Returns `model`."""
    for module in model.modules():
        unpack_weight(module)
    return model


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The names that each Parameter of the model has in it, by the Parameter's id."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in plain_parameters(module).items():
            owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return owners


def _obstacle(linear: nn.Module, transposed: bool, owners: dict[int, list[str]]) -> str | None:
    """Why the weight of `linear` must stay plain, whoever refers to it; None where it need not."""
    parameters = linear._parameters
    weight = parameters.get(WEIGHT)
    if type(parameters) is not dict or type(weight) is not nn.Parameter:
        return "its weight is not a plain Parameter"
    names = owners[id(weight)]
    if len(names) > 1:
        return f"its weight is tied: {' and '.join(names)} are one"
    if weight.requires_grad:
        return "its weight trains"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"its weight is {weight.dtype}"
    if weight.is_inference():
        return "its weight was made in inference mode"
    if weight.is_shared():  # type: ignore[no-untyped-call]
        return "its weight is shared between processes"
    if weight.untyped_storage().nbytes() != weight.nbytes:
        return "its weight is a part of other memory"
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "its weight has hooks"
    out_features, in_features = reversed(weight.shape) if transposed else weight.shape
    assert BINARY.module is not None
    if not BINARY.module.fits_panels(out_features, in_features):
        return f"{in_features}→{out_features} has no whole panels (multiples of 2 → multiples of 32)"
    return None
