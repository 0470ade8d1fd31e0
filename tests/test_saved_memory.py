"""What the op keeps for backward: x, h and the seed; and whoever takes it into his own keeping meanwhile."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import fused_lora
from tests.operands import BF16, DTYPES, F32, forward_and_backward, operands

pytestmark = pytest.mark.usefixtures("either_path")


def saved_tensors(call) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return saved


def own_bytes(saved, parameters) -> int:
    """Bytes of distinct storages among `saved`, those of `parameters` left out."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for pointer, size in storages.items() if pointer not in known)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_saves_x_by_reference_and_h_and_the_seed(dtype, adapter_dtype, dropout_p):
    given = operands((32,), 24, 16, 4, dtype, adapter_dtype, dropout_p=dropout_p)
    x, weight, lora_a, lora_b, bias = given.tensors
    for tensor in (x, lora_a, lora_b):
        tensor.requires_grad_()
    saved = saved_tensors(lambda: fused_lora.lora_linear(*given.tensors, **given.options))
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
    h_bytes = 32 * 4 * lora_a.element_size()
    seed_bytes = 8 if dropout_p else 0
    assert own_bytes(saved, [x, weight, lora_a, lora_b, bias]) == h_bytes + seed_bytes


def test_frozen_adapters_keep_neither_x_nor_h():
    given = operands((32,))
    given.x.requires_grad_()
    saved = saved_tensors(lambda: fused_lora.lora_linear(*given.tensors, **given.options))
    assert not any(t.data_ptr() == given.x.data_ptr() for t in saved)
    assert own_bytes(saved, given.tensors[1:]) == 0


def test_autocast_keeps_one_cast_of_x_and_no_cast_of_the_adapters():
    given = operands((32,), dtype=F32)
    for tensor in (given.x, given.lora_a, given.lora_b):
        tensor.requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        saved = saved_tensors(lambda: fused_lora.lora_linear(*given.tensors, **given.options))
    adapters = [t for t in saved if t.shape in (given.lora_a.shape, given.lora_b.shape)]
    assert [t.dtype for t in adapters] == [F32, F32]
    assert [t.dtype for t in saved if t.shape == given.x.shape] == [BF16]


@pytest.mark.parametrize("x_trains", [False, True])
def test_under_autocast_layers_that_read_one_x_keep_one_cast_of_it(x_trains):
    """q, k and v: what they compute is what each would compute of a cast of its own, bit for bit."""
    layers = [operands((32,), out_features=out, dtype=F32, key=out) for out in (16, 8, 8)]
    x = layers[0].x.requires_grad_(x_trains)
    for given in layers:
        given.lora_a.requires_grad_()
        given.lora_b.requires_grad_()

    def call(xs):
        with torch.autocast("cpu", dtype=BF16):
            return torch.cat(
                [fused_lora.lora_linear(x, *g.tensors[1:]) for x, g in zip(xs, layers, strict=True)], 1
            )

    saved = saved_tensors(lambda: call([x] * 3))
    assert len({t.untyped_storage().data_ptr() for t in saved if t.shape == x.shape}) == 1
    leaves = [x] * x_trains + [t for g in layers for t in (g.lora_a, g.lora_b)]
    results = [
        (y, *torch.autograd.grad(y.float().square().sum(), leaves))
        for y in (call([x] * 3), call([x, x + 0, x + 0]))
    ]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))

    first = call([x] * 3)
    with torch.no_grad():
        x.mul_(2)  # while the cast of what it was lives on, for first's backward
    assert not torch.equal(call([x] * 3), first)


ROWS, RANK = 48, 8
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class OneLayer(nn.Module):
    """A decoder layer of SmolLM2-135M's shape."""

    def __init__(self):
        super().__init__()
        sizes = {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        }
        config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=2, attn_implementation="sdpa")
        self.layer = LlamaDecoderLayer(config, 0).requires_grad_(False)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x):
        positions = torch.arange(x.shape[1])[None]
        return self.layer(x, position_ids=positions, position_embeddings=self.rotary(x, positions))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "autocast"])
