"""Fused PEFT models beside plain ones: the same numbers, gradients, keys, files and methods."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import fused_lora
from fused_lora import dropout_mask, fuse, unfuse
from fused_lora.peft_layers import FusedPeftLinear
from tests import models
from tests.models import example, output, shake, tiny
from tests.operands import assert_no_worse_than_torch

steady = pytest.fixture(models.steady, autouse=True)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TARGETS = {"llama": ["o_proj", "down_proj"], "gpt2": ["attn.c_proj", "mlp.c_proj"]}
BATCH = example("llama", rows=3)


def adapted(family: str = "llama", dtype: torch.dtype = F32, key: int = 1, **settings: Any) -> Any:
    """A plain PEFT model whose adapter has been trained, so to say."""
    config = {"r": 4, "target_modules": TARGETS[family], "lora_alpha": 6, **settings}
    if family == "gpt2":
        config["fan_in_fan_out"] = True
    model = get_peft_model(tiny(family, dtype), LoraConfig(task_type="CAUSAL_LM", **config))
    shake(model, key)
    return model.eval()


def fused_twin(plain: Any) -> Any:
    fused = copy.deepcopy(plain)
    fuse(fused)
    return fused


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PeftLinear)]


def output_and_gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    y = output(model, batch)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    torch.autograd.backward(y, dy)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **gradients}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        difference = (ours[name] - value).abs().max()
        assert difference <= tolerance * (1 + value.abs().max()), f"{name}: {difference}"


@pytest.fixture
def calls(monkeypatch):
    """How often the fused op ran."""
    from fused_lora import peft_layers

    seen: list[tuple[Any, ...]] = []
    run = fused_lora.lora_linear

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args)
        return run(*args, **kwargs)

    monkeypatch.setattr(peft_layers, "lora_linear", counted)
    return seen


# The same numbers


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank and alpha patterns": {
        "rank_pattern": {"down_proj": 8, "c_proj": 2},
        "alpha_pattern": {"o_proj": 1, "attn.c_proj": 3},
    },
    "modules to save": {"modules_to_save": ["lm_head"]},
    "dropout in evaluation": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_fused_outputs_and_gradients_are_pefts(family, settings, calls):
    plain, batch = adapted(family, **settings), example(family)
    fused = fused_twin(plain)
    assert_same(output_and_gradients(fused, batch), output_and_gradients(plain, batch))
    assert len(calls) == 2  # each layer once


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize(("dtype", "adapters"), [(BF16, F32), (BF16, BF16), (F16, F32), (F64, F64)], ids=str)
def test_fused_is_no_less_exact_than_peft_in_any_dtype(family, dtype, adapters, calls):
    plain, batch = adapted(family, dtype), example(family)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    exact = output_and_gradients(copy.deepcopy(plain).double(), batch)
    theirs = output_and_gradients(plain, batch)
    ours = output_and_gradients(fused_twin(plain), batch)
    assert list(ours) == list(exact)
    assert len(calls) == 2
    for name, value in exact.items():
        assert_no_worse_than_torch(ours[name], theirs[name], value, name)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("base", [F32, BF16], ids=str)
def test_fused_is_no_less_exact_than_peft_under_autocast(family, base, calls):
    plain, batch = adapted(family, base), example(family)
    exact = output_and_gradients(copy.deepcopy(plain).double(), batch)
    with torch.autocast("cpu", dtype=BF16):
        theirs = output_and_gradients(plain, batch)
        ours = output_and_gradients(fused_twin(plain), batch)
    assert len(calls) == 2
    for name, value in exact.items():
        assert_no_worse_than_torch(ours[name], theirs[name], value, name)


class Masked(nn.Module):
    """PEFT's dropout module, with the fused op's mask for the seed that the op would draw here."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
        mask = dropout_mask(seed, x[..., 0].numel(), x.shape[-1], self.p, dtype=x.dtype)
        return x * mask.reshape(x.shape) / (1 - self.p)


