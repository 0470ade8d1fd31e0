"""What keeps PEFT's own forward, and why: PEFT's result comes out, and the report names the reason."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization

import fused_lora
from fused_lora import fuse, unfuse
from fused_lora.peft_layers import FusedPeftLinear
from tests.models import shake, tiny
from tests.operands import BF16, F32, F64
from tests.peft.bases import QuantisedTensor
from tests.peft.parity import (
    Net,
    adapted_net,
    assert_same,
    fused_twin,
    inputs,
    layers,
    output_and_gradients,
    same,
)

X = inputs(3, 4)
LINEAR = "peft.tuners.lora.layer"

# Whole layers


VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "DoraLinearVariant"),
    "MiCA": ({"init_lora_weights": "mica"}, "MiCALinearVariant"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "ALoraLinearVariant"),
    "BD-LoRA": (
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["up"], target_modules_bd_b=["head"], nblocks=2)},
        "BdLoraLinearVariant",
    ),
    "KaSA": ({"kasa_config": KasaConfig()}, "KasaLinearVariant"),
    "VeLoRA": ({"velora_config": VeloraConfig(num_groups=4)}, "VeloraLinearVariant"),
    "MonteCLoRA": ({"monteclora_config": MontecloraConfig()}, "MontecloraLinearVariant"),
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_keeps_pefts_forward_and_is_listed(variant, training, calls):
    settings, name = VARIANTS[variant]
    plain = adapted_net(target_modules=["up", "head"], **settings).train(training)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    reason = f"adapter 'default' is a variant ({name})"
    assert [skip.reason for skip in report.skipped] == [reason] * 2
    assert not report.swapped
    assert reason in str(report)
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]
    torch.manual_seed(1)
    ours = output_and_gradients(fused, X)
    torch.manual_seed(1)
    assert_same(ours, output_and_gradients(plain, X), roundings=0)
    assert not calls


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 9, 5))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0]
        return y


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.embed(x.argmax(dim=-1) % 16)
        return y


# A model, a configuration's settings, and why each LoRA layer of it is not fused.
BASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[str]]] = {
    "a convolution": (
        conv_net,
        {"target_modules": ["0"]},
        [f"a {LINEAR}.Conv2d is none of PEFT's LoRA linears"],
    ),
    "an embedding": (
        Embedding,
        {"target_modules": ["embed"]},
        [f"a {LINEAR}.Embedding is none of PEFT's LoRA linears"],
    ),
    "attention": (
        Attending,
        {"target_modules": ["attention"]},
        [
            f"a {LINEAR}.MultiheadAttention is none of PEFT's LoRA linears",
            "its base layer: nn.MultiheadAttention reads its weight past its forward",
        ],
    ),
    "a parameter": (
        Net,
        {"target_parameters": ["up.weight"]},
        [f"a {LINEAR}.ParamWrapper is none of PEFT's LoRA linears"],
    ),
}


@pytest.mark.parametrize("base", BASES)
def test_another_base_layer_keeps_pefts_forward_and_is_listed(base, calls):
    make, settings, reasons = BASES[base]
    torch.manual_seed(0)
    plain = get_peft_model(make(), LoraConfig(r=2, **settings))
    shake(plain)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert [skip.reason for skip in report.skipped] == reasons
    assert not report.swapped
    assert all(reason in str(report) for reason in reasons)
    x = torch.randn(2, 3, 3, 3) if base == "a convolution" else X
    assert_same(output_and_gradients(fused, x), output_and_gradients(plain, x), roundings=0)
    assert not calls


class Doubled(PeftLinear):  # type: ignore[misc]
    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


def test_a_subclass_of_pefts_layer_is_left_alone(calls):
    plain = adapted_net()
    layers(plain)[0].__class__ = Doubled
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    (skip,) = report.skipped
    assert skip.reason == f"a {__name__}.Doubled is none of PEFT's LoRA linears"
    same(plain, fused, X)
    assert len(calls) == 2


def test_a_layer_whose_forward_is_overridden_is_left_alone(calls):
    """As accelerate does to offload."""
    fused = adapted_net()
    layer = layers(fused)[0]
    layer.forward = lambda x: 2 * PeftLinear.forward(layer, x)
    (skip,) = fuse(fused).skipped
    assert skip.reason == "its forward is overridden on the instance"
    fused(X)
    assert len(calls) == 2


# Hooks


def double_forward(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda x: 2 * own(x)


def double_gradients(_module: nn.Module, gradients: Any, _: Any) -> Any:
    return tuple(gradient if gradient is None else 2 * gradient for gradient in gradients)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda module: module.register_forward_hook(lambda _module, _inputs, y: 2 * y),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda _module, args: 2 * args[0]),
    "overridden forward": double_forward,
    "backward hook": lambda module: module.register_full_backward_hook(double_gradients),
    "parametrization": lambda module: register_parametrization(module, "weight", Double()),
}
PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "base layer": lambda layer: layer.base_layer,
    "A": lambda layer: layer.lora_A["default"],
    "B": lambda layer: layer.lora_B["default"],
    "dropout": lambda layer: layer.lora_dropout["default"],
}


@pytest.mark.parametrize("late", [False, True], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize(
    ("hook", "part"),
    [pair for pair in itertools.product(HOOKS, PARTS) if pair != ("parametrization", "dropout")],  # no weight
)
def test_hooks_inside_a_layer_are_honoured(part, hook, late, calls):
    """Activation recorders and offloading put them there: what they are on runs as PEFT's does. Over a base
    layer with hooks the adapter is fused all the same."""
    plain = adapted_net()
    fused = copy.deepcopy(plain)
    if late:
        fuse(fused)
    for model in (plain, fused):
        HOOKS[hook](PARTS[part](layers(model)[0]))
    if not late:
        skipped = [] if part == "base layer" else ["base_model.model.up"]
        assert [skip.name for skip in fuse(fused).skipped] == skipped
    elif part != "base layer":
        assert layers(fused)[0].why_not_fused() is not None
    if part == "base layer":
        assert layers(fused)[0].why_base_not_fused() is not None
    assert_same(output_and_gradients(fused, X), output_and_gradients(plain, X))
    assert len(calls) == 2


def test_a_hook_on_the_lora_layer_itself_fires():
    fused, seen = fused_twin(adapted_net()), []
    layers(fused)[0].register_forward_hook(lambda *_: seen.append(1))
    fused(X)
    assert seen == [1]


def test_hooks_on_every_module_see_pefts_modules(calls):
    plain = adapted_net()
    fused = fused_twin(plain)
    seen: list[str] = []
    handle = register_module_forward_hook(lambda module, _inputs, _y: seen.append(type(module).__name__))
    try:
        assert torch.equal(fused(X), plain(X))
    finally:
        handle.remove()
    ours, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [name.removeprefix("FusedPeft") for name in ours] == theirs
    assert not calls
    fused(X)
    assert len(calls) == 3


class Doubling(ModelHook):  # type: ignore[misc]
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


def test_a_wrapper_of_the_forward_outlives_unfuse(calls):
    """accelerate keeps the method that it wraps."""
    plain = adapted_net()
    fused = fused_twin(plain)
    for model in (plain, fused):
        add_hook_to_module(layers(model)[0], Doubling())
    same(plain, fused, X)
    unfuse(fused)
    calls.clear()
    assert torch.equal(fused(X), plain(X))
    assert not calls
    for model in (plain, fused):
        remove_hook_from_module(layers(model)[0])
    assert torch.equal(fused(X), plain(X))


# What an adapter may become


def replace_by_wrapper(layer: Any) -> None:
    """FSDP1 wraps: outside its own forward the weight is empty."""
    for part in (layer.lora_A, layer.lora_B):
        part["default"] = Gathering(part["default"])


class Gathering(nn.Module):
    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.flat = nn.Parameter(module.weight.detach().flatten())
        self.shape = module.weight.shape

    @property
    def weight(self) -> Tensor:
        return self.flat[:0].reshape(0, self.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.flat.reshape(self.shape))


def partition(module: nn.Module) -> None:
    """As ZeRO-3 does: the Parameter has its data only while its module's forward runs."""
    weight: Any = module.weight
    weight.ds_id, whole = 0, weight.data

    def gather(*_: Any) -> None:
        weight.data = whole

    def release(*_: Any) -> None:
        weight.data = whole.new_empty(0)

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(release)
    release()