def test_a_transformer_layer_keeps_no_more_than_its_inputs_and_h_and_seeds(numbers, dropout, either_path):
    dtype = BF16 if numbers == "bfloat16" else F32
    if either_path == "composed" and numbers != "float32":
        pytest.skip("what is kept does not depend on the path; one case tells")
    frozen = OneLayer().to(dtype)
    ours = copy.deepcopy(frozen)
    fused_lora.add_lora(ours, PROJECTIONS, r=RANK, dropout=dropout)
    config = peft.LoraConfig(r=RANK, lora_dropout=dropout, target_modules=PROJECTIONS)
    pefts = peft.get_peft_model(copy.deepcopy(frozen), config)
    fused = copy.deepcopy(pefts)
    fused_lora.fuse(fused)
    x = torch.randn(1, ROWS, 576, dtype=dtype, requires_grad=True)

    def kept(model):
        def call():
            with torch.autocast("cpu", dtype=BF16, enabled=numbers == "autocast"):
                model.train()(x)

        return own_bytes(saved_tensors(call), [*model.parameters(), *model.buffers()])

    # Attention keeps o_proj's input already. q, k and v read one norm's output, gate and up the other's.
    inputs = ROWS * (576 + 576 + 1536) * (4 if numbers == "float32" else 2)
    h = ROWS * RANK * 7 * (2 if numbers == "autocast" else 4)
    seeds = 7 * 8 if dropout else 0
    assert kept(ours) == kept(fused) == kept(frozen) + inputs + h + seeds
    # PEFT keeps as much only where it neither drops out nor casts.
    unfused = kept(pefts)
    assert unfused == kept(ours) if numbers == "float32" and not dropout else unfused > kept(ours)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32)])
def test_offloading_changes_nothing(dtype, adapter_dtype, dropout_p):
    given = operands((5, 7), dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    expected = forward_and_backward(fused_lora.lora_linear, given)
    with save_on_cpu():
        got = forward_and_backward(fused_lora.lora_linear, given)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())


def test_backward_computes_of_what_a_lossy_hook_gives_back():
    given = operands((9,), dropout_p=0.3)
    x, weight, lora_a, lora_b, _ = given.tensors
    leaves = [t.requires_grad_() for t in (x, lora_a, lora_b)]
    long = ((9, 24), (9, 4))  # x and h

    def squeeze(t):
        return t.to(BF16) if t.shape in long else t

    with saved_tensors_hooks(squeeze, lambda t: t.to(F32) if t.shape in long else t):
        y = fused_lora.lora_linear(*given.tensors, **given.options)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, dy)
    options = (given.options.get("scaling", 1.0), 0.3, given.options["seed"], False)
    with torch.no_grad():
        _, h = torch.ops.fused_lora.lora_linear_forward(*given.tensors, *options)
        x, h = x.to(BF16).to(F32), h.to(BF16).to(F32)
        expected = torch.ops.fused_lora.lora_linear_backward(
            dy, x, weight, lora_a, lora_b, h, *options, [True, False, True, True, False]
        )
    assert all(torch.equal(one, expected[i]) for one, i in zip(got, (0, 2, 3), strict=True))


@pytest.mark.parametrize("hook", ["pack", "unpack"])
def test_a_hook_that_fails_is_heard_of(hook):
    given = operands()
    given.lora_a.requires_grad_()

    def full(_):
        raise OSError("no room for it")

    hooks = (full, lambda t: t) if hook == "pack" else (lambda t: t, full)
    with pytest.raises(OSError, match="no room for it"), saved_tensors_hooks(*hooks):
        fused_lora.lora_linear(*given.tensors).sum().backward()


def test_a_shape_that_a_hook_gives_back_wrongly_is_named():
    given = operands()
    given.lora_a.requires_grad_()
    with saved_tensors_hooks(lambda t: t, lambda t: t[:, 1:] if t.shape == given.x.shape else t):
        y = fused_lora.lora_linear(*given.tensors)
    with pytest.raises(ValueError, match="x must have in_features = 24"):
        y.sum().backward()