@pytest.mark.parametrize("family", TARGETS)
def test_fused_dropout_is_pefts_with_the_fused_ops_mask(family, calls):
    plain, batch = adapted(family, lora_dropout=0.25), example(family)
    fused = fused_twin(plain)
    for layer in layers(plain):
        layer.lora_dropout["default"] = Masked(0.25)
    for layer in layers(fused):
        layer.train()
    torch.manual_seed(9)
    ours = output_and_gradients(fused, batch)
    torch.manual_seed(9)
    theirs = output_and_gradients(plain, batch)
    assert_same(ours, theirs)
    assert not torch.allclose(ours["output"], output(fused.eval(), batch))
    assert len(calls) == 4


@pytest.mark.parametrize("drops", [True, False])
def test_the_dropout_modules_own_mode_says_whether_it_drops(drops):
    fused = fused_twin(adapted(lora_dropout=0.5))
    evaluated = output(fused, BATCH)
    for layer in layers(fused):
        layer.training = not drops
        layer.lora_dropout["default"].train(drops)
    assert torch.allclose(output(fused, BATCH), evaluated) != drops


def test_gradient_checkpointing_draws_the_same_masks_again():
    plain = adapted(lora_dropout=0.25)
    fused = fused_twin(plain).train()
    torch.manual_seed(9)
    expected = output_and_gradients(fused, BATCH)
    fused.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(9)
    checkpointed = output_and_gradients(fused, BATCH)
    assert_same(checkpointed, expected, tolerance=0)


def test_gradient_checkpointing_gives_pefts_gradients():
    plain = adapted().train()
    fused = fused_twin(plain)
    for model in (plain, fused):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(output_and_gradients(fused, BATCH), output_and_gradients(plain, BATCH))


def test_a_short_training_gives_pefts_adapter():
    plain = adapted()
    fused = fused_twin(plain)
    for model in (plain, fused):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(5):
            model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(dict(fused.state_dict()), dict(plain.state_dict()), tolerance=1e-3)
    assert not torch.equal(fused.state_dict()[KEY], adapted().state_dict()[KEY])


KEY = "base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"


# The same modules, keys and files


def test_the_report_counts_layers_and_parameters():
    plain = adapted()
    report = fuse(plain)
    assert not report.skipped
    assert [(s.in_features, s.out_features, s.adapter_parameters) for s in report.swapped] == [
        (32, 32, 4 * (32 + 32)),
        (64, 32, 4 * (64 + 32)),
    ]
    assert report.swapped[0].name == "base_model.model.model.layers.0.self_attn.o_proj"
    assert (report.trained, report.total) == plain.get_nb_trainable_parameters()
    assert "2 layers swapped" in str(report)


def test_fuse_changes_neither_modules_nor_parameters_nor_keys():
    model = adapted()
    before = models.Snapshot.of(model)
    fuse(model)
    after = models.Snapshot.of(model)
    assert {name for name in before.classes if before.classes[name] != after.classes[name]} == {
        "base_model.model.model.layers.0.self_attn.o_proj",
        "base_model.model.model.layers.0.mlp.down_proj",
    }
    assert all(type(layer) is FusedPeftLinear for layer in layers(model))
    assert unfuse(model) is model
    before.check(model)
    assert all(type(layer) is PeftLinear for layer in layers(model))


def test_fuse_twice_is_fuse_once(calls):
    model = fused_twin(adapted())
    assert len(fuse(model).swapped) == 2
    output(model, BATCH)
    assert len(calls) == 2


def test_unfused_runs_pefts_own_forward(calls):
    model = adapted()
    expected = output(model, BATCH)
    fuse(model)
    assert torch.equal(output(unfuse(model), BATCH), expected)
    assert not calls


def test_saved_files_are_the_same_byte_for_byte(tmp_path):
    # One model before and after, not a copy: PEFT writes its sets of names in their iteration order,
    # which a copied set need not share.
    model = adapted(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "plain")
    fuse(model)
    model.save_pretrained(tmp_path / "fused")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names)
    assert names == sorted(path.name for path in (tmp_path / "fused").iterdir())
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes(), name


