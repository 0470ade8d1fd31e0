"""Tensor parallelism for adapted layers: torch's styles of parallelize_module, for what has an adapter too.

    from torch.distributed.tensor.parallel import parallelize_module

    fused_lora.add_lora(model, "all", r=16)
    plan = {"layers.*.self_attn.q_proj": ColwiseLoRA(), "layers.*.self_attn.o_proj": RowwiseLoRA(), ...}
    parallelize_module(model, mesh, plan)

How the adapter's halves lie beside the weight's shards, and what is summed where: fused_lora.shards. Where
torch's own styles have split a model's linears already, add_lora lays adapters out beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from fused_lora.layer import LoRALinear, stores_transposed
from fused_lora.shards import COLWISE, ROWWISE, Layout

__all__ = ["ColwiseLoRA", "RowwiseLoRA"]


class ColwiseLoRA(ColwiseParallel):
    """torch's ColwiseParallel, with its arguments: W's and B's rows are split, A is whole everywhere.

    For LoRALinears and PEFT's LoRA layers; a plain nn.Linear or nn.Embedding is split as torch splits it, so
    that one plan serves a model whatever of it is adapted.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not _is_adapted(module):
            return super()._apply(module, device_mesh)
        return _split(self, module, device_mesh, COLWISE)


class RowwiseLoRA(RowwiseParallel):
    """torch's RowwiseParallel, with its arguments: W's and A's columns are split, B is whole everywhere.

    For what ColwiseLoRA is for.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not _is_adapted(module):
            return super()._apply(module, device_mesh)
        self.desired_input_layouts = (Shard(-1),)
        return _split(self, module, device_mesh, ROWWISE)


def _split(style: Any, module: nn.Module, mesh: DeviceMesh, layout: Layout) -> nn.Module:
    parts = list(_parts(module))  # raises before anything is changed

    def partition(_: str, submodule: nn.Module, mesh: DeviceMesh) -> None:
        if submodule is not module:
            return
        for part, name, operand, transposed in parts:
            parameter = getattr(part, name)
            if parameter is None:
                continue
            placement = getattr(layout, operand)
            if transposed and isinstance(placement, Shard):
                placement = Shard(1 - placement.dim)
            split = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=style.src_data_rank)
            part.register_parameter(name, nn.Parameter(split, requires_grad=parameter.requires_grad))

    return distribute_module(
        module,
        mesh,
        partition,
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )


def _is_adapted(module: nn.Module) -> bool:
    """Whether it is a LoRALinear or a layer of PEFT's, whose package need not be there."""
    return isinstance(module, LoRALinear) or hasattr(module, "lora_A")


def _parts(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, bool]]:
    """The parameters of an adapted layer: who holds it, its name there, its operand, and whether it is stored
    transposed. Raises TypeError for a layer that does not run fused beside a split weight, by the reason."""
    if isinstance(module, LoRALinear):
        if module.merged:
            raise RuntimeError("the layer is merged: unmerge it before it is split")
        base: nn.Module = module
        transposed = module.fan_in_fan_out
        for operand in ("lora_a", "lora_b"):
            held = module.lora_A if operand == "lora_a" else module.lora_B
            yield from ((held, name, operand, False) for name in module.settings)
    else:
        from fused_lora.peft_layers import layer_obstacle

        reason = layer_obstacle(module)
        if reason:
            raise TypeError(f"it does not run fused, and is not split: {reason}")
        layer: Any = module
        base = layer.base_layer
        transposed = stores_transposed(type(base))
        for name in layer.lora_A:
            if layer.lora_B[name].bias is not None:
                raise TypeError(f"it is not split: adapter {name!r} has a bias (lora_bias)")
            yield layer.lora_A[name], "weight", "lora_a", False
            yield layer.lora_B[name], "weight", "lora_b", False
    yield base, "weight", "weight", transposed
    yield base, "bias", "bias", False
