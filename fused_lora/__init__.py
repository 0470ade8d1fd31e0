"""LoRA linears as one fused operation, forward and backward, for the projections you choose."""

from typing import TYPE_CHECKING, Any

from fused_lora._version import __version__
from fused_lora.add import lora_add, lora_add_
from fused_lora.binary import FusedLoRAWarning
from fused_lora.choices import share_choices
from fused_lora.explanation import explain
from fused_lora.files import load_adapter, save_adapter
from fused_lora.gate import held, swapping
from fused_lora.grouped import use_groups
from fused_lora.grouping import group, groups, ungroup
from fused_lora.layer import LoRALinear, LoRASettings
from fused_lora.ops import (
    clear_cast_cache,
    dropout_mask,
    lora_linear,
    lora_linear_grouped,
    lora_linear_mixed,
)
from fused_lora.packing import pack, unpack
from fused_lora.paths import use_cpu_level, use_path
from fused_lora.peft_files import AdapterFileError
from fused_lora.report import GroupReport, PackReport, Report
from fused_lora.swap import (
    add_lora,
    delete_adapter,
    disabled,
    merge,
    remove_lora,
    set_adapter,
    train_adapters,
    unmerge,
    use_adapters,
)

__all__ = [
    "AdapterFileError",
    "FusedLoRAWarning",
    "GroupReport",
    "LoRALinear",
    "LoRASettings",
    "PackReport",
    "Report",
    "__version__",
    "add_lora",
    "clear_cast_cache",
    "delete_adapter",
    "disabled",
    "dropout_mask",
    "explain",
    "fuse",
    "group",
    "groups",
    "held",
    "load_adapter",
    "lora_add",
    "lora_add_",
    "lora_linear",
    "lora_linear_grouped",
    "lora_linear_mixed",
    "merge",
    "pack",
    "remove_lora",
    "save_adapter",
    "set_adapter",
    "share_choices",
    "swapping",
    "train_adapters",
    "unfuse",
    "ungroup",
    "unmerge",
    "unpack",
    "use_adapters",
    "use_cpu_level",
    "use_groups",
    "use_path",
]


if TYPE_CHECKING:
    from fused_lora.peft_layers import fuse, unfuse


def __getattr__(name: str) -> Any:
    # PEFT is an extra, and slow to import: only who fuses a PEFT model pays for it.
    if name in ("fuse", "unfuse"):
        from fused_lora import peft_layers

        return getattr(peft_layers, name)
    raise AttributeError(f"module 'fused_lora' has no attribute {name!r}")