def test_a_fused_models_files_load_into_a_plain_one(tmp_path):
    fused = fused_twin(adapted())
    fused.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    torch.testing.assert_close(output(loaded, BATCH), output(fused, BATCH), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_copy_of_a_fused_model_is_fused(pickled, tmp_path, calls):
    fused = fused_twin(adapted())
    if pickled:
        torch.save(fused, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        twin = copy.deepcopy(fused)
    assert torch.equal(output(twin, BATCH), output(fused, BATCH))
    assert len(calls) == 4


# PEFT's methods


def add_second(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=["o_proj", "q_proj"]))
    shake(model, key=2, only=".second")


def disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def enable_again(model: Any) -> None:
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


def use_second(model: Any) -> None:
    add_second(model)
    model.set_adapter("second")


def use_both(model: Any) -> None:
    add_second(model)
    model.base_model.set_adapter(["default", "second"])


def delete_second(model: Any) -> None:
    use_second(model)
    model.set_adapter("default")
    model.delete_adapter("second")


def weigh(model: Any) -> None:
    add_second(model)
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "both", combination_type="cat")
    model.set_adapter("both")


def merge_second(model: Any) -> None:
    add_second(model)
    model.merge_adapter(["second"])


def merge_and_unmerge(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def disable_while_merged(model: Any) -> None:
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


def rescale(model: Any) -> None:
    for layer in layers(model):
        layer.set_scale("default", 0.3)
        layer.scale_layer(2.0)


METHODS: dict[str, tuple[Any, int]] = {  # the method, and how many layers then run fused
    "nothing": (lambda model: None, 2),
    "add_adapter": (add_second, 2),  # q_proj's has no active adapter
    "set_adapter": (use_second, 1),
    "two active adapters": (use_both, 1),
    "delete_adapter": (delete_second, 2),
    "add_weighted_adapter": (weigh, 2),
    "disable_adapter": (disable, 0),
    "enable_adapter": (enable_again, 2),
    "merge_adapter": (lambda model: model.merge_adapter(), 0),
    "merge_adapter safely": (lambda model: model.merge_adapter(safe_merge=True), 0),
    "merge_adapter by name": (merge_second, 1),
    "unmerge_adapter": (merge_and_unmerge, 2),
    "disable_adapter while merged": (disable_while_merged, 0),
    "set_scale and scale_layer": (rescale, 2),
}


@pytest.mark.parametrize("method", METHODS)
def test_pefts_methods_do_on_a_fused_model_what_they_do_on_a_plain_one(method, calls):
    apply, fused_layers = METHODS[method]
    plain = adapted()
    fused = fused_twin(plain)
    for model in (plain, fused):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, on merging more than one adapter and the like
            apply(model)
        model.eval()
    assert list(fused.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(output(fused, BATCH), output(plain, BATCH), rtol=1e-4, atol=1e-4)
    assert len(calls) == fused_layers


def test_disable_adapter_is_the_base_model_for_as_long_as_it_lasts():
    fused = fused_twin(adapted())
    y = output(fused, BATCH)
    with fused.disable_adapter():
        assert torch.equal(output(fused, BATCH), output(tiny("llama").requires_grad_(False), BATCH))
    assert torch.equal(output(fused, BATCH), y)


def test_load_adapter_loads_into_fused_layers(tmp_path, calls):
    adapted(key=5).save_pretrained(tmp_path)
    plain = adapted()
    fused = fused_twin(plain)
    for model in (plain, fused):
        model.load_adapter(tmp_path, "loaded")
        model.set_adapter("loaded")
        model.eval()
    torch.testing.assert_close(output(fused, BATCH), output(plain, BATCH), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "names", [["default", "__base__", "second"], ["second"] * 3, ["__base__"] * 3], ids=str
)
def test_adapter_names_mixes_adapters_in_a_batch(names):
    plain = adapted()
    add_second(plain)
    plain.eval()
    fused = fused_twin(plain)
    ours = fused(**BATCH, adapter_names=names)[0]
    torch.testing.assert_close(ours, plain(**BATCH, adapter_names=names)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_unloading_gives_a_plain_model_with_pefts_outputs(family, method):
    plain, batch = adapted(family), example(family)
    fused = fused_twin(plain)
    ours, theirs = getattr(fused, method)(), getattr(plain, method)()
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert torch.equal(output(ours, batch), output(theirs, batch))


def test_layers_that_peft_adds_later_run_fused_after_the_next_fuse(calls):
    model = fused_twin(adapted())
    use_second(model)
    output(model, BATCH)
    assert len(calls) == 1  # o_proj's; q_proj's is new
    assert len(fuse(model).swapped) == 3
    output(model, BATCH)
    assert len(calls) == 1 + 2


# Casts of frozen weights that autocast calls keep


def forward_under_autocast(model: Any) -> Tensor:
    with torch.autocast("cpu", dtype=BF16), torch.no_grad():
        return output(model, BATCH)


def use_base_weights(model: Any) -> None:
    """As a layer that shares them would."""
    for layer in layers(model):
        x = torch.zeros(1, layer.in_features)
        with torch.autocast("cpu", dtype=BF16), torch.no_grad():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            fused_lora.lora_linear(x, layer.base_layer.weight, a, b)


def test_merging_leaves_no_stale_cast_behind():
    """PEFT merges through weight.data, which torch's version counter does not see."""
    plain = adapted(key=1)
    fused = fused_twin(plain)
    results = []
    for model, prepare in ((plain, lambda model: None), (fused, fuse)):
        with torch.autocast("cpu", dtype=BF16):
            model.train()
            torch.autograd.backward(output(model, BATCH).float().sum())
        base = model.merge_and_unload()
        again = get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS["llama"]))
        shake(again, key=4)
        prepare(again)
        results.append(forward_under_autocast(again.eval()))
    torch.testing.assert_close(results[1], results[0], rtol=0.02, atol=0.05)


def merge(model: Any) -> None:
    model.merge_adapter()


def merge_safely(model: Any) -> None:
    model.merge_adapter(safe_merge=True)


def merge_use_and_unmerge(model: Any) -> None:
    model.merge_adapter()
    use_base_weights(model)
    model.unmerge_adapter()


def merge_while_unfused(model: Any) -> None:
    unfuse(model)
    model.merge_adapter()
    fuse(model)


@pytest.mark.parametrize(
    "edit", [merge, merge_safely, merge_and_unmerge, merge_use_and_unmerge, merge_while_unfused]
)
def test_after_every_way_to_merge_a_second_adapter_sees_the_weight_as_it_is(edit):
    model = adapted()
    fuse(model)
    forward_under_autocast(model)
    edit(model)
    for layer in layers(model):
        layer.merged_adapters.clear()  # the merged weight is the base weight from here on
    stale = forward_under_autocast(model)
    fused_lora.clear_cast_cache()
    assert torch.equal(forward_under_autocast(model), stale)


# What keeps PEFT's own forward


UNCOVERED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "adapter 'default' is a variant (DoraLinearVariant)"),
    "lora_bias": (
        {"lora_bias": True, "target_modules": ["q_proj"]},
        "adapter 'default' has a bias (lora_bias)",
    ),
    "embedding": (
        {"target_modules": ["embed_tokens"]},
        "a peft.tuners.lora.layer.Embedding is not PEFT's plain lora.Linear",
    ),
}


