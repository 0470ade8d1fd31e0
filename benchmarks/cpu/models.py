"""The sides of the whole model's cases: SmolLM2-135M, frozen, with PEFT, and with ours.

A training step is a forward and backward of a batch, to the embedded tokens (which require gradients on every
side, so that the frozen model has the same way to go) and to the adapters; the optimiser, alike for all, is
left out. Decoding is greedy: one sequence, with the cache of keys and values. Adapters are in the base's
dtype.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import fused_lora
from benchmarks.cpu.cases import BATCH, DECODED, DECODING, PROMPT, STEP, TOKENS, Case
from benchmarks.cpu.memory import saved_bytes
from benchmarks.cpu.sides import AUTO, FROZEN, PACKED, PEFT, SCALING, Sides
from benchmarks.cpu.turns import Side
from examples.product_copy import model as product_copy
from examples.product_copy.errors import DemoError
from fused_lora.targets import select

SIDES = (FROZEN, PEFT, AUTO, PACKED)


def sides_of(half: str) -> tuple[str, ...]:
    return SIDES if half == DECODING else SIDES[:-1]


def obstacle() -> str | None:
    """Why there is no model (it comes in a package from PyPI); None where there is one."""
    try:
        product_copy.smollm2()
    except (DemoError, ImportError) as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=1)
def load(dtype: str) -> nn.Module:
    """The frozen model."""
    transformers.logging.disable_progress_bar()
    model: nn.Module = product_copy.load_model(product_copy.smollm2())
    return model.to(getattr(torch, dtype)).requires_grad_(False)


def build(case: Case, wanted: Sequence[str], base: nn.Module | None = None) -> Sides:
    """The sides of a case; all but the packed one share the base's weights. Steps are called once each."""
    base = base or load(case.dtype)
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = base.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(vocabulary, (BATCH, TOKENS), generator=generator)
    made = Sides({})
    for name in wanted:
        model = _make(name, case, base)
        if case.half == STEP:
            side = Side(_training(model, ids))
            made.saved[name] = saved_bytes(side.call, [*model.parameters(), *model.buffers()])
        else:
            side = Side(_decoding(model, ids[:1, :PROMPT]), torch.no_grad)
        made.running[name] = side
    return made


def _make(name: str, case: Case, base: nn.Module) -> nn.Module:
    if name == FROZEN:
        return base
    dtype = getattr(torch, case.dtype)
    alpha = SCALING * case.rank
    model = copy.deepcopy(base) if name == PACKED else _sharing(base)
    if name == PEFT:
        chosen = select(model, case.layer.name).chosen
        config = peft.LoraConfig(r=case.rank, lora_alpha=alpha, target_modules=list(chosen))
        wrapped: nn.Module = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        return wrapped
    fused_lora.add_lora(model, case.layer.name, r=case.rank, alpha=alpha, dtype=dtype)
    if name == PACKED:
        fused_lora.pack(model)
    return model


def _sharing(model: nn.Module) -> nn.Module:
    """Modules of their own around the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _training(model: Any, ids: Tensor) -> Callable[[], object]:
    model.train()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    wanted = [embedded, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> object:
        loss: Tensor = model(inputs_embeds=embedded, labels=ids, use_cache=False).loss
        return torch.autograd.grad(loss, wanted)

    return step


def _decoding(model: Any, prompt: Tensor) -> Callable[[], object]:
    model.eval()
    return functools.partial(
        model.generate,
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=DECODED,
        max_new_tokens=DECODED,
        pad_token_id=0,
    )
