"""Which layers of a model share their input, told before they are called."""

from __future__ import annotations

from torch import nn

from fused_lora.grouped import GROUP, Group, Groupable, conclude
from fused_lora.report import GroupReport
from fused_lora.targets import Skipped, role_of

# Modules that do not call what they hold: who does, calls each with a tensor of its own.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def group(model: nn.Module) -> GroupReport:
    """Lets layers of the model that share their input be computed by one call; `add_lora` and `fuse` do it.

    Those are expected to that are attributes of one module, have one role (query, key and value; gate and
    up; fused_lora.targets) and as many in_features. Where a forward shows otherwise they part, and stay so
    until `group` is called again. Returns what is grouped now; print it. `ungroup` undoes it.
    """
    ungroup(model)
    for path, parent in model.named_modules():
        if isinstance(parent, _CONTAINERS):
            continue
        kin: dict[tuple[object, ...], list[Groupable]] = {}
        for name, child in parent.named_children():
            if not isinstance(child, Groupable) or child.why_base_not_fused() is not None:
                continue
            if GROUP not in child.__dict__:
                role = role_of(f"{path}.{name}" if path else name)
                kin.setdefault((type(child), child.in_features, role), []).append(child)
        for layers in kin.values():
            if len(layers) > 1:
                Group(layers)
    return groups(model)


def ungroup(model: nn.Module) -> nn.Module:
    """Lets every layer of the model be computed by itself. Returns `model`."""
    conclude()
    for module in model.modules():
        module.__dict__.pop(GROUP, None)
    return model


def set_grouped(model: nn.Module, grouped: bool) -> list[tuple[str, ...]]:
    """`group` or `ungroup`; the names of the layers of each group."""
    return group(model).groups if grouped else groups(ungroup(model)).groups


def groups(model: nn.Module) -> GroupReport:
    """Which layers of the model are computed together now, and which are not any more and why. print() it."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, Groupable)}
    report = GroupReport()
    seen: set[int] = set()
    for layer, name in names.items():
        of: Group | None = layer.__dict__.get(GROUP)
        if of is None or id(of) in seen:
            continue
        seen.add(id(of))
        together = [names[other] for other in of.layers() if other in names]
        if len(together) > 1:
            report.groups.append(tuple(together))
        elif of.reason is not None:
            report.apart.append(Skipped(name, of.reason))
    return report