@pytest.mark.parametrize("case", UNCOVERED)
def test_what_is_not_covered_is_left_alone_and_listed_with_the_reason(case, calls):
    settings, reason = UNCOVERED[case]
    plain = adapted(**settings)
    model = copy.deepcopy(plain)
    report = fuse(model)
    assert not report.swapped
    assert {skip.reason for skip in report.skipped} == {reason}
    assert reason in str(report)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert_same(output_and_gradients(model, BATCH), output_and_gradients(plain, BATCH), tolerance=0)
    assert not calls


class Doubled(PeftLinear):  # type: ignore[misc]
    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


def test_a_subclass_of_pefts_layer_is_left_alone(calls):
    model = adapted()
    layers(model)[0].__class__ = Doubled
    report = fuse(model)
    (skip,) = report.skipped
    assert skip.reason == f"a {__name__}.Doubled is not PEFT's plain lora.Linear"
    output(model, BATCH)
    assert len(calls) == 1


def test_lora_on_a_convolution_is_left_alone_and_listed():
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 9, 5))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))
    report = fuse(model)
    assert [layer.name for layer in report.swapped] == ["base_model.model.2"]
    assert [skip.name for skip in report.skipped] == ["base_model.model.0"]
    assert "lora.layer.Conv2d is not PEFT's plain lora.Linear" in report.skipped[0].reason