def give_a_a_bias(layer: Any) -> None:
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(4))


def drop_in_place(layer: Any) -> None:
    """The layer's input loses what the adapter drops."""
    layer.lora_dropout["default"] = nn.Dropout(0.5, inplace=True)
    layer.register_forward_pre_hook(lambda _layer, args: args[0].clone())


def drop_otherwise(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.AlphaDropout(0.5)


def scale_by_column(layer: Any) -> None:
    layer.scaling["default"] = torch.arange(float(layer.out_features))


def scale_by_a_vector_of_one(layer: Any) -> None:
    layer.scaling["default"] = torch.tensor([0.5], dtype=F64)


def make_the_adapter_quantised(layer: Any) -> None:
    weight = layer.lora_A["default"].weight.detach().as_subclass(QuantisedTensor)
    layer.lora_A["default"].weight = nn.Parameter(weight)


BECOMES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "wrapped adapter": (replace_by_wrapper, "adapter 'default' holds a Gathering and a Gathering"),
    "bias in A": (give_a_a_bias, "adapter 'default' has a bias in A"),
    "dropout in place": (drop_in_place, "adapter 'default' drops out in place"),
    "another dropout": (drop_otherwise, "adapter 'default' drops out by a AlphaDropout"),
    "scaling by column": (
        scale_by_column,
        "adapter 'default' has a Tensor as scaling, not one number",
    ),
    "scaling by a vector of one": (
        scale_by_a_vector_of_one,
        "adapter 'default' has a Tensor as scaling, not one number",
    ),
    "quantised adapter": (
        make_the_adapter_quantised,
        "adapter 'default' holds a QuantisedTensor and a Parameter, not plain Parameters",
    ),
}


