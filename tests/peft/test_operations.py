"""PEFT's methods on a fused model do what they do on a plain one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import fused_lora
from fused_lora import fuse, unfuse
from tests.models import example, output, shake, tiny
from tests.peft.parity import (
    BATCH,
    TARGETS,
    Net,
    adapted,
    adapted_net,
    assert_same,
    fused_twin,
    inputs,
    layers,
    output_and_gradients,
    same,
    trains,
)

X = inputs(3, 4)


def add_second(model: Any, **settings: Any) -> None:
    """Where the first has layers, all but one, and where it has none."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["up", "head"], **settings}
    model.add_adapter("second", LoraConfig(**config))
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


def use_both_of_one_scaling(model: Any) -> None:
    add_second(model, lora_dropout=0.5)
    model.base_model.set_adapter(["second", "default"])


def use_one_twice(model: Any) -> None:
    for layer in layers(model):
        layer._active_adapter = ["default", "default"]


def use_both_where_one_is_a_variant(model: Any) -> None:
    add_second(model, use_dora=True)
    model.base_model.set_adapter(["default", "second"])


def use_several_with_biases(model: Any) -> None:
    for key, name in enumerate(("one", "other")):
        model.add_adapter(name, LoraConfig(r=3 + key, target_modules=["up", "proj"], lora_bias=True))
        shake(model, key, only=f".{name}")
    model.base_model.set_adapter(["one", "default", "other"])


def delete_second(model: Any) -> None:
    use_second(model)
    model.set_adapter("default")
    model.delete_adapter("second")


def weigh_by_concatenation(model: Any) -> None:
    add_second(model, target_modules=["up", "proj", "head"])
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "both", combination_type="cat")
    model.set_adapter("both")


def weigh_by_svd(model: Any) -> None:
    add_second(model, target_modules=["up", "proj", "head"])
    model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "both", combination_type="svd", svd_rank=3)
    model.set_adapter("both")


def merge(model: Any) -> None:
    model.merge_adapter()


def merge_safely(model: Any) -> None:
    model.merge_adapter(safe_merge=True)


def merge_second(model: Any) -> None:
    add_second(model)
    model.merge_adapter(["second"])


def merge_both(model: Any) -> None:
    use_both(model)
    model.merge_adapter()


def merge_one_after_the_other(model: Any) -> None:
    merge_second(model)
    model.merge_adapter(["default"])


