"""Adapters on a whole model: the report, what trains, and the model given back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoRALinear, add_lora, disabled, remove_lora, set_adapter
from fused_lora.report import Report
from fused_lora.swap import lora_layers
from tests import models
from tests.models import Snapshot, example, output, shake, skeleton, tiny

steady = pytest.fixture(models.steady, autouse=True)
F32, BF16 = torch.float32, torch.bfloat16
BATCH = example("llama")


@pytest.fixture
def llama() -> Any:
    return tiny("llama", num_hidden_layers=2)


def training(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# The report


def test_the_report_says_what_was_swapped_and_what_trains():
    model = skeleton("llama", num_hidden_layers=2)
    report = add_lora(model, "o_proj+fc2", r=4, alpha=8, dropout=0.05)
    # 2 layers of q, k, v, o (32×32), gate, up, down (32×64) and two norms; embedding, head, last norm
    base = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 2 * 64 * 32 + 32
    adapters = 2 * (4 * (32 + 32) + 4 * (64 + 32))
    assert (report.trained, report.total) == (adapters, base + adapters)
    assert report.trained_share == adapters / (base + adapters)
    assert str(report).splitlines() == [
        "adapter 'default' (r=4, alpha=8, dropout=0.05): 4 layers swapped",
        "  2 × model.layers.*.self_attn.o_proj  32→32, 512 adapter parameters",
        "  2 × model.layers.*.mlp.down_proj  64→32, 768 adapter parameters",
        "1,280 of 26,016 parameters train (4.920 %)",
    ]


def test_the_report_lists_what_was_left_as_it_is_with_the_reason():
    report = add_lora(skeleton("mixtral", num_hidden_layers=2), "o_proj+fc2", r=4)
    assert [skip.name for skip in report.skipped] == [
        f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)
    ]
    assert str(report).splitlines()[2:4] == [
        "2 left as they are",
        "  2 × model.layers.*.mlp.experts.down_proj: "
        "experts held as one 3-D parameter (4×32×64), not as linears",
    ]


def test_the_report_names_each_layer_its_size_and_its_adapter():
    report = add_lora(skeleton("gpt2"), "qkv", r=4)
    (swapped,) = report.swapped
    assert swapped.name == "transformer.h.0.attn.c_attn"
    assert (swapped.in_features, swapped.out_features) == (32, 96)
    assert swapped.adapter_parameters == 4 * (32 + 96)


def test_an_empty_report_divides_by_nothing():
    assert Report("nothing").trained_share == 0.0


def test_a_tied_parameter_is_counted_once():
    tied = add_lora(skeleton("llama", tie_word_embeddings=True), "o_proj")
    untied = add_lora(skeleton("llama", tie_word_embeddings=False), "o_proj")
    assert untied.total - tied.total == 64 * 32


# What trains


def test_only_the_adapters_train(llama):
    add_lora(llama, "o_proj", r=4)
    assert training(llama) == {
        f"model.layers.{layer}.self_attn.o_proj.lora_{letter}.default" for layer in (0, 1) for letter in "AB"
    }


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_adapters_are_float32_masters_unless_asked_for_otherwise(dtype):
    model = tiny("llama", dtype)
    add_lora(model, "o_proj")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {F32}
    other = tiny("llama", dtype)
    add_lora(other, "o_proj", dtype=dtype)
    assert {p.dtype for p in other.parameters() if p.requires_grad} == {dtype}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_short_training_lowers_the_loss_and_moves_nothing_else(dtype, dropout):
    torch.manual_seed(0)
    model = tiny("llama", dtype).train()
    add_lora(model, "o_proj+fc2", r=8, dropout=dropout)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**BATCH, labels=BATCH["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], values) for name, values in frozen.items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    """Dropout draws the same mask again, and what is before the first adapter needs no gradient."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny("llama", num_hidden_layers=2).train()
        add_lora(model, "o_proj+fc2", r=4, dropout=0.25)
        shake(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(4)
        torch.autograd.backward(output(model, BATCH).square().sum())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[1], gradients[0])


# In place


