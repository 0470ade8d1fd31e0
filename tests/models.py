"""Tiny transformers models of many families, built from their configurations with weights that matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import fused_lora
from fused_lora import adapter_sum, layer, peft_layers

# By which layers call lora_linear.
CALLERS = (adapter_sum, layer, peft_layers)
F32 = torch.float32
VOCABULARY = 64
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **_SPECIAL}
_BLOCK = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
_LLAMA = {**_TEXT, **_BLOCK}
_GROUPED = {**_LLAMA, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCABULARY, **_SPECIAL}

# The model's class, its configuration's class and sizes.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_LLAMA, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GROUPED),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GROUPED),
    "phi": ("PhiForCausalLM", "PhiConfig", _LLAMA),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCABULARY, **_SPECIAL},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **_TEXT,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _LLAMA),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            **_SPECIAL,
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", _LLAMA),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _LLAMA),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "vocab_size": VOCABULARY},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": VOCABULARY},
    ),
    "clip": ("CLIPTextModel", "CLIPTextConfig", _LLAMA),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_BLOCK, "image_size": 32, "patch_size": 16}),
}


def steady() -> Iterator[None]:
    """For every test of a module: `steady = pytest.fixture(models.steady, autouse=True)`. The same random
    numbers each time, and one thread: on operands this small a second one only waits."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def configure(family: str, **sizes: Any) -> Any:
    model, config, own = FAMILIES[family]
    return getattr(transformers, config)(**{**own, **sizes}, architectures=[model])


def tiny(family: str, dtype: torch.dtype = F32, **sizes: Any) -> Any:
    """A model in evaluation mode whose every linear, bias and embedding shows in its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, FAMILIES[family][0])(configure(family, **sizes))
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=32**-0.5)
            elif parameter.dim() == 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model.eval().to(dtype)


def skeleton(family: str, **sizes: Any) -> Any:
    """A model without data: modules, names and shapes."""
    with torch.device("meta"):
        return getattr(transformers, FAMILIES[family][0])(configure(family, **sizes)).eval()


def example(family: str, rows: int = 2, columns: int = 7) -> dict[str, Tensor]:
    """An input of the family's kind: token ids, or pixels."""
    generator = torch.Generator().manual_seed(3)
    if family == "vit":
        return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)}
    tokens = torch.randint(3, VOCABULARY, (rows, columns), generator=generator)
    return {"input_ids": tokens, "decoder_input_ids": tokens} if family == "t5" else {"input_ids": tokens}


def output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    first: Tensor = model(**batch)[0]
    return first


def shake(model: nn.Module, key: int = 1, only: str = "") -> None:
    """Adapters as training would leave them: no longer zero."""
    generator = torch.Generator().manual_seed(key)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and only in name:
                values = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
                parameter.copy_(values)


@dataclass
class Snapshot:
    """Everything of a model that an operation which fails, or is undone, must leave as it was."""

    classes: dict[str, tuple[int, type]]
    attributes: dict[str, set[str]]
    parameters: dict[str, tuple[int, bool, Tensor]]
    keys: list[str]

    @staticmethod
    def of(model: nn.Module) -> Snapshot:
        modules = dict(model.named_modules())
        return Snapshot(
            {name: (id(module), type(module)) for name, module in modules.items()},
            {name: set(vars(module)) for name, module in modules.items()},
            {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
            list(model.state_dict()),
        )

    def check(self, model: nn.Module) -> None:
        now = Snapshot.of(model)
        assert now.classes == self.classes
        assert now.attributes == self.attributes
        assert now.keys == self.keys
        assert list(now.parameters) == list(self.parameters)
        for name, (identity, trains, values) in self.parameters.items():
            assert now.parameters[name][:2] == (identity, trains), name
            assert torch.equal(now.parameters[name][2], values), name


def adapted(kind: str, family: str, dropout: float = 0.1) -> Any:
    """A whole model with adapters on every linear: ours, or PEFT's that run fused."""
    model = tiny(family)
    if kind == "ours":
        fused_lora.add_lora(model, "all", r=4, dropout=dropout)
    else:
        config = peft.LoraConfig(
            r=4, target_modules="all-linear", lora_dropout=dropout, fan_in_fan_out=family == "gpt2"
        )
        model = peft.get_peft_model(model, config)
        fused_lora.fuse(model)
    shake(model)
    return model.train()