def merge_and_unmerge(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def merge_a_bias(model: Any) -> None:
    add_second(model, target_modules=["up", "proj"], lora_bias=True)
    model.merge_adapter(["second"])


def merge_a_bias_and_unmerge(model: Any) -> None:
    merge_a_bias(model)
    model.unmerge_adapter()
    model.set_adapter("second")


def disable_while_merged(model: Any) -> None:
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


def enable_after_a_forward_unmerged(model: Any) -> None:
    disable_while_merged(model)
    model(X)
    model.base_model.enable_adapter_layers()


def set_scale(model: Any) -> None:
    for layer in layers(model):
        layer.set_scale("default", 0.3)


def scale(model: Any) -> None:
    for layer in layers(model):
        layer.scale_layer(2.0)


def scale_to_nothing(model: Any) -> None:
    for layer in layers(model):
        layer.scale_layer(0)


def scale_and_unscale(model: Any) -> None:
    for layer in layers(model):
        layer.scale_layer(2.0)
        layer.unscale_layer(3)
        layer.scale_layer(-1)
        layer.unscale_layer()


def scale_in_a_tensor(model: Any) -> None:
    prepare_model_for_compiled_hotswap(model, target_rank=7)
    for layer in layers(model):
        layer.scaling["default"].fill_(0.3)


def scale_in_tensors_of_both(model: Any) -> None:
    use_both(model)
    prepare_model_for_compiled_hotswap(model)


def freeze_the_adapter(model: Any) -> None:
    model.base_model.set_requires_grad("default", requires_grad=False)


def train_the_base(model: Any) -> None:
    model.requires_grad_(True)


OPERATIONS: dict[str, tuple[Any, int]] = {  # the method, and how many of three or four layers then run fused
    "nothing": (lambda model: None, 3),
    "add_adapter": (add_second, 3),
    "set_adapter": (use_second, 2),
    "several active adapters": (use_both, 3),
    "several active adapters, in another order": (use_both_of_one_scaling, 3),
    "an active adapter twice": (use_one_twice, 3),
    "several active adapters, one a variant": (use_both_where_one_is_a_variant, 1),
    "several active adapters with biases": (use_several_with_biases, 3),
    "delete_adapter": (delete_second, 3),
    "add_weighted_adapter by concatenation": (weigh_by_concatenation, 3),
    "add_weighted_adapter by svd": (weigh_by_svd, 3),
    "disable_adapter": (disable, 0),
    "enable_adapter": (enable_again, 3),
    "merge_adapter": (merge, 0),
    "merge_adapter safely": (merge_safely, 0),
    "merge_adapter by name": (merge_second, 1),
    "merge_adapter, two": (merge_both, 0),
    "merge_adapter twice": (merge_one_after_the_other, 0),
    "unmerge_adapter": (merge_and_unmerge, 3),
    "merge_adapter with a bias": (merge_a_bias, 1),
    "unmerge_adapter with a bias": (merge_a_bias_and_unmerge, 2),
    "disable_adapter while merged": (disable_while_merged, 0),
    "enable_adapter after merging": (enable_after_a_forward_unmerged, 3),
    "set_scale": (set_scale, 3),
    "scale_layer": (scale, 3),
    "scale_layer to nothing": (scale_to_nothing, 3),
    "unscale_layer": (scale_and_unscale, 3),
    "prepare_model_for_compiled_hotswap": (scale_in_a_tensor, 3),
    "prepare_model_for_compiled_hotswap, two": (scale_in_tensors_of_both, 3),
    "set_requires_grad": (freeze_the_adapter, 3),
    "requires_grad_": (train_the_base, 3),
}


def on_both(operation: Any, plain: Any, fused: Any) -> None:
    """PEFT draws initial values and orders of sets: both sides draw the same."""
    for model in (plain, fused):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, on merging more than one adapter and the like
            operation(model)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_after_an_operation_the_models_are_the_same(operation, training):
    apply, count = OPERATIONS[operation]
    plain = adapted_net(lora_dropout=0.25)
    fused = fused_twin(plain)
    on_both(apply, plain, fused)
    for model in (plain, fused):
        model.train(training)
    same(plain, fused, X)
    assert [layer.why_not_fused() for layer in layers(fused)].count(None) == count


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_on_a_model_in_use_is_seen(operation):
    """Its weights' casts for autocast are kept, and its weights are packed."""
    apply, _ = OPERATIONS[operation]
    plain = adapted_net()
    fused = fused_twin(plain)
    for model in (plain, fused):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            model(X)
    fused_lora.pack(fused)
    on_both(apply, plain, fused)
    same(plain, fused, X, autocast=torch.bfloat16)


def test_disable_adapter_is_the_base_model_for_as_long_as_it_lasts():
    fused = fused_twin(adapted())
    y = output(fused, BATCH)
    with fused.disable_adapter():
        assert torch.equal(output(fused, BATCH), output(tiny("llama").requires_grad_(False), BATCH))
    assert torch.equal(output(fused, BATCH), y)


def test_rescale_adapter_scale_scales_for_as_long_as_it_lasts():
    plain = adapted_net()
    fused = fused_twin(plain)
    with rescale_adapter_scale(plain, 0.25), rescale_adapter_scale(fused, 0.25):
        same(plain, fused, X)
    same(plain, fused, X)


def test_load_adapter_loads_into_fused_layers(tmp_path, calls):
    adapted(key=5).save_pretrained(tmp_path)
    plain = adapted()
    fused = fused_twin(plain)
    for model in (plain, fused):
        model.load_adapter(tmp_path, "loaded")
        model.set_adapter("loaded")
        model.eval()
    same(plain, fused, BATCH)
    assert len(calls) == 2


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_hotswap_swaps_ranks_and_scalings(prepared, autocast, tmp_path):
    """PEFT writes through `.data`, or swaps the tensors of a Parameter, in layers that are in use."""
    for name, settings in {
        "small": {"r": 2, "lora_alpha": 5},
        "large": {"r": 6, "use_rslora": False},
    }.items():
        adapted_net(**settings).save_pretrained(tmp_path / name)
    plain = adapted_net()
    fused = fused_twin(plain)
    if prepared:
        on_both(lambda model: prepare_model_for_compiled_hotswap(model, target_rank=6), plain, fused)
    for name in ("small", "large", "small"):
        on_both(lambda model, name=name: hotswap_adapter(model, tmp_path / name, "default"), plain, fused)
        same(plain, fused, X, autocast)
        assert [layer.why_not_fused() for layer in layers(fused)] == [None] * 3


NAMES = [
    ["default", "__base__", "second"],
    ["second"] * 3,
    ["__base__"] * 3,
    ["default", "second", "default"],
]


@pytest.mark.parametrize("names", NAMES, ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_adapter_names_mixes_adapters_in_a_batch(names, autocast):
    plain = adapted_net(lora_dropout=0.5)
    add_second(plain)
    plain.eval()
    fused = fused_twin(plain)
    same(plain, fused, X, autocast, adapter_names=names)
    same(plain, fused, X, autocast)


def test_adapter_names_mixes_adapters_in_a_transformers_model():
    plain = adapted()
    plain.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    shake(plain, key=2, only=".second")
    fused = fused_twin(plain.eval())
    same(plain, fused, BATCH, adapter_names=["default", "__base__", "second"])


@pytest.mark.parametrize("case", ["merged", "of another length", "unknown"])
def test_adapter_names_that_peft_refuses_are_refused_in_its_words(case):
    plain = adapted_net()
    fused = fused_twin(plain)
    names = {"merged": ["default"] * 3, "of another length": ["default"], "unknown": ["default", "no", "no"]}
    messages = []
    for model in (plain, fused):
        if case == "merged":
            model.merge_adapter()
        with pytest.raises(ValueError, match="adapter") as caught:
            model(X, adapter_names=names[case])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_unloading_gives_a_plain_model_with_pefts_outputs(family, method):
    plain, batch = adapted(family), example(family)
    fused = fused_twin(plain)
    ours, theirs = getattr(fused, method)(), getattr(plain, method)()
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(output(ours, batch), output(theirs, batch))


@pytest.mark.parametrize("options", [{"safe_merge": True}, {"adapter_names": ["second"]}], ids=str)
def test_merge_and_unload_merges_what_it_is_told(options):
    plain = adapted_net()
    add_second(plain)
    fused = fused_twin(plain)
    ours, theirs = (model.merge_and_unload(**options) for model in (fused, plain))
    assert torch.equal(ours(X), theirs(X))


def test_merging_what_is_not_finite_is_refused_by_safe_merge_and_leaves_the_weights():
    plain = adapted_net()
    fused = fused_twin(plain)
    for model in (plain, fused):
        layers(model)[0].lora_A["default"].weight.data[0, 0] = float("inf")
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
    assert torch.equal(layers(fused)[0].base_layer.weight, layers(plain)[0].base_layer.weight)


def test_layers_that_peft_adds_later_run_fused_after_the_next_fuse(calls):
    plain = adapted()
    model = fused_twin(plain)
    for each in (plain, model):
        torch.manual_seed(1)
        each.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
        shake(each, key=2, only=".second")
        each.set_adapter("second")
        each.eval()
    output(model, BATCH)
    assert len(calls) == 1  # o_proj's; q_proj's is new
    assert len(fuse(model).swapped) == 3
    same(plain, model, BATCH)
    assert len(calls) == 1 + 2


# What a configuration may ask for


INITS = [True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "eva", "mica"]


@pytest.mark.parametrize("late", [False, True], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize("init", INITS, ids=str)
def test_every_init_of_the_adapter_gives_pefts_model(init, late):
    """Some of them take what the adapter holds out of the base weight, also in layers that are in use."""
    settings = {"r": 4, "target_modules": ["up", "head"], "init_lora_weights": init}

    def add(model: Any) -> None:
        model.add_adapter("second", LoraConfig(**settings))
        model.set_adapter("second")

    if late:
        plain = adapted_net()
        fused = fused_twin(plain)
        for model in (plain, fused):
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
                model(X)
        on_both(add, plain, fused)
    else:
        torch.manual_seed(0)
        plain = get_peft_model(Net(), LoraConfig(**settings))
        fused = fused_twin(plain)
    same(plain, fused, X)
    same(plain, fused, X, autocast=torch.bfloat16)


def test_pissa_saved_as_lora_is_the_same_file(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["up"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    shake(model)
    for name, prepare in (("plain", unfuse), ("fused", fuse)):
        prepare(model)
        torch.manual_seed(1)
        model.save_pretrained(tmp_path / name, path_initial_model_for_weight_conversion=tmp_path / "initial")
    plain, fused = (tmp_path / name / "adapter_model.safetensors" for name in ("plain", "fused"))
    assert plain.read_bytes() == fused.read_bytes()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x).relu())
        return y


@pytest.mark.parametrize("operation", [lambda model: None, merge, merge_and_unmerge])
def test_tied_base_weights_stay_tied(operation):
    torch.manual_seed(0)
    plain = get_peft_model(Tied(), LoraConfig(r=2, target_modules=["first", "second"]))
    shake(plain)
    fused = fused_twin(plain)
    on_both(operation, plain, fused)
    first, second = layers(fused)
    assert first.base_layer.weight is second.base_layer.weight
    same(plain, fused, X)


def test_adapters_tied_to_the_embeddings_stay_tied():
    """lora_A of lm_head is the transpose of the embedding's, in the same memory."""
    config = {"r": 4, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    plain, fused = (
        get_peft_model(tiny("llama", tie_word_embeddings=True), LoraConfig(task_type="CAUSAL_LM", **config))
        for _ in range(2)
    )
    for model in (plain, fused):
        shake(model)
    (swapped,) = fuse(fused).swapped
    assert swapped.name == "base_model.model.lm_head"
    assert fused.get_submodule(swapped.name).why_not_fused() is None
    same(plain, fused, BATCH)


def test_replicated_layers_share_a_base_and_have_adapters_of_their_own():
    plain = adapted(layer_replication=[[0, 1], [0, 1]])
    fused = fused_twin(plain)
    assert len(layers(fused)) == 4
    same(plain, fused, BATCH)


def test_trainable_tokens_train_beside_a_fused_adapter():
    plain = adapted(trainable_token_indices={"embed_tokens": [1, 3]})
    same(plain, fused_twin(plain), BATCH)


def test_all_linear_is_covered(calls):
    plain = adapted(target_modules="all-linear")
    same(plain, fused_twin(plain), BATCH)
    assert len(calls) == 7


# What is printed and saved


def test_print_trainable_parameters_prints_the_same(capsys):
    plain = adapted_net(lora_bias=True, target_modules=["up", "proj"], modules_to_save=["head"])
    printed = []
    for model in (plain, fused_twin(plain)):
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "trainable params" in printed[0]


def test_the_adapters_state_dict_is_the_same_and_loads_either_way():
    plain = adapted_net(lora_bias=True, target_modules=["up", "proj"], modules_to_save=["head"])
    fused = fused_twin(plain)
    assert_same(get_peft_model_state_dict(fused), get_peft_model_state_dict(plain), roundings=0)
    assert trains(fused) == trains(plain)


def test_a_saved_adapter_is_loaded_for_training_into_a_fused_model(tmp_path):
    adapted_net(key=5).save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    fused = fused_twin(plain)
    assert len(output_and_gradients(fused, X)) == 2 + 6
    same(plain, fused, X)
