"""Which modules of a model a target names.

The study's names stand for a projection's role in a transformer block, whatever a model calls it:

    qkv      what attention reads: query, key and value
    o_proj   what attention writes
    fc1      the MLP's first linear (in a gated MLP: gate and up)
    fc2      the MLP's last linear (down)
    all      the four together

joined by "+", as in "o_proj+fc2". Anything else is read as PEFT reads target_modules: a list of names,
each the end of a module's path, or one regular expression over the whole path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from fused_lora.layer import LoRALinear, linear_features, obstacle

# The ends of module paths, by role. The longest one that fits decides: BERT's "attention.output.dense"
# is its o_proj although "output.dense" is its fc2.
ROLES: dict[str, tuple[str, ...]] = {
    "qkv": (
        *("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, Phi, OPT, GPT-J, CLIP, BART, ViT
        *("qkv_proj", "query_key_value", "Wqkv"),  # Phi-3; GPT-NeoX, Falcon, BLOOM; MPT, ModernBERT
        *("attn.c_attn", "crossattention.c_attn", "crossattention.q_attn"),  # GPT-2
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # DeepSeek's latent attention
        *("self.query", "self.key", "self.value"),  # BERT, RoBERTa
        *("attention.query", "attention.key", "attention.value"),  # ViT before transformers 5
        *("q_lin", "k_lin", "v_lin"),  # DistilBERT
        *("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"),  # T5
        *("EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v"),
    ),
    "o_proj": (
        *("o_proj", "attn.out_proj", "attn.c_proj", "attn.dense"),  # Llama…; OPT, GPT-J; GPT-2; Phi
        *("attention.dense", "attention.output.dense"),  # GPT-NeoX, Falcon, BLOOM; BERT
        *("out_lin", "SelfAttention.o", "EncDecAttention.o"),  # DistilBERT; T5
        *("attention.out_proj", "crossattention.c_proj", "attn.Wo"),  # GPT-Neo; GPT-2; ModernBERT
    ),
    "fc1": (
        *("gate_proj", "up_proj", "gate_up_proj", "fc1"),  # Llama…; Phi-3; Phi, OPT, CLIP, ViT
        *("mlp.c_fc", "dense_h_to_4h", "intermediate.dense"),  # GPT-2; GPT-NeoX, Falcon, BLOOM; BERT
        *("mlp.fc_in", "ffn.lin1", "mlp.Wi"),  # GPT-J; DistilBERT; ModernBERT
        *("DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1"),  # T5
    ),
    "fc2": (
        *("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "output.dense"),
        *("mlp.fc_out", "ffn.lin2", "DenseReluDense.wo", "mlp.Wo"),
    ),
}

Targets = str | Sequence[str]


@dataclass(frozen=True)
class Skipped:
    """A module that a target names and that stays as it is."""

    name: str
    reason: str


@dataclass
class Selection:
    """What the targets name: modules that can carry an adapter, and those that cannot, with the reason."""

    chosen: dict[str, nn.Module] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


def role_of(path: str) -> str | None:
    """The role that a module's path says it has: "model.layers.0.mlp.down_proj" → "fc2"."""
    fits = [
        (len(end), role)
        for role, ends in ROLES.items()
        for end in ends
        if path == end or path.endswith(("." + end, "_" + end) if "." in end else "." + end)
    ]
    return max(fits)[1] if fits else None


def select(model: nn.Module, targets: Targets) -> Selection:
    """The modules of `model` that `targets` names.

    Raises ValueError where a part of `targets` names nothing, or everything it names is skipped; the
    message lists the linears that the model has.
    """
    selection = Selection()
    for label, fits in _parts(targets):
        found = False
        for path, module in _candidates(model):
            if not fits(path):
                continue
            found = True
            _file(model, path, module, selection)
        if not found:
            raise ValueError(
                f"targets: {label!r} names nothing in this model. It has:\n{inventory(model)}\n"
                f"A target is made of {', '.join(ROLES)} and all, joined by '+', or a list of path ends, "
                "or a pattern of whole paths."
            )
        if label == "all":
            known = {
                role_of(path) for path in [*selection.chosen, *(skip.name for skip in selection.skipped)]
            }
            for role in ROLES.keys() - known:
                selection.skipped.append(Skipped(role, "no path of this model is known by this role"))
    if not selection.chosen:
        reasons = "\n".join(sorted({f"  {skip.name}: {skip.reason}" for skip in selection.skipped}))
        raise ValueError(f"targets: nothing that {targets!r} names can carry an adapter:\n{reasons}")
    return selection


def inventory(model: nn.Module) -> str:
    """The model's linears, a line for each kind: how many, the path, the size."""
    kinds: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear) or obstacle(module) is None:
            features = "{}→{}".format(*linear_features(module))
            line = f"{collapsed(path)}  {features}"
            kinds[line] = kinds.get(line, 0) + 1
    return "\n".join(f"  {count} × {line}" for line, count in kinds.items()) or "  no linears"


def collapsed(path: str) -> str:
    """A path with its layer numbers hidden, to group like with like."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _parts(targets: Targets) -> Iterator[tuple[str, Callable[[str], bool]]]:
    """Each part of `targets`, and the test that it puts to a module's path."""
    if not isinstance(targets, str):
        if not targets:
            raise ValueError("targets: the list is empty")
        for end in targets:
            yield end, partial(_ends_with, end)
        return
    roles = [part.strip() for part in targets.split("+")]
    if all(role in ROLES or role == "all" for role in roles):
        for role in roles:
            yield role, partial(_has_role, tuple(ROLES) if role == "all" else (role,))
        return
    try:
        pattern = re.compile(targets)
    except re.error as error:
        known = ", ".join([*ROLES, "all"])
        raise ValueError(f"targets: {targets!r} is neither made of {known} nor a pattern: {error}") from error
    yield targets, lambda path: pattern.fullmatch(path) is not None


def _ends_with(end: str, path: str) -> bool:
    return path == end or path.endswith("." + end)


def _has_role(roles: Sequence[str], path: str) -> bool:
    return role_of(path) in roles


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module | tuple[int, ...]]]:
    """Paths that a target may name: modules without children, and stacks of experts' weights, which are
    3-D parameters and no modules at all (given by their shape)."""
    inside: set[nn.Module] = set()  # of LoRALinears: their own parts are nobody's targets
    for path, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, LoRALinear):
            inside.update(module.children())
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and role_of(f"{path}.{name}"):
                yield f"{path}.{name}", tuple(parameter.shape)
        if isinstance(module, LoRALinear) or not any(True for _ in module.children()):
            yield path, module


def _file(model: nn.Module, path: str, module: nn.Module | tuple[int, ...], selection: Selection) -> None:
    if path in selection.chosen or any(skip.name == path for skip in selection.skipped):
        return
    if isinstance(module, tuple):
        shape = "×".join(map(str, module))
        selection.skipped.append(
            Skipped(path, f"experts held as one 3-D parameter ({shape}), not as linears")
        )
        return
    reason = None if isinstance(module, LoRALinear) else obstacle(module)
    if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
        reason = "torch's encoder layer, in evaluation, reads its weight past the module"
    if reason:
        selection.skipped.append(Skipped(path, reason))
    else:
        selection.chosen[path] = module
