"""Weights held packed: the same numbers, the same memory, and the plain Parameter for whoever looks."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fused_lora
from fused_lora import LoRALinear, LoRASettings, choices, lora_linear, pack, reference, unpack, use_path
from fused_lora.binary import BINARY
from fused_lora.packed import PackedParameters, packed_weight
from fused_lora.packed import pack_weight as pack_one
from fused_lora.peft_layers import FusedPeftLinear
from tests import models
from tests.models import Snapshot, example, output, shake, tiny
from tests.operands import BF16, F16, F32, F64, Operands, check_against_torch, operands

steady = pytest.fixture(models.steady, autouse=True)
BATCH = example("llama")
IN, OUT = 64, 96
pack_weight, unpack_weight = torch.ops.fused_lora.pack_weight, torch.ops.fused_lora.unpack_weight


def with_packed(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
    return lora_linear(x, pack_weight(weight.detach()), *rest, **options)


def layer(dtype: torch.dtype = F32, linear: nn.Module | None = None, **settings: Any) -> LoRALinear:
    made = LoRALinear.adopt(linear or nn.Linear(IN, OUT, dtype=dtype))
    made.requires_grad_(False)
    made.add_adapter("default", LoRASettings(4, **settings))
    nn.init.normal_(made.lora_B["default"], std=0.1)
    return made


def adapted(dtype: torch.dtype = F32, **settings: Any) -> Any:
    model = tiny("llama", dtype)
    fused_lora.add_lora(model, "all", r=4, **settings)
    shake(model)
    return model


def peft_model(dtype: torch.dtype = F32, family: str = "llama") -> Any:
    targets = {"llama": ["o_proj", "down_proj"], "gpt2": ["attn.c_proj", "mlp.c_proj"]}[family]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, fan_in_fan_out=family == "gpt2")
    model = get_peft_model(tiny(family, dtype), config)
    shake(model)
    fused_lora.fuse(model)
    return model.eval()


def holders(model: nn.Module) -> list[nn.Module]:
    """The linears whose weights may be packed."""
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, LoRALinear):
            found.append(module)
        elif isinstance(module, FusedPeftLinear):
            found.append(module.base_layer)
    return found


def packed(model: nn.Module) -> list[bool]:
    return [packed_weight(linear) is not None for linear in holders(model)]


def close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = 4 * torch.finfo(theirs.dtype).eps
    assert (ours - theirs).abs().max() <= tolerance * (1 + theirs.abs().max()) * 4


# The op


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("stored", [lambda w: w, lambda w: w.t().contiguous().t()])
def test_a_weight_goes_into_panels_and_comes_back(stored, dtype):
    weight = stored(torch.randn(OUT, IN).to(dtype))
    panels = pack_weight(weight)
    assert list(panels.shape) == [3, IN, 32] if dtype == F32 else [3, IN // 2, 64]
    assert panels.nbytes == weight.nbytes
    assert torch.equal(unpack_weight(panels), weight)
    assert torch.equal(reference.unpacked(panels), weight)


@pytest.mark.parametrize("path", ["fused", "composed", "reference"])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (40,)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32)])
def test_a_packed_weight_computes_what_a_plain_one_does(dtype, adapter_dtype, dropout_p, rows, path):
    given = operands(rows, IN, OUT, 4, dtype, adapter_dtype, dropout_p=dropout_p)
    with use_path(path):
        check_against_torch(given, with_packed)


def test_no_rows_have_a_result_as_well():
    given = operands((0, 3), IN, OUT)
    check_against_torch(given, with_packed)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_backward_of_a_backward(dropout_p):
    given = operands((3,), IN, OUT, dropout_p=dropout_p)

    def second(op: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x, a, b = (t.clone().requires_grad_() for t in (given.x, given.lora_a, given.lora_b))
        y = op(x, given.weight, a, b, given.bias, **given.options)
        first = torch.autograd.grad(y.square().sum(), [x, a, b], create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), [x, a, b])

    for ours, theirs in zip(second(with_packed), second(lora_linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("into", [BF16, F16])
@pytest.mark.parametrize("cached", [True, False])
def test_under_autocast(cached, into, dtype):
    given = operands((5,), IN, OUT, dtype=dtype, adapter_dtype=F32)
    arguments = given.lora_a, given.lora_b, given.bias
    panels = pack_weight(given.weight)
    with torch.autocast("cpu", into, cache_enabled=cached):
        plain = lora_linear(given.x, given.weight, *arguments)
        for _ in range(2):
            ours = lora_linear(given.x, panels, *arguments)
            assert ours.dtype == into
            close(ours, plain)


def test_the_ops_pass_torchs_own_checks():
    given = operands((5,), IN, OUT, dropout_p=0.3)
    x, weight, a, b, bias = given.tensors
    panels = pack_weight(weight)
    torch.library.opcheck(pack_weight, (weight,))
    torch.library.opcheck(unpack_weight, (panels,))
    leaves = x.requires_grad_(), panels, a.requires_grad_(), b.requires_grad_(), bias
    torch.library.opcheck(torch.ops.fused_lora.lora_linear, leaves, given.options)


def broken(weight: Tensor, dtype: torch.dtype = F32) -> Operands:
    given = operands((5,), IN, OUT, dtype=dtype)
    return Operands(given.x, weight, given.lora_a, given.lora_b, None)


PANELS = pack_weight(operands((5,), IN, OUT).weight)
MISUSES = {
    "panels": (broken(PANELS.view(3, IN // 2, 64)), ValueError, r"got shape \[3, 32, 64\]"),
    "features": (broken(PANELS[:2]), ValueError, "lora_b must have out_features = 64"),
    "dtype": (
        broken(PANELS.double(), F64),
        TypeError,
        "must be torch.float32 or torch.bfloat16, got torch.f",
    ),
    "other dtype": (broken(PANELS, BF16), TypeError, "weight must be torch.bfloat16"),
    "strides": (broken(PANELS.mT.contiguous().mT), ValueError, "must be contiguous, got strides"),
    "trains": (broken(PANELS.clone().requires_grad_()), ValueError, "packed weights are frozen"),
}


@pytest.mark.parametrize("path", ["auto", "composed", "reference"])
@pytest.mark.parametrize("misuse", MISUSES)
def test_what_a_packed_weight_cannot_be(misuse, path):
    given, error, text = MISUSES[misuse]
    with use_path(path), pytest.raises(error, match=text):
        lora_linear(*given.tensors)


def test_there_is_no_gradient_of_a_packed_weight():
    given = operands((5,), IN, OUT)
    with pytest.raises(ValueError, match="there is no gradient of it"):
        torch.ops.fused_lora.lora_linear_backward(
            torch.randn(5, OUT), given.x, PANELS, given.lora_a, given.lora_b, None, 1.0, 0.0, None, False,
            [False, True, False, False, False],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "error", "text"),
    [
        (torch.randn(OUT), ValueError, "weight must be 2-D"),
        (torch.randn(80, IN), ValueError, "out_features in multiples of 32"),
        (torch.randn(OUT, 63), ValueError, "in_features in multiples of 2"),
        (torch.randn(OUT, IN).half(), TypeError, "got torch.float16"),
    ],
)
def test_what_cannot_be_packed(weight, error, text):
    with pytest.raises(error, match=text):
        pack_weight(weight)


def test_calls_with_a_packed_weight_are_a_class_of_their_own():
    assert BINARY.module is not None
    sizes = {"rows": 4, "in_features": IN, "out_features": OUT, "rank": 4}
    flags = dict.fromkeys(("bfloat16", "masters", "round_adapters", "bias", "dropout"), False)
    told = BINARY.module.explain_cpu_shape(
        **sizes, **flags, weight_transposed=False, weight_packed=True, adapter_alone=False, threads=1
    )
    shape, _ = told["forward"]
    assert "weight=panels" in shape
    BINARY.module.forget_choices()
    choices._made.pop(("cpu", shape), None)
    given = operands((4,), IN, OUT, bias=False)
    with_packed(*given.tensors)
    assert choices.made("cpu", shape) is not None
    assert "fused" in fused_lora.explain(rows=4, in_features=IN, out_features=OUT, weight_packed=True)
    with pytest.raises(ValueError, match="explain: weight_packed: a weight of 64→80 on cpu"):
        fused_lora.explain(rows=4, in_features=IN, out_features=80, weight_packed=True)


# Models


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("make", [adapted, peft_model])
def test_a_packed_model_computes_the_same_and_stays_packed(make, dtype):
    model = make(dtype)
    with torch.no_grad():
        plain = output(model, BATCH)
        report = pack(model)
        assert all(packed(model))
        assert len(report.packed) == len(holders(model))
        assert not report.left_plain
        close(output(model, BATCH), plain)
    output(model, BATCH).float().sum().backward()
    assert all(packed(model))


@pytest.mark.parametrize("make", [adapted, peft_model])
def test_unpack_puts_everything_back_as_it_was(make):
    model = make()
    before = Snapshot.of(model)
    pack(model)
    assert unpack(model) is model
    assert not any(packed(model))
    assert all(type(module._parameters) is dict for module in model.modules())
    before.check(model)
    before.check(unpack(model))


def test_both_do_nothing_the_second_time():
    model = adapted()
    first = pack(model)
    weights = [packed_weight(linear) for linear in holders(model)]
    assert pack(model) == first
    assert all(packed_weight(linear) is w for linear, w in zip(holders(model), weights, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_packed_weight_takes_the_plain_ones_memory(dtype):
    made = layer(dtype)
    plain = weakref.ref(made.weight.untyped_storage())
    size = made.weight.nbytes
    report = pack(made)
    assert plain() is None
    panels = packed_weight(made)
    assert panels is not None
    assert panels.untyped_storage().nbytes() == size == report.bytes
    memory = weakref.ref(panels.untyped_storage())
    del panels
    unpack(made)
    assert memory() is None
    assert made.weight.untyped_storage().nbytes() == size


def test_a_layer_that_goes_takes_its_panels_along():
    made = layer()
    pack(made)
    panels = packed_weight(made)
    assert panels is not None
    memory = weakref.ref(panels.untyped_storage())
    del panels
    gc.disable()
    try:
        del made
        assert memory() is None
    finally:
        gc.enable()


def test_the_report_tells_what_is_packed_and_what_is_not():
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, 40), nn.Linear(40, 32))
    fused_lora.add_lora(model, ["0", "1"], r=4)
    text = str(pack(model))
    assert text == (
        "packed weights: 1, 0.0 MiB\n  1 × 0\n1 left plain\n"
        "  1 × 1: 96→40 has no whole panels (multiples of 2 → multiples of 32)"
    )


def test_a_model_without_fused_layers_is_an_error():
    with pytest.raises(ValueError, match="no layer of it runs fused"):
        pack(nn.Linear(IN, OUT))
    unpack(nn.Linear(IN, OUT))


# Looks


def save_and_load(made: LoRALinear) -> Any:
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


LOOKS: dict[str, Callable[[Any], Any]] = {
    "weight": lambda m: m.weight,
    "getattr": lambda m: getattr(m, "weight", None),
    "parameters": lambda m: list(m.parameters()),
    "named_parameters": lambda m: dict(m.named_parameters()),
    "get_parameter": lambda m: m.get_parameter("weight"),
    "state_dict": lambda m: m.state_dict(),
    "load_state_dict": lambda m: m.load_state_dict({}, strict=False),
    "to": lambda m: m.to("cpu"),
    "requires_grad_": lambda m: m.requires_grad_(False),
    "zero_grad": lambda m: m.zero_grad(),
    "copy": lambda m: copy.copy(m).weight,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": save_and_load,
    "merge": lambda m: (m.merge(), m.unmerge()),
    "merging the model": lambda m: [use(m) for use in (fused_lora.merge, fused_lora.unmerge)],
    "disabled": lambda m: switched_off(m)(torch.randn(2, IN, dtype=m.bias.dtype)),
    "dict": lambda m: dict(m._parameters),
    "unpacking": lambda m: {**m._parameters},
    "merging dicts": lambda m: {} | m._parameters,
    "updating": lambda m: {}.update(m._parameters),
    "list": lambda m: list(m._parameters),
    "reversed": lambda m: list(reversed(m._parameters)),
    "get": lambda m: m._parameters.get("weight"),
    "items": lambda m: list(m._parameters.items()),
    "values": lambda m: list(m._parameters.values()),
    "keys": lambda m: list(m._parameters.keys()),
    "dict's copy": lambda m: m._parameters.copy(),
    "dict's copy.copy": lambda m: copy.copy(m._parameters),
    "repr": lambda m: repr(m._parameters),
    "equality": lambda m: m._parameters == {},
    "setdefault": lambda m: m._parameters.setdefault("weight", None),
    "update": lambda m: m._parameters.update({}),
    "pop": lambda m: m._parameters.update(weight=m._parameters.pop("weight")),
}  # fmt: skip


def switched_off(made: LoRALinear) -> LoRALinear:
    made.enabled = False
    return made


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_finds_the_plain_parameter(look, dtype):
    made = layer(dtype)
    identity, version, values = id(made.weight), made.weight._version, made.weight.detach().clone()
    pack(made)
    assert packed_weight(made) is not None
    LOOKS[look](made)
    assert type(made._parameters) is dict
    assert set(made._parameters) == {"weight", "bias"}
    assert id(made.weight) == identity
    assert type(made.weight) is nn.Parameter
    assert not made.weight.requires_grad
    assert made.weight._version == version
    assert torch.equal(made.weight, values)


@pytest.mark.parametrize(
    "look",
    [
        lambda m: m.bias,
        lambda m: m.training,
        lambda m: m.eval(),
        lambda m: repr(m),
        lambda m: "weight" in m._parameters and len(m._parameters) == 2,
        lambda m: m.set_adapter([]),
        lambda m: m.add_adapter("more", LoRASettings(2)),
        lambda m: m.delete_adapter("default"),
        lambda m: m.delta_weight("default"),
        lambda m: hash(m),
        lambda m: list(m.named_modules()),
    ],
)
def test_what_is_not_about_the_weight_leaves_it_packed(look):
    made = layer()
    pack(made)
    look(made)
    assert packed_weight(made) is not None


def test_copies_hold_the_weight_plain():
    made = layer()
    pack(made)
    for twin in (copy.deepcopy(made), save_and_load(made), pickle.loads(pickle.dumps(made))):
        assert type(twin._parameters) is dict
        assert torch.equal(twin.weight, made.weight)
        assert twin.weight is not made.weight
        pack(made)


def test_a_state_dict_is_the_plain_models():
    model = adapted()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack(model)
    ours = model.state_dict()
    assert list(ours) == list(plain)
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())


def test_a_write_in_place_is_seen_by_the_next_forward():
    made = layer()
    x = torch.randn(3, IN)
    pack(made)
    with torch.no_grad():
        made(x)
        made.weight.add_(1)
        twin = copy.deepcopy(made)
        pack(made)
        assert packed_weight(made) is not None
        close(made(x), twin(x))
        made.weight = nn.Parameter(torch.zeros(OUT, IN), requires_grad=False)
        pack(made)
        close(made(x), nn.functional.linear(x, made.delta_weight("default"), made.bias))


def test_a_loaded_state_dict_is_seen_by_the_next_forward():
    made, other = layer(), layer()
    pack(made)
    made.load_state_dict(other.state_dict())
    pack(made)
    x = torch.randn(3, IN)
    with torch.no_grad():
        close(made(x), other(x))


def test_another_dtype_is_seen_by_the_next_forward():
    model = adapted()
    pack(model)
    model.to(BF16)
    assert not any(packed(model))
    assert len(pack(model).packed) == len(holders(model))
    assert output(model, BATCH).dtype == BF16


def test_merged_and_unmerged():
    model = adapted()
    with torch.no_grad():
        plain = output(model, BATCH)
        pack(model)
        fused_lora.merge(model)
        assert {skip.reason for skip in pack(model).left_plain} == {"it is merged"}
        torch.testing.assert_close(output(model, BATCH), plain, rtol=1e-4, atol=1e-4)
        fused_lora.unmerge(model)
        pack(model)
        close(output(model, BATCH), plain)


def test_a_released_layer_is_plain():
    model = tiny("llama")
    before = Snapshot.of(model)
    fused_lora.add_lora(model, "all", r=4)
    pack(model)
    fused_lora.remove_lora(model)
    before.check(model)


def test_the_dict_that_was_put_aside_leads_to_the_modules_own():
    made = layer()
    pack(made)
    kept = made._parameters
    assert isinstance(kept, PackedParameters)
    weight = made.weight
    assert kept["weight"] is weight
    assert dict(kept) == made._parameters
    kept["weight"] = nn.Parameter(torch.zeros(OUT, IN), requires_grad=False)
    assert made.weight is kept["weight"]
    del kept["bias"]
    assert "bias" not in made._parameters
    assert "bias" not in kept
    assert len(kept) == 1


def test_past_the_dicts_methods_there_is_an_error_and_no_number():
    made = layer()
    pack(made)
    emptied = dict.__getitem__(made._parameters, "weight")
    assert emptied.numel() == 0
    with pytest.raises((ValueError, RuntimeError)):
        lora_linear(torch.randn(3, IN), emptied, made.lora_A["default"], made.lora_B["default"])
    with pytest.raises((ValueError, RuntimeError)):
        nn.functional.linear(torch.randn(3, IN), emptied)


@pytest.mark.parametrize("stored", [Conv1D, lambda out, inner: strided(nn.Linear(inner, out))])
def test_a_weight_gets_the_strides_it_had(stored):
    made = layer(linear=stored(OUT, IN))
    x = torch.randn(3, IN)
    strides, values = made.weight.stride(), made.weight.detach().clone()
    with torch.no_grad():
        plain = made(x)
        assert pack(made).packed
        close(made(x), plain)
    assert made.weight.stride() == strides
    assert torch.equal(made.weight, values)


def strided(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    return linear


@pytest.mark.parametrize("context", ["inference", "meta", "fake", "transform"])
def test_a_look_from_within_another_mode(context):
    made = layer()
    values = made.weight.detach().clone()
    pack(made)
    if context == "inference":
        with torch.inference_mode():
            unpack(made)
            pack(made)
            made(torch.randn(3, IN))
        assert packed_weight(made) is not None
        made(torch.randn(3, IN, requires_grad=True)).sum().backward()
        with torch.inference_mode():
            made.parameters().__next__()
    elif context == "meta":
        with torch.device("meta"):
            made.parameters().__next__()
    elif context == "fake":
        with torch._subclasses.FakeTensorMode():
            made.parameters().__next__()
    else:
        torch.func.grad(lambda t: (t * len(list(made.parameters()))).sum())(torch.randn(3))
    assert type(made._parameters) is dict
    assert type(made.weight) is nn.Parameter
    assert not made.weight.is_inference()
    assert torch.equal(made.weight, values)
    assert pack(made).packed


# Layers of ours


def test_adapters_train_on_packed_weights_as_on_plain_ones():
    plain = adapted(dropout=0.1)
    model = copy.deepcopy(plain)
    losses = []
    for trained in (plain, model):
        torch.manual_seed(0)
        trained.train()
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.05)
        if trained is model:
            pack(trained)
        for _ in range(4):
            loss = trained(**BATCH, labels=BATCH["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert all(packed(model))
    assert losses[0] > losses[3]
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_computes_a_packed_layer_again(use_reentrant):
    made = layer(dropout=0.2)
    x = torch.randn(3, IN, requires_grad=True)
    torch.manual_seed(2)
    made(x).square().sum().backward()
    expected = x.grad.clone(), made.lora_A["default"].grad.clone()
    made.zero_grad()
    x.grad = None
    pack(made)
    torch.manual_seed(2)
    torch.utils.checkpoint.checkpoint(made, x, use_reentrant=use_reentrant).square().sum().backward()
    assert packed_weight(made) is not None
    for ours, theirs in zip((x.grad, made.lora_A["default"].grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_backward_after_the_weight_was_looked_at():
    made = layer()
    x = torch.randn(3, IN, requires_grad=True)
    (expected,) = torch.autograd.grad(made(x).sum(), x)
    pack(made)
    y = made(x)
    unpack(made)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("training", [False, True])
def test_several_adapters_run_packed(training):
    made = layer(dropout=0.2)
    made.add_adapter("more", LoRASettings(3, dropout=0.2))
    nn.init.normal_(made.lora_B["more"])
    made.set_adapter(["default", "more"])
    made.train(training)
    x = torch.randn(3, IN)
    with torch.no_grad():
        torch.manual_seed(1)
        plain = made(x)
        pack(made)
        torch.manual_seed(1)
        close(made(x), plain)
    assert packed_weight(made) is not None


def test_adapters_are_switched_and_saved_without_a_look(tmp_path):
    model = adapted()
    fused_lora.add_lora(model, "all", r=2, adapter_name="more")
    pack(model)
    fused_lora.set_adapter(model, "default")
    output(model, BATCH)
    fused_lora.save_adapter(model, tmp_path)
    assert all(packed(model))
    plain = tiny("llama")
    fused_lora.load_adapter(plain, tmp_path)
    with torch.no_grad():
        close(output(model, BATCH), output(plain, BATCH))


def test_a_disabled_adapter_leaves_the_frozen_model():
    model = adapted()
    pack(model)
    with fused_lora.disabled(model), torch.no_grad():
        assert torch.equal(output(model, BATCH), output(tiny("llama"), BATCH))
        assert not any(packed(model))
        assert {skip.reason for skip in pack(model).left_plain} == {"its adapters are switched off"}


# PEFT's layers


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_generates_with_packed_weights(family):
    model = peft_model(family=family)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**BATCH, **options)
    pack(model)
    assert torch.equal(model.generate(**BATCH, **options), plain)
    assert all(packed(model))


PEFT_USES: dict[str, Callable[[Any, Any], Any]] = {
    "save_pretrained": lambda model, path: model.save_pretrained(path),
    "merge": lambda model, _: (model.merge_adapter(), model.unmerge_adapter()),
    "unfuse": lambda model, _: fused_lora.unfuse(model),
    "fuse": lambda model, _: fused_lora.fuse(model),
    "disable_adapter": lambda model, _: use_disabled(model),
    "add_adapter": lambda model, _: model.add_adapter("more", LoraConfig(r=2, target_modules=["o_proj"])),
    "merge_and_unload": lambda model, _: copy.deepcopy(model).merge_and_unload(),
}


def use_disabled(model: Any) -> None:
    with model.disable_adapter():
        output(model, BATCH)


@pytest.mark.parametrize("use", PEFT_USES)
def test_pefts_own_uses_find_plain_weights(use, tmp_path):
    model = peft_model()
    twin = copy.deepcopy(model)
    pack(model)
    for used in (model, twin):
        torch.manual_seed(1)
        PEFT_USES[use](used, tmp_path)
    with torch.no_grad():
        close(output(model, BATCH), output(twin, BATCH))
    ours, theirs = model.state_dict(), twin.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


# Left plain


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(OUT, IN)
        self.layer = layer()


def refused(made: nn.Module) -> str:
    """Why the only fused layer of a model is left plain; that it still works; and that nothing changed."""
    before = Snapshot.of(made)
    report = pack(made)
    assert not report.packed
    before.check(made)
    return report.left_plain[0].reason


def test_tied_weights_are_left_plain():
    model = Shared()
    model.layer.weight = model.table.weight
    model.requires_grad_(False)
    assert refused(model) == "its weight is tied: table.weight and layer.weight are one"


def test_weights_that_train_are_left_plain():
    made = layer()
    made.weight.requires_grad_()
    assert refused(made) == "its weight trains"


def hold_optimizer(made: LoRALinear) -> Any:
    return torch.optim.SGD([made.weight], lr=0.1)


@pytest.mark.parametrize(
    "hold",
    [
        lambda made: made.weight,
        lambda made: made._parameters,
        lambda made: made.state_dict(),
        lambda made: made.weight[0],
        lambda made: made.weight.untyped_storage(),
        lambda made: made.weight.numpy(),
        hold_optimizer,
        lambda made: list(made.parameters()),
        lambda made: made(torch.randn(3, IN, requires_grad=True)),
        lambda made: LoRALinear.from_linear(copy.copy(made.release())),
    ],
)
def test_weights_that_something_else_refers_to_are_left_plain(hold):
    made = layer()
    held = hold(made)
    if not isinstance(made, LoRALinear):
        made = LoRALinear.adopt(made)
        made.add_adapter("default", LoRASettings(4))
    assert "something else refers to its weight" in refused(made)
    del held
    assert pack(made).packed


def test_what_only_garbage_refers_to_is_packed():
    made = layer()
    garbage: list[Any] = [made.weight]
    garbage.append(garbage)
    del garbage
    assert pack(made).packed


def lora_of(weight: Tensor) -> LoRALinear:
    made = layer(weight.dtype)
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


class Marked(nn.Parameter):
    pass


def in_inference_mode() -> LoRALinear:
    with torch.inference_mode():
        return layer()


def marked() -> LoRALinear:
    made = layer()
    made.weight = Marked(made.weight.detach().clone(), requires_grad=False)
    return made


def with_hook() -> LoRALinear:
    made = layer()
    made.weight.requires_grad_()
    made.weight.register_hook(lambda grad: grad)
    made.weight.requires_grad_(False)
    return made


def normed() -> LoRALinear:
    made = layer()
    nn.utils.parametrizations.weight_norm(made)
    return made


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (lambda: layer().to("meta"), "its weight is on meta"),
    "float16": (lambda: layer(F16), "its weight is torch.float16"),
    "float64": (lambda: layer(F64), "its weight is torch.float64"),
    "rows": (lambda: layer(linear=nn.Linear(IN, 80)), "64→80 has no whole panels"),
    "columns": (lambda: layer(linear=nn.Linear(63, OUT)), "63→96 has no whole panels"),
    "transposed": (lambda: layer(linear=Conv1D(80, IN)), "64→80 has no whole panels"),
    "subclass": (marked, "its weight is not a plain Parameter"),
    "parametrized": (normed, "its weight is not a plain Parameter"),
    "inference": (in_inference_mode, "its weight was made in inference mode"),
    "shared": (lambda: layer().share_memory(), "its weight is shared between processes"),
    "part": (lambda: lora_of(torch.randn(2, OUT, IN)[0]), "its weight is a part of other memory"),
    "expanded": (lambda: lora_of(torch.randn(1, IN).expand(OUT, IN)), "its weight is a part of other memory"),
    "hooks": (with_hook, "its weight has hooks"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_left_plain(refusal):
    make, reason = REFUSALS[refusal]
    report = pack(make())
    assert not report.packed
    assert reason in report.left_plain[0].reason


def test_without_kernels_everything_is_left_plain(monkeypatch):
    monkeypatch.setattr(fused_lora.packing.paths, "obstacle", lambda *_: "there are no fused kernels here")
    assert refused(layer()) == "there are no fused kernels here"


def test_pefts_layers_that_do_not_run_fused_are_left_plain():
    model = peft_model()
    model.base_model.disable_adapter_layers()
    assert {skip.reason for skip in pack(model).left_plain} == {"its adapters are switched off"}
    model.base_model.enable_adapter_layers()
    model.merge_adapter()
    assert {skip.reason for skip in pack(model).left_plain} == {"it is merged"}


# Threads, processes, graphs


def test_threads_that_look_and_threads_that_compute():
    made = layer()
    x = torch.randn(3, IN)
    values = made.weight.detach().clone()
    with torch.no_grad():
        plain = made(x)
    pack(made)
    failures: list[Any] = []
    stop = threading.Event()

    def compute() -> None:
        try:
            with torch.no_grad():
                while not stop.is_set():
                    close(made(x), plain)
        except BaseException as error:
            failures.append(error)

    def look() -> None:
        try:
            for _ in range(40):
                if not torch.equal(made.weight, values):
                    failures.append("another weight")
                pack_one(made, transposed=False)  # or not, where another thread holds it
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=target) for target in (compute, compute, look, look)]
    for thread in threads:
        thread.start()
    for thread in threads[2:]:
        thread.join()
    stop.set()
    for thread in threads[:2]:
        thread.join()
    assert not failures
    assert torch.equal(made.weight, values)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_computes_and_looks():
    made = layer()
    x = torch.randn(3, IN)
    values = made.weight.detach().clone()
    pack(made)
    with torch.no_grad():
        expected = made(x)
    child = os.fork()
    if child == 0:
        right = False
        try:
            with torch.no_grad():
                right = torch.equal(made(x), expected) and torch.equal(made.weight, values)
        finally:
            os._exit(0 if right else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert packed_weight(made) is not None


@pytest.mark.parametrize("make", [adapted, peft_model])
def test_a_compiled_model_computes_the_same_whenever_it_is_packed(make):
    model = make()
    with torch.no_grad():
        plain = output(model, BATCH)
        pack(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        close(output(compiled, BATCH), plain)
        pack(model)
        close(output(compiled, BATCH), plain)
        for linear in holders(model):
            linear.weight.zero_()
        other = output(copy.deepcopy(model), BATCH)
        pack(model)
        close(output(compiled, BATCH), other)
    loss = output(compiled, BATCH).sum()
    loss.backward()
    torch._dynamo.reset()


def test_an_exported_layer_has_the_plain_weight():
    made = layer()
    x = torch.randn(3, IN)
    pack(made)
    program = torch.export.export(made, (x,))
    assert any(name.endswith("weight") for name in program.state_dict)
    with torch.no_grad():
        close(program.module()(x), made(x))


def test_a_functional_call_takes_the_weight_it_is_given():
    made = layer()
    pack(made)
    x = torch.randn(3, IN)
    other = torch.randn(OUT, IN)
    with torch.no_grad():
        given = torch.func.functional_call(made, {"weight": other}, (x,))
        made.weight.copy_(other)
        close(given, made(x))