@pytest.mark.parametrize("late", [False, True], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize("case", BECOMES)
def test_an_adapter_that_is_more_than_two_matrices_keeps_pefts_forward(case, late, calls):
    become, reason = BECOMES[case]
    plain = adapted_net()
    fused = copy.deepcopy(plain)
    if late:
        fuse(fused)
    for model in (plain, fused):
        become(layers(model)[0])
    if late:
        assert layers(fused)[0].why_not_fused() == reason
    else:
        assert [skip.reason for skip in fuse(fused).skipped] == [reason]
    for model in (plain, fused):
        layers(model)[0].lora_dropout.train()
    torch.manual_seed(1)
    ours = output_and_gradients(fused, X)
    torch.manual_seed(1)
    assert_same(ours, output_and_gradients(plain, X))
    assert len(calls) == 2


@pytest.mark.parametrize("late", [False, True], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize("part", ["A", "B"])
def test_partitioned_parameters_keep_pefts_forward(part, late):
    plain = adapted_net(target_modules=["up"])
    fused = copy.deepcopy(plain)
    if late:
        fuse(fused)
    partition(PARTS[part](layers(fused)[0]))
    reason = "adapter 'default' holds partitioned parameters (ZeRO-3)"
    if late:
        assert layers(fused)[0].why_not_fused() == reason
    else:
        assert [skip.reason for skip in fuse(fused).skipped] == [reason]
    with torch.no_grad():
        assert torch.equal(fused(X), plain(X))


@pytest.mark.parametrize("late", [False, True], ids=["before fuse", "after fuse"])
def test_over_a_partitioned_base_the_adapter_is_fused(late):
    plain = adapted_net(target_modules=["up"])
    fused = copy.deepcopy(plain)
    if late:
        fuse(fused)
    partition(layers(fused)[0].base_layer)
    if not late:
        assert not fuse(fused).skipped
    assert layers(fused)[0].why_base_not_fused() == "its weight is partitioned (ZeRO-3)"
    with torch.no_grad():
        torch.testing.assert_close(fused(X), plain(X))


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (BF16, BF16, "adapter 'default' is torch.bfloat16 on a weight in torch.float32"),
        (F64, F64, "adapter 'default' is torch.float64 on a weight in torch.float32"),
        (F32, BF16, "adapter 'default' has A in torch.float32 and B in torch.bfloat16"),
    ],
    ids=str,
)
def test_adapters_in_another_dtype_keep_pefts_forward(a, b, reason):
    plain = adapted_net(target_modules=["up"])
    layers(plain)[0].lora_A.to(a)
    layers(plain)[0].lora_B.to(b)
    fused = copy.deepcopy(plain)
    assert [skip.reason for skip in fuse(fused).skipped] == [reason]
    with torch.autocast("cpu", dtype=BF16):
        assert_same(output_and_gradients(fused, X), output_and_gradients(plain, X), roundings=0)