def test_the_layers_stay_the_same_objects_under_the_same_names(llama):
    before = {name: module for name, module in llama.named_modules() if ".lora_" not in name}
    keys = list(llama.state_dict())
    add_lora(llama, "all", r=4)
    now = dict(llama.named_modules())
    assert all(now[name] is module for name, module in before.items())
    assert [key for key in llama.state_dict() if ".lora_" not in key] == keys


def test_a_hook_on_a_linear_still_fires(llama):
    seen = []
    llama.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: seen.append("before"))
    add_lora(llama, "o_proj", r=4)
    llama.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: seen.append("after"))
    output(llama, BATCH)
    assert seen == ["before", "after"]


def test_a_linear_registered_twice_gets_one_adapter():
    linear = nn.Linear(8, 8)
    model = nn.ModuleDict(
        {"first": nn.ModuleDict({"o_proj": linear}), "second": nn.ModuleDict({"o_proj": linear})}
    )
    report = add_lora(model, "o_proj", r=2)
    assert [layer.name for layer in report.swapped] == ["first.o_proj"]
    assert model["second"]["o_proj"] is model["first"]["o_proj"] is linear  # type: ignore[index]
    assert report.trained == 2 * (8 + 8)
    remove_lora(model)
    assert type(linear) is nn.Linear


# Taken off


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "bert"])
def test_remove_gives_the_model_back(family):
    """The same modules, classes and Parameters, requires_grad, keys, and outputs bit for bit."""
    model, batch = tiny(family), example(family)
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    before, y = Snapshot.of(model), output(model, batch)
    add_lora(model, "all", r=4)
    add_lora(model, "o_proj", r=2, adapter_name="second")
    shake(model)
    assert remove_lora(model) is model
    before.check(model)
    assert torch.equal(output(model, batch), y)


def test_after_remove_adapters_can_be_put_on_again(llama):
    before = Snapshot.of(llama)
    for _ in range(2):
        add_lora(llama, "o_proj", r=4)
        remove_lora(llama)
    before.check(llama)


def test_remove_forgets_what_trained_before_the_adapters_were_put_on(llama):
    add_lora(llama, "o_proj")
    remove_lora(llama)
    llama.requires_grad_(False)
    add_lora(llama, "o_proj")
    remove_lora(llama)
    assert not training(llama)


def test_remove_freezes_nothing_in_a_model_that_was_built_with_lora_layers():
    """add_lora never saw it, so what trained is what trains."""
    model = nn.Sequential(nn.Linear(8, 8), LoRALinear(8, 8, r=2))
    model[1].weight.requires_grad_(False)
    remove_lora(model)
    assert type(model[1]) is nn.Linear
    assert training(model) == {"0.weight", "0.bias", "1.bias"}


@pytest.mark.parametrize("parts", [["model"], ["model", ""], ["", "model"]], ids=str)
def test_adapters_put_on_a_part_of_a_model_come_off_with_the_whole(llama, parts):
    before = Snapshot.of(llama)
    for part in parts:
        add_lora(llama.get_submodule(part), "o_proj", r=4, adapter_name=f"of {part}")
    remove_lora(llama)
    before.check(llama)


# Several adapters


def test_a_second_adapter_becomes_the_only_one_active_and_trained(llama):
    add_lora(llama, "o_proj", r=4)
    add_lora(llama, "o_proj+fc2", r=2, adapter_name="second")
    assert {layer.active_adapters for layer in lora_layers(llama).values()} == {("second",)}
    assert training(llama) == {name for name, _ in llama.named_parameters() if name.endswith(".second")}
    assert len(training(llama)) == 2 * 4


def test_the_same_name_with_other_targets_extends_the_adapter(llama):
    add_lora(llama, "o_proj", r=4)
    shake(llama)
    alone = output(llama, BATCH)
    report = add_lora(llama, "fc2", r=2, alpha=4)
    assert [layer.name for layer in report.swapped] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    torch.testing.assert_close(output(llama, BATCH), alone)
    assert report.trained == 2 * (4 * (32 + 32) + 2 * (64 + 32))
    assert {name.split(".")[-3] for name in training(llama)} == {"o_proj", "down_proj"}
    assert all(layer.active_adapters == ("default",) for layer in lora_layers(llama).values())


