"""A tiny model with an adapter on every projection, and what one process makes of a batch: what a job of
several is held against."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import fused_lora

# Relative to a gradient's norm. Processes add up in another order what one adds up: n summands of float32 may
# be off by n · eps / 2 of their magnitudes, and no sum here has more than a thousand.
REORDERING = 1000 * torch.finfo(torch.float32).eps / 2

OWNERS = ("add_lora", "fuse")
TOKENS = (4, 9)  # of one process's batch
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}


def plain_model() -> Any:
    """Qwen2: q, k and v have a bias, the others none."""
    torch.manual_seed(3)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they begin as zeros
                nn.init.normal_(parameter, std=0.1)
    return model


def adapted_model(owner: str, dropout: float = 0.0, targets: str = "all") -> Any:
    model = plain_model()
    if owner == "add_lora":
        fused_lora.add_lora(model, targets, r=4, alpha=8, dropout=dropout)
    else:
        model = peft_model(model, dropout)
        fused_lora.fuse(model)
    settle(model)
    return model


def peft_model(model: Any, dropout: float = 0.0, targets: str | list[str] = "all-linear") -> Any:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets)
    return peft.get_peft_model(model, config)


def settle(model: nn.Module) -> None:
    """B begins as zero, and A's gradient with it: other numbers, the same everywhere."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                write(parameter, torch.randn(parameter.shape, generator=generator) * 0.1)


def write(parameter: Tensor, tensor: Tensor) -> None:
    """Into a parameter, also one that is sharded."""
    if isinstance(parameter, DTensor):
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.copy_(tensor)


def batch(rank: int) -> Tensor:
    """One process's tokens, other ones for each."""
    return torch.randint(0, 64, TOKENS, generator=torch.Generator().manual_seed(50 + rank))


def loss_of(model: nn.Module, rank: int, seed: int | None = None) -> Tensor:
    """The mean over a process's tokens. The masks come from the process's own generator."""
    torch.manual_seed(900 + rank if seed is None else seed)
    tokens = batch(rank)
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def of_one_process(model: nn.Module, ranks: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over all processes' batches and its gradients, which one process adds up."""
    total = torch.zeros(())
    for rank in range(ranks):
        loss = loss_of(model, rank) / ranks
        loss.backward()
        total += loss.detach()
    return total, gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of what trains, whole, by names without what wrappers add. Nothing else has one."""
    found = {}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            found[name.removeprefix("module.")] = whole(parameter.grad)
    return found


def whole(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def assert_same(ours: dict[str, Tensor], right: dict[str, Tensor], bound: float = REORDERING) -> None:
    assert ours.keys() == right.keys()
    assert ours
    for name, exact in right.items():
        assert exact.norm() > 0, name
        error = (ours[name].double() - exact.double()).norm() / exact.double().norm()
        assert error <= bound, f"{name}: {error:.3g}, allowed {bound:.3g}"