def test_input_that_is_not_to_be_cast_is_not_cast():
    """PEFT refuses masters then, but under autocast."""
    plain = adapted_net(BF16)
    fused = fused_twin(plain)
    with disable_input_dtype_casting(plain), disable_input_dtype_casting(fused):
        reason = "adapter 'default' is torch.float32 and its input is not to be cast"
        assert layers(fused)[0].why_not_fused() == reason
        for model in (plain, fused):
            with pytest.raises(RuntimeError, match="the same dtype"):
                model(X.to(BF16))
        same(plain, fused, X.to(BF16), autocast=BF16)
    same(plain, fused, X.to(BF16))


def test_an_adapter_that_is_not_covered_beside_one_that_is_keeps_pefts_forward_while_active(calls):
    plain = adapted_net()
    plain.add_adapter("dora", LoraConfig(r=2, target_modules=["up", "head"], use_dora=True))
    shake(plain, key=2, only=".dora")
    fused = copy.deepcopy(plain.eval())
    report = fuse(fused)
    assert len(report.swapped) == 3
    assert [skip.name for skip in report.unfused_adapters] == ["base_model.model.up", "base_model.model.head"]
    assert "2 adapters of swapped layers do not run fused" in str(report)
    assert "adapter 'dora' is a variant (DoraLinearVariant)" in str(report)
    for name, expected in (("default", 3), ("dora", 0), ("default", 3)):
        for model in (plain, fused):
            model.set_adapter(name)
        calls.clear()
        same(plain, fused, X)
        assert len(calls) == expected
    fused.set_adapter("dora")
    reasons = [layer.why_not_fused() for layer in layers(fused)]
    assert reasons[0] == reasons[2] == "adapter 'dora' is a variant (DoraLinearVariant)"
    assert reasons[1] == "no adapter of it is active"


def test_why_not_fused_follows_the_layers_state():
    fused = fused_twin(adapted_net())
    layer = layers(fused)[0]
    assert layer.why_not_fused() is None
    fused.merge_adapter()
    assert layer.why_not_fused() == "it is merged"
    fused.base_model.disable_adapter_layers()
    assert layer.why_not_fused() == "its adapters are switched off"
    fused.unmerge_adapter()
    fused.base_model.enable_adapter_layers()
    assert layer.why_not_fused() is None


# Transforms, and inputs that the op does not take


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "vmap": lambda model: torch.func.vmap(model)(X),
    "grad": lambda model: torch.func.grad(lambda x: model(x).sum())(X),
    "jvp": lambda model: torch.func.jvp(model, (X,), (torch.ones_like(X),))[1],
    "jacrev": lambda model: torch.func.jacrev(model)(X[0]),
    "jacfwd": lambda model: torch.func.jacfwd(model)(X[0]),
    "hessian": lambda model: torch.func.hessian(lambda x: model(x).square().sum())(X[0, 0]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_transforms_a_fused_model(transform):
    plain = adapted_net()
    ours, theirs = (TRANSFORMS[transform](model) for model in (fused_twin(plain), plain))
    assert_same({"result": ours}, {"result": theirs})


def test_gradients_of_each_sample_are_pefts():
    plain = adapted_net()
    gradients = []
    for model in (fused_twin(plain), plain):
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        def loss(parameters: dict[str, Tensor], x: Tensor, model: Any = model) -> Tensor:
            y: Tensor = torch.func.functional_call(model, parameters, (x,)).square().sum()
            return y

        gradients.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, X))
    assert_same(*gradients)


