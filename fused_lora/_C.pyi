from collections.abc import Callable, Sequence

import torch
from torch import Tensor

def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    round_adapters: bool,
    column_offset: int = 0,
) -> Tensor: ...
def lora_linear_mixed(
    x: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    adapter_index: Tensor,
    bias: Tensor | None,
    scaling: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    round_adapters: bool,
) -> Tensor: ...
def lora_linear_grouped(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    seeds: Sequence[Tensor | None],
    round_adapters: bool,
) -> list[Tensor]: ...
def lora_add(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    round_adapters: bool,
    column_offset: int = 0,
) -> Tensor: ...
def lora_add_(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    round_adapters: bool,
    column_offset: int = 0,
) -> None: ...
def as_no_view(view: Tensor) -> Tensor: ...
def set_path(name: str) -> None: ...
def clear_cast_cache() -> None: ...
def build_facts() -> dict[str, str]: ...
def set_policy(
    decide: Callable[[str, str, bool, Callable[[], tuple[float, float] | None] | None], str],
) -> None: ...
def forget_choices() -> None: ...
def cpu_level() -> str: ...
def cpu_obstacle() -> str: ...
def set_cpu_level(level: str) -> None: ...
def explain_cpu_shape(
    rows: int,
    in_features: int,
    out_features: int,
    rank: int,
    bfloat16: bool,
    masters: bool,
    round_adapters: bool,
    bias: bool,
    dropout: bool,
    weight_transposed: bool,
    weight_packed: bool,
    adapter_alone: bool,
    threads: int,
    mixed: int = 0,
) -> dict[str, tuple[str, bool]]: ...
def fits_panels(out_features: int, in_features: int) -> bool: ...
def pack_parameter(parameter: Tensor, transposed: bool) -> Tensor: ...
def references(parameters: dict[str, Tensor | None]) -> list[int]: ...
def empty_unless_held(parameters: dict[str, Tensor | None], references: list[int]) -> bool: ...
def restore_parameter(
    parameter: Tensor, packed: Tensor, strides: tuple[int, ...], transposed: bool
) -> None: ...

# In a CUDA build alone:
def device_figures(index: int) -> tuple[int, int, int]: ...
def explain_shape(
    rows: int,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    round_adapters: bool,
    bias: bool,
    dropout: bool,
    weight_transposed: bool,
    adapter_alone: bool,
    figures: tuple[int, int, int],
) -> dict[str, tuple[str, str, bool]]: ...
