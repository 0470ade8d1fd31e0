"""LoRALinear: a linear in every respect, its adapters, and what it refuses."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import fused_lora
from fused_lora import LoRALinear, LoRASettings, dropout_mask
from tests import models

steady = pytest.fixture(models.steady, autouse=True)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
IN, OUT = 24, 16


def conv1d():
    layer = Conv1D(OUT, IN)
    nn.init.normal_(layer.bias)  # zero by itself
    return layer


LINEARS: dict[str, Any] = {
    "Linear": lambda: nn.Linear(IN, OUT),
    "Linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": conv1d,
    "FalconLinear": lambda: FalconLinear(IN, OUT, bias=False),
}


@pytest.fixture(params=LINEARS)
def linear(request) -> nn.Module:
    module: nn.Module = LINEARS[request.param]()
    return module


def shaken(layer: LoRALinear) -> LoRALinear:
    for name in layer.settings:
        nn.init.normal_(layer.lora_B[name], std=0.3)
    return layer


def with_adapters(linear: nn.Module, **settings: LoRASettings) -> LoRALinear:
    layer = LoRALinear.from_linear(linear)
    for name, chosen in settings.items():
        layer.add_adapter(name, chosen)
    return shaken(layer)


def by_hand(layer: LoRALinear, x: torch.Tensor, *names: str, frozen: nn.Module) -> torch.Tensor:
    """y = x Wᵀ + b + Σ s·B(A x), each factor on its own."""
    y: torch.Tensor = frozen(x)
    for name in names:
        y = y + layer.settings[name].scaling * (x @ layer.lora_A[name].t()) @ layer.lora_B[name].t()
    return y


# What it is


def test_is_a_linear_with_a_linears_attributes():
    layer, linear = LoRALinear(IN, OUT, r=4), nn.Linear(IN, OUT)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert layer.weight.shape == linear.weight.shape
    assert layer.bias.shape == linear.bias.shape


def test_takes_a_linears_own_arguments():
    layer = LoRALinear(IN, OUT, False, "meta", F64, r=3)
    assert list(layer.state_dict()) == ["weight", "lora_A.default", "lora_B.default"]
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", F64)}


def test_without_adapters_it_is_the_frozen_linear(linear):
    x = torch.randn(3, 5, IN)
    layer = LoRALinear.from_linear(linear)
    assert torch.equal(layer(x), linear(x))
    assert layer.active_adapters == ()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_a_new_adapter_changes_nothing(linear, dtype):
    linear, x = linear.to(dtype), torch.randn(3, 5, IN, dtype=dtype)
    layer = LoRALinear.from_linear(linear, r=4, dropout=0.5)
    with fused_lora.use_path("composed"):  # the fused kernels sum in an order of their own
        assert torch.equal(layer(x), linear(x))
    torch.testing.assert_close(layer(x), linear(x))


@pytest.mark.parametrize("lead", [(), (1,), (5,), (0,), (2, 3), (2, 3, 4)], ids=str)
def test_computes_the_equation_for_any_leading_dimensions(linear, lead):
    layer = with_adapters(linear, default=LoRASettings(4, alpha=6.0))
    x = torch.randn(*lead, IN)
    if not (lead == () and isinstance(linear, Conv1D)):  # Conv1D itself takes no vector
        torch.testing.assert_close(layer(x), by_hand(layer, x, "default", frozen=linear))
    assert layer(x).shape == (*lead, OUT)


def test_gradients_are_those_of_the_equation(linear):
    linear.requires_grad_(False)
    layer = with_adapters(linear.double(), default=LoRASettings(4, alpha=6.0))
    x = torch.randn(5, IN, dtype=F64, requires_grad=True)
    wanted = [x, layer.lora_A["default"], layer.lora_B["default"]]
    dy = torch.randn(5, OUT, dtype=F64)
    ours = torch.autograd.grad(layer(x), wanted, dy)
    theirs = torch.autograd.grad(by_hand(layer, x, "default", frozen=linear), wanted, dy)
    torch.testing.assert_close(ours, theirs)


def test_autocast_computes_in_its_dtype(linear):
    layer = with_adapters(linear, default=LoRASettings(4))
    x = torch.randn(5, IN)
    with torch.autocast("cpu", dtype=BF16):
        y = layer(x)
    assert y.dtype == BF16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.03, atol=0.1)


def test_repr_shows_the_linear_and_its_adapters():
    layer = LoRALinear(IN, OUT, r=4, alpha=8.0, dropout=0.05)
    assert layer.extra_repr() == (
        "in_features=24, out_features=16, bias=True, default(r=4, alpha=8, dropout=0.05)"
    )
    layer.add_adapter("other", LoRASettings(2), activate=False)
    assert layer.extra_repr().endswith("other(r=2, alpha=32, dropout=0, inactive)")
    layer.enabled = False
    assert layer.extra_repr().endswith(", disabled")
    layer.enabled = True
    layer.merge()
    assert layer.extra_repr().endswith(", merged")


# From a linear, and back


def test_from_linear_shares_the_parameters_and_leaves_the_linear_as_it_was(linear):
    kind, attributes, keys = type(linear), set(vars(linear)), list(linear.state_dict())
    layer = LoRALinear.from_linear(linear, r=4, adapter_name="mine")
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.active_adapters == ("mine",)
    assert (type(linear), set(vars(linear)), list(linear.state_dict())) == (kind, attributes, keys)
    assert not list(linear.children())


@pytest.mark.parametrize("training", [True, False])
def test_from_linear_keeps_the_mode_and_the_hooks(linear, training):
    calls = []
    linear.train(training).register_forward_hook(lambda *_: calls.append(1))
    layer = LoRALinear.from_linear(linear, r=4)
    layer(torch.randn(2, IN))
    assert (layer.training, calls) == (training, [1])


def test_a_hook_on_the_new_layer_is_not_one_on_the_linear(linear):
    layer, calls = LoRALinear.from_linear(linear, r=4), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    linear(torch.randn(2, IN))
    assert not calls


def test_adopt_keeps_the_object_its_parameters_its_hooks_and_other_references(linear):
    parent, calls = nn.Sequential(linear), []
    weight, bias = linear.weight, linear.bias
    linear.register_forward_hook(lambda *_: calls.append(1))
    layer = LoRALinear.adopt(linear)
    assert layer is linear
    assert parent[0] is layer
    assert layer.weight is weight
    assert layer.bias is bias
    parent(torch.randn(2, IN))
    assert calls == [1]


@pytest.mark.parametrize("merged_before", [False, True])
def test_release_gives_the_linear_back_as_it_was(linear, merged_before):
    x = torch.randn(3, IN)
    y, kind, attributes, parameters = linear(x), type(linear), set(vars(linear)), dict(linear._parameters)
    layer = LoRALinear.adopt(linear)
    layer.add_adapter("default", LoRASettings(4))
    shaken(layer)
    if merged_before:
        layer.merge()
        layer.unmerge()
    released = layer.release()
    assert released is linear
    assert type(released) is kind
    assert set(vars(released)) == attributes
    assert not list(released.children())
    assert released._parameters.keys() == parameters.keys()
    assert all(released._parameters[name] is parameter for name, parameter in parameters.items())
    assert torch.equal(released(x), y)


def test_release_while_merged_keeps_the_merged_weight(linear):
    layer = LoRALinear.adopt(linear)
    layer.add_adapter("default", LoRASettings(4))
    shaken(layer).merge()
    merged = layer.weight
    assert layer.release().weight is merged


def test_a_released_layer_can_be_adopted_again(linear):
    LoRALinear.adopt(linear).release()
    layer = LoRALinear.adopt(linear)
    layer.add_adapter("default", LoRASettings(4))
    assert layer(torch.randn(2, IN)).shape == (2, OUT)


# Copies, files, dtypes, devices


def copied_by_file(layer: nn.Module, tmp_path) -> Any:
    torch.save(layer, tmp_path / "layer.pt")
    return torch.load(tmp_path / "layer.pt", weights_only=False)


@pytest.mark.parametrize("copied", [lambda layer, _: copy.deepcopy(layer), copied_by_file])
def test_a_copy_computes_the_same_and_shares_nothing(linear, copied, tmp_path):
    layer = with_adapters(linear, first=LoRASettings(4), second=LoRASettings(2, alpha=3.0))
    twin = copied(layer, tmp_path)
    x = torch.randn(3, IN)
    assert type(twin) is LoRALinear
    assert (twin.settings, twin.active_adapters) == (layer.settings, ("second",))
    assert torch.equal(twin(x), layer(x))
    nn.init.zeros_(twin.lora_B["second"])
    twin.set_adapter("first")
    twin.delete_adapter("second")
    assert list(layer.settings) == ["first", "second"]
    assert layer.lora_B["second"].any()
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}


def test_state_dict_keys_are_the_linears_and_two_for_each_adapter():
    layer = LoRALinear(IN, OUT, r=4, adapter_name="mine")
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A.mine", "lora_B.mine"]


def test_state_dict_loads_into_a_layer_of_the_same_adapters():
    source, target = shaken(LoRALinear(IN, OUT, r=4)), LoRALinear(IN, OUT, r=4)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, IN)
    assert torch.equal(target(x), source(x))


def test_a_plain_linears_checkpoint_loads_but_for_the_adapter():
    layer = LoRALinear(IN, OUT, r=4)
    missing, unexpected = layer.load_state_dict(nn.Linear(IN, OUT).state_dict(), strict=False)
    assert (missing, unexpected) == (["lora_A.default", "lora_B.default"], [])


@pytest.mark.parametrize("path", ["composed", "reference"])
def test_on_meta_it_gives_shapes_and_to_empty_with_reset_gives_a_layer(path):
    layer = LoRALinear(IN, OUT, device="meta", r=4)
    with fused_lora.use_path(path):
        assert layer(torch.empty(3, IN, device="meta")).shape == (3, OUT)
    layer.to_empty(device="cpu")
    layer.reset_adapter("default")
    nn.Linear.reset_parameters(layer)
    x = torch.randn(3, IN)
    assert layer.lora_A["default"].any()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [BF16, F16, F64], ids=str)
def test_conversion_takes_the_adapters_along(linear, dtype):
    layer = with_adapters(linear, default=LoRASettings(4))
    x = torch.randn(3, IN)
    expected = layer(x)
    layer.to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    torch.testing.assert_close(layer(x.to(dtype)), expected.to(dtype), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("weight", "expected"), [(F32, F32), (F64, F64), (BF16, F32), (F16, F32)], ids=lambda d: str(d)
)
def test_adapters_of_16_bit_weights_are_fp32_masters_by_default(weight, expected):
    layer = LoRALinear(IN, OUT, dtype=weight, r=4)
    assert {layer.lora_A["default"].dtype, layer.lora_B["default"].dtype} == {expected}
    assert layer(torch.randn(2, IN, dtype=weight)).dtype == weight


def test_the_adapters_dtype_can_be_chosen():
    layer = LoRALinear(IN, OUT, dtype=BF16)
    layer.add_adapter("default", LoRASettings(4), dtype=BF16)
    assert layer.lora_A["default"].dtype == BF16


# Settings


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        (LoRASettings(), 2.0),
        (LoRASettings(4, alpha=8.0), 2.0),
        (LoRASettings(4, alpha=1.0), 0.25),
        (LoRASettings(16, alpha=8.0, rslora=True), 2.0),
        (LoRASettings(3, alpha=-1.5), -0.5),
        (LoRASettings(4, alpha=0.0), 0.0),
    ],
    ids=str,
)
def test_scaling_is_alpha_by_r_or_by_its_root(settings, scaling):
    assert settings.scaling == scaling
    layer = LoRALinear(IN, OUT, bias=False)
    layer.add_adapter("default", settings)
    shaken(layer)
    x = torch.randn(3, IN)
    delta = x @ layer.lora_A["default"].t() @ layer.lora_B["default"].t()
    torch.testing.assert_close(layer(x) - F.linear(x, layer.weight), scaling * delta, rtol=1e-4, atol=1e-5)


def test_a_starts_as_pefts_and_b_at_zero():
    layer = LoRALinear(4096, 8, r=4)
    bound = 1 / math.sqrt(4096)  # kaiming_uniform with a = √5
    a = layer.lora_A["default"]
    assert a.abs().max() <= bound
    assert float(a.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not layer.lora_B["default"].any()


def test_reset_draws_a_anew_and_zeroes_b():
    layer = shaken(LoRALinear(IN, OUT, r=4))
    before = layer.lora_A["default"].detach().clone()
    layer.reset_adapter("default")
    assert not torch.equal(layer.lora_A["default"], before)
    assert not layer.lora_B["default"].any()


def test_a_rank_that_is_a_whole_number_by_value_will_do():
    """JSON and divisions give 4.0."""
    assert LoRALinear(IN, OUT, r=4.0).lora_A["default"].shape == (4, IN)  # type: ignore[arg-type]


# Several adapters


def test_a_new_adapter_becomes_the_active_one_unless_told_otherwise():
    layer = LoRALinear(IN, OUT, r=4)
    layer.add_adapter("second", LoRASettings(2))
    assert layer.active_adapters == ("second",)
    layer.add_adapter("third", LoRASettings(2), activate=False)
    assert layer.active_adapters == ("second",)


def test_set_adapter_switches(linear):
    layer = with_adapters(linear, first=LoRASettings(4), second=LoRASettings(2))
    x = torch.randn(3, IN)
    for name in ("first", "second"):
        layer.set_adapter(name)
        torch.testing.assert_close(layer(x), by_hand(layer, x, name, frozen=linear))
    layer.set_adapter([])
    assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("autocast", [False, True])
def test_two_active_adapters_add_up_in_evaluation(linear, dropout, autocast):
    layer = with_adapters(
        linear, first=LoRASettings(4, dropout=dropout), second=LoRASettings(2, alpha=-3.0, rslora=True)
    ).eval()
    layer.set_adapter(["second", "first"])
    x = torch.randn(2, 3, IN)
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        y = layer(x)
    assert y.dtype == (BF16 if autocast else F32)
    tolerance: dict[str, Any] = {"rtol": 0.03, "atol": 0.1} if autocast else {}
    torch.testing.assert_close(y.float(), by_hand(layer, x, "first", "second", frozen=linear), **tolerance)


@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_two_active_adapters_in_training_each_drop_by_a_mask_of_their_own(dtype):
    linear = nn.Linear(IN, OUT, dtype=dtype)
    layer = with_adapters(linear, first=LoRASettings(4, dropout=0.5), second=LoRASettings(2, dropout=0.25))
    layer.set_adapter(["first", "second"])
    x = torch.randn(6, IN, dtype=dtype)
    torch.manual_seed(11)
    y = layer(x)
    assert y.dtype == dtype
    torch.manual_seed(11)
    expected = linear(x).double()
    for name, scale in (("first", 2.0), ("second", 1 / 0.75)):
        seed = torch.randint(0, 2**63 - 1, (1,))
        kept = x * dropout_mask(seed, 6, IN, layer.settings[name].dropout)
        a, b = layer.lora_A[name].double(), layer.lora_B[name].double()
        expected += layer.settings[name].scaling * scale * kept.double() @ a.t() @ b.t()
    torch.testing.assert_close(y, expected.to(dtype))


def test_gradients_of_two_active_adapters_are_those_of_the_sum():
    layer = with_adapters(nn.Linear(IN, OUT).double(), first=LoRASettings(4), second=LoRASettings(2))
    layer.set_adapter(["first", "second"])
    x = torch.randn(5, IN, dtype=F64, requires_grad=True)
    wanted = [x, *layer.lora_A.values(), *layer.lora_B.values()]
    frozen = nn.Linear(IN, OUT).double()
    frozen.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    dy = torch.randn(5, OUT, dtype=F64)
    ours = torch.autograd.grad(layer(x), wanted, dy)
    theirs = torch.autograd.grad(by_hand(layer, x, "first", "second", frozen=frozen), wanted, dy)
    torch.testing.assert_close(ours, theirs)


def test_a_deleted_adapter_is_gone_and_no_longer_active():
    layer = LoRALinear(IN, OUT, r=4, adapter_name="first")
    layer.add_adapter("second", LoRASettings(2))
    layer.set_adapter(["first", "second"])
    layer.delete_adapter("first")
    assert layer.active_adapters == ("second",)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A.second", "lora_B.second"]
    layer.add_adapter("first", LoRASettings(3))
    assert layer.lora_A["first"].shape == (3, IN)


def test_switched_off_it_is_the_frozen_linear_bit_for_bit(linear):
    layer = with_adapters(linear, default=LoRASettings(4))
    x = torch.randn(2, 3, IN)
    layer.enabled = False
    assert torch.equal(layer(x), linear(x))
    layer.enabled = True
    assert not torch.allclose(layer(x), linear(x))


# Dropout


def test_dropout_is_on_in_training_only():
    layer = shaken(LoRALinear(IN, OUT, r=4, dropout=0.5))
    x = torch.randn(3, IN)
    frozen = nn.Linear(IN, OUT)
    frozen.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    without = by_hand(layer, x, "default", frozen=frozen)
    assert not torch.allclose(layer(x), without)
    torch.testing.assert_close(layer.eval()(x), without)


def test_dropout_drops_the_adapters_input_by_the_mask_of_torchs_seed(linear):
    layer = with_adapters(linear, default=LoRASettings(4, dropout=0.5))
    x = torch.randn(2, 3, IN)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    mask = dropout_mask(torch.randint(0, 2**63 - 1, (1,)), 6, IN, 0.5).reshape(x.shape)
    low = layer.settings["default"].scaling * (2 * x * mask) @ layer.lora_A["default"].t()
    torch.testing.assert_close(y, linear(x) + low @ layer.lora_B["default"].t())


def test_dropping_everything_leaves_the_frozen_linear():
    linear = nn.Linear(IN, OUT)
    layer = with_adapters(linear, default=LoRASettings(4, dropout=1.0))
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer(x), linear(x))


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a whole number ≥ 1, got 0"),
        ({"r": -2}, "r must be a whole number ≥ 1, got -2"),
        ({"r": 2.5}, "r must be a whole number ≥ 1, got 2.5"),
        ({"r": math.nan}, "r must be a whole number ≥ 1, got nan"),
        ({"r": math.inf}, "r must be a whole number ≥ 1, got inf"),
        ({"alpha": math.nan}, "alpha must be finite, got nan"),
        ({"alpha": math.inf}, "alpha must be finite, got inf"),
        ({"dropout": 1.5}, "dropout must be in [0, 1], got 1.5"),
        ({"dropout": -0.1}, "dropout must be in [0, 1], got -0.1"),
        ({"dropout": math.nan}, "dropout must be in [0, 1], got nan"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LoRASettings(**settings)


@pytest.mark.parametrize("name", ["", "a.b"])
def test_names_that_a_state_dict_cannot_hold_are_refused(name):
    with pytest.raises(ValueError, match=f"name must be a non-empty string without dots, got {name!r}"):
        LoRALinear(IN, OUT, r=4, adapter_name=name)


@pytest.mark.parametrize("name", ["train", "values", "type", "training", "_keys", "_modules"])
def test_names_that_a_module_has_taken_are_refused_and_nothing_is_left_of_them(name):
    layer = LoRALinear(IN, OUT, r=4)
    keys = list(layer.state_dict())
    with pytest.raises(ValueError, match=f"name.*{name!r}"):
        layer.add_adapter(name, LoRASettings(4))
    assert list(layer.state_dict()) == keys
    assert (list(layer.lora_A), list(layer.lora_B), list(layer.settings)) == (["default"],) * 3


def test_a_name_is_given_once():
    layer = LoRALinear(IN, OUT, r=4)
    with pytest.raises(ValueError, match="name: there is an adapter 'default' already"):
        layer.add_adapter("default", LoRASettings(4))


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer.set_adapter("other"),
        lambda layer: layer.set_adapter(["default", "other"]),
        lambda layer: layer.delete_adapter("other"),
        lambda layer: layer.reset_adapter("other"),
        lambda layer: layer.delta_weight("other"),
    ],
)
def test_an_unknown_adapter_is_refused_by_naming_those_there_are(use):
    layer = LoRALinear(IN, OUT, r=4)
    with pytest.raises(KeyError, match="no adapter 'other' in this layer; it has 'default'"):
        use(layer)
    assert layer.active_adapters == ("default",)


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def overridden() -> nn.Module:
    linear = nn.Linear(IN, OUT)
    vars(linear)["forward"] = lambda x: x
    return linear


def integral() -> nn.Module:
    linear = nn.Linear(IN, OUT)
    linear.weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.int8), requires_grad=False)
    return linear


class Quantised(nn.Parameter):
    pass


def quantised() -> nn.Module:
    linear = nn.Linear(IN, OUT)
    linear.weight = Quantised(torch.zeros(OUT, IN))
    return linear


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Conv2d(3, 3, 1), "linear: a Conv2d is not a plain linear"),
        (lambda: nn.Embedding(3, 3), "linear: a Embedding is not a plain linear"),
        (lambda: Subclass(IN, OUT), "linear: a Subclass is not a plain linear"),
        (lambda: nn.LazyLinear(OUT), "linear: a LazyLinear is not a plain linear"),
        (lambda: LoRALinear(IN, OUT), "linear: it is a LoRALinear already"),
        (overridden, "linear: its forward is overridden on the instance"),
        (integral, "linear: its weight is torch.int8"),
        (quantised, "linear: its weight is a Quantised, not a plain Parameter"),
    ],
)
@pytest.mark.parametrize("become", [LoRALinear.from_linear, LoRALinear.adopt])
def test_what_is_no_plain_linear_is_refused_and_left_alone(make, message, become):
    module = make()
    kind, attributes = type(module), set(vars(module))
    with pytest.raises(TypeError, match=message):
        become(module)
    assert (type(module), set(vars(module))) == (kind, attributes)


@pytest.mark.parametrize("thing", ["o_proj", torch.zeros(3, 3)], ids=["str", "Tensor"])
def test_what_is_no_module_is_refused_by_its_type(thing):
    with pytest.raises(TypeError, match=f"linear: a {type(thing).__name__} is not a plain linear"):
        LoRALinear.from_linear(thing)