def test_functional_call_runs_fused_with_the_parameters_it_is_given(calls):
    plain = adapted_net()
    fused = fused_twin(plain)
    twice = {name: 2 * p.detach() for name, p in plain.named_parameters() if "lora_" in name}
    ours, theirs = (torch.func.functional_call(model, twice, (X,)) for model in (fused, plain))
    assert_same({"output": ours}, {"output": theirs})
    assert len(calls) == 3


def test_forward_mode_differentiation_of_a_fused_model():
    plain = adapted_net()
    tangents = []
    for model in (fused_twin(plain), plain):
        with forward_ad.dual_level():
            y = model(forward_ad.make_dual(X, torch.ones_like(X)))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert_same(*({"tangent": tangent} for tangent in tangents))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_inputs_are_pefts(layout):
    plain = get_peft_model(nn.Sequential(nn.Linear(32, 8)), LoraConfig(r=2, target_modules=["0"]))
    shake(plain)
    x = torch.nested.nested_tensor([X[0], X[1, :2]], layout=layout)
    ours, theirs = (model(x).unbind() for model in (fused_twin(plain), plain))
    assert [part.shape for part in ours] == [(4, 8), (2, 8)]
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


# Distributed


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One process that is a job of its own."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (
            "base layer",
            "its base layer: its weight is a DTensor laid out as (Replicate(),), not as (S(0),) or (S(1),)",
        ),
        ("A", "adapter 'default' holds a DTensor and a Parameter, not plain Parameters"),
        ("B", "adapter 'default' holds a Parameter and a DTensor, not plain Parameters"),
    ],
)
def test_distributed_tensors_keep_pefts_forward(part, reason, mesh):
    fused = adapted_net(target_modules=["up"])
    module: Any = PARTS[part](layers(fused)[0])
    module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Replicate()]))
    assert isinstance(module.weight, DTensor)
    assert [skip.reason for skip in fuse(fused).skipped] == [reason]


def test_fully_sharded_around_fused_layers_computes_what_peft_does(mesh):
    plain = adapted_net()
    fused = fully_shard(fused_twin(plain), mesh=mesh)
    assert_same({"output": fused(X).detach()}, {"output": plain(X).detach()})


def test_unfuse_refuses_layers_that_were_made_something_else(mesh):
    """fully_shard gives the module that it is called on a class of its own."""
    fused = fused_twin(adapted_net())
    fully_shard(layers(fused)[1], mesh=mesh)
    message = "model: base_model.model.proj was made a FSDPFusedPeftLinear after fuse: undo that first"
    with pytest.raises(ValueError, match=message):
        unfuse(fused)
    assert type(layers(fused)[0]) is FusedPeftLinear


# What is no PEFT model with LoRA layers


def test_a_model_without_lora_layers_is_refused():
    with pytest.raises(ValueError, match="model: LlamaForCausalLM has no LoRA layers of PEFT's"):
        fuse(tiny("llama"))


def test_another_peft_method_than_lora_is_refused():
    model = get_peft_model(tiny("llama"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="has no LoRA layers of PEFT's"):
        fuse(model)


def test_layers_of_another_method_around_a_lora_layer_keep_their_forward():
    torch.manual_seed(0)
    plain = get_peft_model(Net(), LoraConfig(r=2, target_modules=["up", "head"]), mixed=True)
    plain.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["up"], init_weights=False))
    plain.set_adapter(["default", "other"])
    shake(plain)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert len(report.swapped) == 2
    assert_same(output_and_gradients(fused, X), output_and_gradients(plain, X))


def test_weights_made_in_inference_mode_are_fused():
    with torch.inference_mode():
        plain = adapted_net()
        fused = fused_twin(plain)
        assert_same({"output": fused(X)}, {"output": plain(X)})
    unfuse(fused)


def test_without_peft_fuse_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "fused_lora.peft_layers")
    monkeypatch.delattr(fused_lora, "peft_layers")
    monkeypatch.setitem(sys.modules, "peft.tuners.lora.layer", None)
    with pytest.raises(
        ImportError, match=r"fuse works on PEFT models and PEFT does not import .*pip install peft"
    ):
        _ = fused_lora.fuse
