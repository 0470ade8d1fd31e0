"""What a model saves for backward, how well it does on what it has not seen, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples.product_copy.data import IGNORED, Batch, Encoded
from examples.product_copy.training import batch_loss


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """The bytes that one training step keeps from forward to backward, parameters left out.

    Every storage that autograd saves a tensor of counts once and whole, as that is what stays allocated.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = batch_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)


@torch.no_grad()
def heldout_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean loss over all labelled tokens of the batches, each token weighing the same."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        # The first token of a row is never predicted, so its label is not counted either.
        labels = int((batch.labels[:, 1:] != IGNORED).sum())
        total += float(batch_loss(model, batch)) * labels
        count += labels
    return total / count


@torch.no_grad()
def logits(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """The logits at every token that is not padding, tokens×vocabulary."""
    model.eval()
    rows = [model(**batch.inputs(), use_cache=False).logits[batch.attention_mask.bool()] for batch in batches]
    return torch.cat(rows)


@torch.no_grad()
def write(
    model: Any, tokenizer: Any, items: Sequence[Encoded], max_new_tokens: int, pad_id: int
) -> list[str]:
    """The model's greedy answer to each prompt; one that has not ended by then ends in "…"."""
    model.eval()
    width = max(item.prompt for item in items)
    # On the left, so that every answer starts in the same column.
    padded = [[pad_id] * (width - item.prompt) + list(item.prompt_ids) for item in items]
    mask = [[0] * (width - item.prompt) + [1] * item.prompt for item in items]
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None:
        max_new_tokens = min(max_new_tokens, room - width)
    ids = model.generate(
        input_ids=torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_id,
    )
    answers = ids[:, width:]
    ended = (answers == tokenizer.eos_token_id).any(dim=1).tolist()
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [" ".join(text.split()) + ("" if end else " …") for text, end in zip(texts, ended, strict=True)]
