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
) -> Tensor: ...
def clear_cast_cache() -> None: ...
def build_facts() -> dict[str, str]: ...