def test_set_adapter_switches_a_whole_model(llama):
    frozen = output(llama, BATCH)
    expected = {}
    for name, targets in (("first", "o_proj"), ("second", "fc2")):
        add_lora(llama, targets, r=4, adapter_name=name)
        shake(llama, only=f".{name}")
        expected[name] = output(llama, BATCH)
    assert not torch.allclose(expected["first"], expected["second"])
    for name in ("first", "second"):
        set_adapter(llama, name)
        torch.testing.assert_close(output(llama, BATCH), expected[name])
        assert not torch.allclose(output(llama, BATCH), frozen)
        assert training(llama) == {n for n, _ in llama.named_parameters() if n.endswith(f".{name}")}


def test_disabled_it_is_the_frozen_model(llama):
    frozen = output(llama.requires_grad_(False), BATCH)
    add_lora(llama, "all", r=4)
    shake(llama)
    adapted = output(llama, BATCH)
    with disabled(llama):
        assert torch.equal(output(llama, BATCH), frozen)
    assert torch.equal(output(llama, BATCH), adapted)


def test_disabled_ends_with_the_context_even_after_an_error(llama):
    add_lora(llama, "o_proj")
    with pytest.raises(ZeroDivisionError), disabled(llama):
        raise ZeroDivisionError
    assert all(layer.enabled for layer in lora_layers(llama).values())


def test_disabled_leaves_layers_that_were_off_before_off(llama):
    add_lora(llama, "o_proj")
    first, second = lora_layers(llama).values()
    first.enabled = False
    with disabled(llama):
        assert not second.enabled
    assert (first.enabled, second.enabled) == (False, True)


# Refusals, with nothing changed


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "r": ({"r": 0}, ValueError, "r must be a whole number ≥ 1"),
    "alpha": ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
    "dropout": ({"dropout": 2.0}, ValueError, r"dropout must be in \[0, 1\]"),
    "targets": ({"targets": "no_such"}, ValueError, "names nothing in this model"),
    "name with a dot": ({"adapter_name": "a.b"}, ValueError, "non-empty string without dots, got 'a.b'"),
    "empty name": ({"adapter_name": ""}, ValueError, "non-empty string without dots, got ''"),
    "name of a method": ({"adapter_name": "train"}, ValueError, "name.*'train'"),
    "integral dtype": ({"dtype": torch.int8}, (TypeError, ValueError), "dtype"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_add_lora_refuses_leaves_the_model_as_it_was(llama, case):
    arguments, kind, message = REFUSED[case]
    before = Snapshot.of(llama)
    with pytest.raises(kind, match=message):
        add_lora(llama, **{"targets": "o_proj", **arguments})
    before.check(llama)


def test_an_adapter_of_that_name_is_refused_before_anything_changes(llama):
    add_lora(llama, "o_proj", r=4)
    before = Snapshot.of(llama)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.o_proj has an adapter 'default' already"):
        add_lora(llama, "fc2+o_proj", r=4)
    before.check(llama)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: add_lora(model, "fc2", adapter_name="second"),
        lambda model: add_lora(model, "fc2"),
        lambda model: disabled(model).__enter__(),
        lambda model: set_adapter(model, "default"),
    ],
    ids=["add another", "extend", "disable", "switch"],
)
def test_what_a_merged_model_refuses_leaves_it_as_it_was(llama, change):
    add_lora(llama, "o_proj", r=4)
    shake(llama)
    fused_lora.merge(llama)
    before, y = Snapshot.of(llama), output(llama, BATCH)
    with pytest.raises(RuntimeError, match="merged"):
        change(llama)
    before.check(llama)
    assert torch.equal(output(llama, BATCH), y)


def test_an_unknown_adapter_is_refused_by_naming_those_there_are(llama):
    add_lora(llama, "o_proj", adapter_name="b")
    add_lora(llama, "fc2", adapter_name="a")
    with pytest.raises(KeyError, match="no adapter 'c' in this model; it has 'a', 'b'"):
        set_adapter(llama, "c")


@pytest.mark.parametrize(
    "use",
    [remove_lora, lambda model: set_adapter(model, "default"), lambda model: disabled(model).__enter__()],
    ids=["remove", "switch", "disable"],
)
def test_a_model_without_adapters_is_refused(llama, use):
    with pytest.raises(ValueError, match="no layer of it has an adapter"):
        use(llama)