def first_base(model: Any) -> nn.Module:
    base: nn.Module = layers(model)[0].base_layer
    return base


HOOKS: dict[str, Any] = {
    "forward hook": lambda module: module.register_forward_hook(lambda _module, _inputs, y: 2 * y),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(
        lambda _module, inputs: 2 * inputs[0]
    ),
    "overridden forward": lambda module: setattr(
        module, "forward", lambda x: 2 * nn.Linear.forward(module, x)
    ),
    "backward hook": lambda module: module.register_full_backward_hook(
        lambda _module, gradients, _: tuple(g if g is None else 2 * g for g in gradients)
    ),
}


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


HOOKS["parametrization"] = lambda module: register_parametrization(module, "weight", Double())
PARTS: dict[str, Any] = {
    "base layer": lambda layer: layer.base_layer,
    "A": lambda layer: layer.lora_A["default"],
    "B": lambda layer: layer.lora_B["default"],
}


@pytest.mark.parametrize("late", [False, True], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_inside_a_layer_are_honoured(part, hook, late, calls):
    """Activation recorders and offloading put them there: the layer runs as PEFT's does."""
    if (part, hook) in (("A", "overridden forward"), ("B", "overridden forward")):
        hook = "forward hook"
    plain = adapted()
    model = copy.deepcopy(plain)
    if late:
        fuse(model)
    for each in (plain, model):
        HOOKS[hook](PARTS[part](layers(each)[0]))
    if not late:
        report = fuse(model)
        assert [skip.name for skip in report.skipped] == ["base_model.model.model.layers.0.self_attn.o_proj"]
    assert_same(output_and_gradients(model, BATCH), output_and_gradients(plain, BATCH))
    assert len(calls) == 1


def test_a_hook_on_the_lora_layer_itself_fires():
    model, seen = fused_twin(adapted()), []
    layers(model)[0].register_forward_hook(lambda *_: seen.append(1))
    output(model, BATCH)
    assert seen == [1]


def test_an_adapter_that_is_not_covered_beside_one_that_is_keeps_pefts_forward(calls):
    plain = adapted()
    plain.add_adapter("dora", LoraConfig(r=2, target_modules=TARGETS["llama"], use_dora=True))
    shake(plain, key=2, only=".dora")
    fused = fused_twin(plain.eval())
    assert all(type(layer) is FusedPeftLinear for layer in layers(fused))
    for name, expected in (("default", 2), ("dora", 0)):
        calls.clear()
        for model in (plain, fused):
            model.set_adapter(name)
            model.eval()
        torch.testing.assert_close(output(fused, BATCH), output(plain, BATCH), rtol=1e-4, atol=1e-4)
        assert len(calls) == expected


def test_a_scaling_in_a_tensor_keeps_pefts_forward(calls):
    """As hotswapping makes it."""
    plain = adapted()
    for layer in layers(plain):
        layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert torch.equal(output(fused, BATCH), output(plain, BATCH))
    assert not calls


def test_adapters_in_another_dtype_than_the_weights_keep_pefts_forward():
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(BF16)
    report = fuse(model)
    assert {skip.reason for skip in report.skipped} == {
        "adapter 'default' is torch.bfloat16 on a weight in torch.float32"
    }


def test_a_model_without_lora_layers_is_refused():
    with pytest.raises(ValueError, match="model: LlamaForCausalLM has no LoRA layers of PEFT's"):
        fuse(tiny("llama"))


def test_another_peft_method_than_lora_is_refused():
    model = get_peft_model(tiny("llama"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="has no LoRA layers of PEFT's"):
        fuse(model)


def test_without_peft_fuse_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "fused_lora.peft_layers")
    monkeypatch.delattr(fused_lora, "peft_layers")
    monkeypatch.setitem(sys.modules, "peft.tuners.lora.layer", None)
    with pytest.raises(
        ImportError, match=r"fuse works on PEFT models and PEFT does not import .*pip install peft"
    ):
        _ = fused_lora.fuse


def test_all_linear_is_covered(calls):
    plain = adapted(target_modules="all-linear")
    fused = fused_twin(plain)
    assert_same(output_and_gradients(fused, BATCH), output_and_gradients(plain, BATCH))
    assert len(calls) == 7
