"""Adapter files: PEFT reads ours, we read PEFT's, and what does not fit is refused by name."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import fused_lora
from fused_lora import AdapterFileError, LoRALinear, LoRASettings, add_lora, load_adapter, save_adapter
from fused_lora.peft_files import CONFIG, TENSORS
from fused_lora.swap import lora_layers
from tests import models
from tests.models import Snapshot, example, output, shake, skeleton, tiny

steady = pytest.fixture(models.steady, autouse=True)
F32, BF16 = torch.float32, torch.bfloat16
O_PROJ = "model.layers.{}.self_attn.o_proj"
KEY = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"


def adapted(
    family: str = "llama", targets: Any = "o_proj+fc2", dtype: torch.dtype = F32, **settings: Any
) -> Any:
    model = tiny(family, dtype)
    add_lora(model, targets, **{"r": 4, "alpha": 6.0, **settings})
    shake(model)
    return model


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype = F32) -> None:
    rtol, atol = (1e-4, 1e-4) if dtype == F32 else (0.02, 0.08)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
    return config


# To PEFT


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("targets", ["o_proj", "o_proj+fc2", "all"])
def test_peft_loads_what_we_save(family, targets, tmp_path):
    model, batch = adapted(family, targets), example(family)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny(family), tmp_path).eval()
    close(output(loaded, batch), output(model, batch))


@pytest.mark.parametrize("tied", [False, True])
def test_peft_loads_a_head_that_we_save(tied, tmp_path):
    model = tiny("llama", tie_word_embeddings=tied)
    add_lora(model, ["lm_head"], r=4)
    shake(model)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", tie_word_embeddings=tied), tmp_path).eval()
    close(output(loaded, example("llama")), output(model, example("llama")))


def test_we_load_a_head_that_peft_saves(tmp_path):
    theirs = peft_model(tiny("llama"), target_modules=["lm_head"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    model = tiny("llama")
    assert load_adapter(model, tmp_path) == ["lm_head"]
    close(output(model, example("llama")), output(theirs, example("llama")))


@pytest.mark.parametrize("settings", [{"rslora": True}, {"alpha": -3.5}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_peft_loads_every_setting(settings, dtype, tmp_path):
    model, batch = adapted(dtype=dtype, **settings), example("llama")
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", dtype), tmp_path)
    close(output(loaded.eval(), batch), output(model, batch), dtype)
    assert loaded.peft_config["default"].lora_dropout == settings.get("dropout", 0.0)


def test_peft_loads_ranks_and_alphas_that_differ_between_layers(tmp_path):
    model = tiny("llama", num_hidden_layers=2)
    add_lora(model, ["0.self_attn.o_proj"], r=4, alpha=6)
    add_lora(model, ["1.self_attn.o_proj", "1.mlp.down_proj"], r=2, alpha=5)
    shake(model)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", num_hidden_layers=2), tmp_path).eval()
    close(output(loaded, example("llama")), output(model, example("llama")))


def test_peft_trains_on_from_what_we_save(tmp_path):
    save_adapter(adapted(), tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    assert loaded.get_nb_trainable_parameters()[0] == 4 * (32 + 32) + 4 * (64 + 32)


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("llama", "o_proj", ["o_proj"]),
        ("llama", "o_proj+fc2", ["down_proj", "o_proj"]),
        ("llama", ["0.mlp.down_proj"], ["0.mlp.down_proj"]),
        ("gpt2", "o_proj", ["attn.c_proj"]),
        ("gpt2", "fc2", ["mlp.c_proj"]),
        ("gpt2", "o_proj+fc2", ["c_proj"]),
        ("bert", "fc2", ["0.output.dense", "1.output.dense"]),  # output.dense is attention.output.dense too
        ("t5", "o_proj", ["o"]),
    ],
    ids=str,
)
def test_target_modules_are_the_shortest_names_that_hit_just_these_layers(family, targets, names, tmp_path):
    sizes: dict[str, Any] = {
        "n_layer" if family == "gpt2" else "num_layers" if family == "t5" else "num_hidden_layers": 2
    }
    model = tiny(family, **sizes)
    add_lora(model, targets, r=2)
    save_adapter(model, tmp_path)
    config = config_of(tmp_path)
    assert config["target_modules"] == names
    hit = get_peft_model(skeleton(family, **sizes), LoraConfig(target_modules=names)).targeted_module_names
    assert sorted(hit) == sorted(lora_layers(model))


class Nested(nn.Module):
    """One linear's whole path, "o", is the end of another's, "a.o"."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.ModuleDict({"o": nn.Linear(8, 8)})
        self.o = nn.Linear(8, 8)

    def forward(self, x):
        return self.o(self.a["o"](x))


def test_a_layer_whose_whole_path_ends_anothers_is_told_apart(tmp_path):
    model, x = Nested(), torch.randn(2, 8)
    add_lora(model, "o", r=2)
    shake(model)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(Nested(), tmp_path)
    assert loaded.targeted_module_names == ["o"]
    close(loaded(x), model(x))


def test_a_layer_whose_whole_path_ends_anothers_keeps_its_own_settings(tmp_path):
    model, x = Nested(), torch.randn(2, 8)
    add_lora(model, r"a\.o", r=2, alpha=3)
    add_lora(model, "o", r=2, alpha=5)
    shake(model)
    save_adapter(model, tmp_path)
    close(PeftModel.from_pretrained(Nested(), tmp_path)(x), model(x))
    ours = Nested()
    load_adapter(ours, tmp_path)
    close(ours(x), model(x))


@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("clip", None), ("vit", None)],
)
def test_the_configuration_says_what_the_model_is(family, task, tmp_path):
    save_adapter(adapted(family), tmp_path)
    config = config_of(tmp_path)
    assert config["task_type"] == task
    assert config["fan_in_fan_out"] == (family == "gpt2")
    assert config["base_model_name_or_path"] is None


def test_a_decoder_that_sees_is_not_called_an_encoder_and_a_decoder(tmp_path):
    """LlavaForConditionalGeneration: what it is called is not what it is."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
    )
    config = transformers.LlavaConfig(text_config=models.configure("llama"), vision_config=vision)
    model = transformers.LlavaForConditionalGeneration(config)
    add_lora(model, "o_proj", r=2)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["task_type"] in (None, "CAUSAL_LM")


def test_the_files_hold_the_adapter_and_nothing_else(tmp_path):
    model = adapted(targets="o_proj")
    save_adapter(model, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, TENSORS]
    tensors = load_file(tmp_path / "new" / "folder" / TENSORS)
    assert sorted(tensors) == [KEY.format("A"), KEY.format("B")]
    layer = lora_layers(model)[O_PROJ.format(0)]
    assert torch.equal(tensors[KEY.format("A")], layer.lora_A["default"])
    assert torch.equal(tensors[KEY.format("B")], layer.lora_B["default"])


def test_our_files_have_the_keys_of_pefts(tmp_path):
    save_adapter(adapted(), tmp_path / "ours")
    peft_model(tiny("llama")).save_pretrained(tmp_path / "pefts")
    ours, pefts = load_file(tmp_path / "ours" / TENSORS), load_file(tmp_path / "pefts" / TENSORS)
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in pefts.items()}


def test_saving_again_replaces_the_files(tmp_path):
    save_adapter(adapted(), tmp_path)
    save_adapter(adapted(targets="fc2", r=2), tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["down_proj"]
    assert {tensor.shape[0] for key, tensor in load_file(tmp_path / TENSORS).items() if "lora_A" in key} == {
        2
    }


def test_one_of_several_adapters_is_saved_by_name(tmp_path):
    model = adapted(targets="o_proj")
    add_lora(model, "fc2", r=2, adapter_name="second")
    save_adapter(model, tmp_path, "second")
    assert config_of(tmp_path)["target_modules"] == ["down_proj"]


def test_a_merged_model_saves_its_adapter(tmp_path):
    model = adapted()
    expected = output(model, example("llama"))
    fused_lora.merge(model)
    save_adapter(model, tmp_path)
    other = tiny("llama")
    load_adapter(other, tmp_path)
    close(output(other, example("llama")), expected)


# From PEFT


def peft_model(base: Any, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["o_proj", "down_proj"]}
    model = get_peft_model(base, LoraConfig(**{**defaults, **settings}))
    shake(model)
    return model.eval()


GPT2 = {"target_modules": ["attn.c_proj", "mlp.c_fc"], "fan_in_fan_out": True}
FROM_PEFT: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "llama": ("llama", F32, {}),
    "gpt2": ("gpt2", F32, GPT2),
    "rslora": ("llama", F32, {"use_rslora": True}),
    "patterns": (
        "llama",
        F32,
        {
            "rank_pattern": {"down_proj": 8},
            "alpha_pattern": {"self_attn.o_proj": 1, "o_proj": 9, "^model.*down_proj": 3},
        },
    ),
    "patterns that fit no end": (
        "llama",
        F32,
        {"alpha_pattern": {"self_attn": 1, "model.layers": 3}},
    ),
    "gpt2's patterns": (
        "gpt2",
        F32,
        {**GPT2, "rank_pattern": {r"h\.\d+\.attn.c_proj": 2}, "alpha_pattern": {"c_fc": 1}},
    ),
    "16-bit weights": ("llama", BF16, {}),
    "all-linear": ("llama", F32, {"target_modules": "all-linear"}),
    "a layer": ("llama", F32, {"layers_to_transform": [0]}),
    "dropout": ("llama", F32, {"lora_dropout": 0.5}),
    "another start": ("llama", F32, {"init_lora_weights": "gaussian"}),
    "a start from the base weight": ("llama", F32, {"init_lora_weights": "mica"}),
}


@pytest.mark.parametrize("case", FROM_PEFT)
def test_we_load_what_peft_saves(case, tmp_path):
    family, dtype, settings = FROM_PEFT[case]
    peft_model(tiny(family, dtype), **settings).save_pretrained(tmp_path)
    # As PEFT itself reads it: its file may hold patterns in another order than the model had them.
    theirs, batch = PeftModel.from_pretrained(tiny(family, dtype), tmp_path).eval(), example(family)
    model = tiny(family, dtype)
    paths = load_adapter(model, tmp_path)
    close(output(model, batch), output(theirs, batch), dtype)
    assert sorted(paths) == sorted(theirs.targeted_module_names)


def test_16_bit_adapters_are_loaded_into_masters_and_come_out_as_they_were(tmp_path):
    theirs = get_peft_model(
        tiny("llama", BF16), LoraConfig(r=4, target_modules=["o_proj"]), autocast_adapter_dtype=False
    )
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    assert {tensor.dtype for tensor in tensors.values()} == {BF16}
    for dtype, expected in ((None, F32), (BF16, BF16)):
        model = tiny("llama", BF16)
        load_adapter(model, tmp_path, dtype=dtype)
        a = lora_layers(model)[O_PROJ.format(0)].lora_A["default"]
        assert a.dtype == expected
        assert torch.equal(a.to(BF16), tensors[KEY.format("A")])
        close(output(model, example("llama")), output(theirs.eval(), example("llama")), BF16)


def test_an_adapter_that_moved_the_base_weights_is_not_loaded_as_if_it_had_not(tmp_path):
    """PiSSA and its kind start by taking the adapter out of the base weights: on the plain base, the
    matrices alone compute something else than PEFT does."""
    theirs = get_peft_model(
        tiny("llama"), LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights="pissa")
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="init_lora_weights='pissa' is not supported"):
        load_adapter(tiny("llama"), tmp_path)


# There and back


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    model = adapted(targets="all", rslora=True, dropout=0.25)
    save_adapter(model, tmp_path)
    other = tiny("llama")
    paths = load_adapter(other, tmp_path, "other name")
    assert sorted(paths) == sorted(lora_layers(model))
    for path, layer in lora_layers(model).items():
        twin = lora_layers(other)[path]
        assert twin.settings["other name"] == layer.settings["default"]
        assert torch.equal(twin.lora_A["other name"], layer.lora_A["default"])
        assert torch.equal(twin.lora_B["other name"], layer.lora_B["default"])
    assert torch.equal(output(other, example("llama")), output(model, example("llama")))
    save_adapter(other, tmp_path / "again", "other name")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_adapters_are_saved_in_their_own_dtype(tmp_path):
    save_adapter(adapted(dtype=BF16), tmp_path / "masters")
    assert {tensor.dtype for tensor in load_file(tmp_path / "masters" / TENSORS).values()} == {F32}
    model = tiny("llama", BF16)
    add_lora(model, "o_proj", r=4, dtype=BF16)
    shake(model)
    save_adapter(model, tmp_path / "halves")
    tensors = load_file(tmp_path / "halves" / TENSORS)
    layer = lora_layers(model)[O_PROJ.format(0)]
    assert {tensor.dtype for tensor in tensors.values()} == {BF16}
    assert torch.equal(tensors[KEY.format("B")], layer.lora_B["default"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The files of an o_proj adapter with r=4, alpha=6 of the tiny Llama."""
    directory: Path = tmp_path_factory.mktemp("saved")
    save_adapter(adapted(targets="o_proj"), directory)
    return directory


@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_trains_where_asked_and_nothing_else_does(saved, trainable):
    model = adapted(targets="fc2")
    load_adapter(model, saved, "loaded", trainable=trainable)
    expected = {f"{O_PROJ.format(0)}.lora_{letter}.loaded" for letter in "AB"} if trainable else set()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected


def test_a_loaded_adapter_is_the_active_one(saved):
    model = adapted(targets="o_proj+fc2")
    load_adapter(model, saved, "loaded")
    active = {name.split(".")[-1]: layer.active_adapters for name, layer in lora_layers(model).items()}
    assert active == {"o_proj": ("loaded",), "down_proj": ()}


def test_after_loading_the_model_can_be_given_back(saved):
    model = tiny("llama")
    before = Snapshot.of(model)
    load_adapter(model, saved)
    fused_lora.remove_lora(model)
    before.check(model)


def test_a_path_may_be_a_string(saved):
    assert load_adapter(tiny("llama"), str(saved)) == [O_PROJ.format(0)]


# Refusals


def edit_config(**changes: Any) -> Any:
    def edit(directory: Path) -> None:
        (directory / CONFIG).write_text(json.dumps({**config_of(directory), **changes}))

    return edit


def edit_tensors(change: Any) -> Any:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / TENSORS)
        change(tensors)
        save_file(tensors, directory / TENSORS)

    return edit


def write(name: str, content: bytes) -> Any:
    return lambda directory: (directory / name).write_bytes(content)


def truncate(directory: Path) -> None:
    path = directory / TENSORS
    path.write_bytes(path.read_bytes()[:-40])


def longer_than_it_is(directory: Path) -> None:
    """A header whose last tensor ends beyond the file."""
    content = (directory / TENSORS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[KEY.format("B")]["data_offsets"][1] += 4096
    header[KEY.format("B")]["shape"][0] += 4096 // 16
    told = json.dumps(header).encode()
    (directory / TENSORS).write_bytes(len(told).to_bytes(8, "little") + told + content[8 + length :])


class Opened:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('a pickle was read')",)


def only_a_pickle(directory: Path) -> None:
    (directory / TENSORS).unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Opened()))


def a_pickle_by_that_name(directory: Path) -> None:
    (directory / TENSORS).write_bytes(pickle.dumps(Opened()))


def with_value(value: float) -> Any:
    return edit_tensors(lambda tensors: tensors[KEY.format("B")][3, 1:2].fill_(value))


def moved(path: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for letter in "AB":
            tensors[f"base_model.model.{path}.lora_{letter}.weight"] = tensors.pop(KEY.format(letter))

    return edit_tensors(change)


def empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


A, B = KEY.format("A"), KEY.format("B")
DAMAGE: dict[str, tuple[Any, str]] = {
    "no configuration": (lambda d: (d / CONFIG).unlink(), "holds no adapter_config.json"),
    "no directory": (shutil.rmtree, "holds no adapter_config.json"),
    "not JSON": (write(CONFIG, b"{"), "adapter_config.json is not JSON"),
    "not text": (write(CONFIG, b"\xff\xfe\x00"), "adapter_config.json is not JSON"),
    "not an object": (write(CONFIG, b"[1]"), "peft_type must be 'LORA', got 'list'"),
    "another method": (edit_config(peft_type="IA3"), "peft_type must be 'LORA', got 'IA3'"),
    "no rank": (edit_config(r=None), "r must be a number, got None"),
    "rank of text": (edit_config(r="4"), "r must be a number, got '4'"),
    "rank of zero": (edit_config(r=0), "r must be a whole number ≥ 1, got 0"),
    "no alpha": (edit_config(lora_alpha=None), "lora_alpha must be a number, got None"),
    "alpha not finite": (edit_config(lora_alpha=math.nan), "alpha"),
    "dropout too large": (edit_config(lora_dropout=1.5), "dropout"),
    "dropout of text": (edit_config(lora_dropout="none"), "dropout"),
    "rank pattern no table": (edit_config(rank_pattern=["o_proj"]), "rank_pattern"),
    "rank pattern of text": (edit_config(rank_pattern={"o_proj": "four"}), "o_proj"),
    "alpha pattern of text": (edit_config(alpha_pattern={"o_proj": "six"}), "alpha"),
    "pattern that is none": (edit_config(alpha_pattern={"o_proj(": 1}), "alpha_pattern"),
    "DoRA": (edit_config(use_dora=True), "use_dora=True is not supported"),
    "lora_bias": (edit_config(lora_bias=True), "lora_bias=True is not supported"),
    "bias": (edit_config(bias="all"), "bias='all' is not supported, only 'none'"),
    "modules to save": (edit_config(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\] is not"),
    "token indices": (edit_config(trainable_token_indices=[1]), r"trainable_token_indices=\[1\] is not"),
    "parameters": (edit_config(target_parameters=["w"]), r"target_parameters=\['w'\] is not supported"),
    "replication": (edit_config(layer_replication=[[0, 1]]), "layer_replication=.* is not supported"),
    "no tensors' file": (lambda d: (d / TENSORS).unlink(), "holds no adapter_model.safetensors"),
    "truncated": (truncate, "adapter_model.safetensors cannot be read"),
    "empty file": (write(TENSORS, b""), "adapter_model.safetensors cannot be read"),
    "a header that lies": (longer_than_it_is, "adapter_model.safetensors cannot be read"),
    "a pickle alone": (
        only_a_pickle,
        r"holds no adapter_model.safetensors \(pickled adapters are not read\)",
    ),
    "a pickle by that name": (a_pickle_by_that_name, "adapter_model.safetensors cannot be read"),
    "no tensors": (edit_tensors(empty), "holds no tensors"),
    "whole numbers": (
        edit_tensors(lambda tensors: tensors.update({B: torch.ones(32, 4, dtype=torch.int32)})),
        "o_proj.lora_B must be floating point, got torch.int32",
    ),
    "unknown tensor": (
        edit_tensors(lambda tensors: tensors.update(extra=torch.zeros(2))),
        "unexpected tensor 'extra'",
    ),
    "tensor of DoRA": (
        edit_tensors(lambda t: t.update({A.replace("lora_A", "lora_magnitude_vector"): torch.zeros(2)})),
        "unexpected tensor 'base_model.*o_proj.lora_magnitude_vector.weight'",
    ),
    "half missing": (
        edit_tensors(lambda tensors: tensors.pop(B)),
        "tensor base_model.*o_proj.lora_B.weight is",
    ),
    "a layer missing": (
        edit_config(target_modules=["o_proj", "down_proj"]),
        "has model.layers.0.mlp.down_proj in target_modules, and its tensors are missing",
    ),
    "a layer too many": (
        edit_config(target_modules=["q_proj"]),
        "model.layers.0.self_attn.q_proj in target_modules, and its tensors are missing",
    ),
    "another layer": (
        edit_tensors(lambda t: t.update({key.replace("o_proj", "q_proj"): t[key].clone() for key in (A, B)})),
        "holds tensors of .*q_proj, which adapter_config.json does not have in target_modules",
    ),
    "targets of numbers": (edit_config(target_modules=[1]), r"target_modules must be names.*got \[1\]"),
    "targets that are no pattern": (
        edit_config(target_modules="o_proj("),
        r"target_modules is a bad pattern 'o_proj\('",
    ),
    "rslora of text": (edit_config(use_rslora="no"), "use_rslora must be true or false, got 'no'"),
    "alpha of truth": (edit_config(lora_alpha=True), "lora_alpha must be a number, got True"),
    "other rank": (edit_config(r=8), r"o_proj.lora_A must have shape \[8, 32\] .*got \[4, 32\]"),
    "other rank by pattern": (
        edit_config(rank_pattern={"o_proj": 2}),
        r"o_proj.lora_A must have shape \[2, 32\]",
    ),
    "other width": (
        edit_tensors(lambda tensors: tensors.update({B: torch.zeros(31, 4)})),
        r"o_proj.lora_B must have shape \[32, 4\] .*32→32.*got \[31, 4\]",
    ),
    "not a number": (
        with_value(math.nan),
        r"o_proj.lora_B holds values that are not finite: nan at \[3, 1\]",
    ),
    "infinite": (with_value(math.inf), r"o_proj.lora_B holds values that are not finite: inf at \[3, 1\]"),
    "another model's": (
        moved("model.layers.7.self_attn.o_proj"),
        "no module 'model.layers.7.self_attn.o_proj'",
    ),
    "no linear": (moved("model.norm"), "model.norm cannot carry an adapter: a LlamaRMSNorm is not a plain"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_files_that_do_not_fit_are_refused_by_name_and_leave_the_model_as_it_was(case, saved, tmp_path):
    damage, message = DAMAGE[case]
    directory = shutil.copytree(saved, tmp_path / "files")
    damage(directory)
    model = tiny("llama")
    before = Snapshot.of(model)
    with pytest.raises(AdapterFileError, match=f"{directory}: .*{message}"):
        load_adapter(model, directory)
    before.check(model)


@pytest.mark.parametrize("case", DAMAGE)
def test_files_that_are_refused_leave_the_adapter_that_runs_bit_for_bit(case, saved, tmp_path):
    damage, message = DAMAGE[case]
    directory = shutil.copytree(saved, tmp_path / "files")
    damage(directory)
    model = adapted(targets="o_proj")
    before = {name: (p, p._version, p.detach().clone()) for name, p in model.named_parameters()}
    y = output(model, example("llama"))
    for options in ({}, {"rank": 4}):
        with pytest.raises(AdapterFileError, match=message):
            load_adapter(model, directory, replace=True, **options)
    now = dict(model.named_parameters())
    assert list(now) == list(before)
    for name, (parameter, version, values) in before.items():
        assert now[name] is parameter
        assert parameter._version == version
        assert torch.equal(parameter, values)
    assert torch.equal(output(model, example("llama")), y)


def test_numbers_that_the_asked_for_dtype_does_not_hold_are_refused(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "files")
    with_value(1e6)(directory)
    model = tiny("llama")
    with pytest.raises(AdapterFileError, match=r"lora_B in torch.float16 .*: inf at \[3, 1\]"):
        load_adapter(model, directory, dtype=torch.float16)
    assert not lora_layers(model)


def merged(targets: str) -> Any:
    def prepare(model: nn.Module) -> None:
        add_lora(model, targets, r=4)
        shake(model)
        fused_lora.merge(model)

    return prepare


REFUSED: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "name taken": (
        lambda model: add_lora(model, "o_proj", r=4),
        {},
        ValueError,
        "o_proj has an adapter 'default' already",
    ),
    "merged": (
        merged("o_proj"),
        {"adapter_name": "new"},
        RuntimeError,
        "merged",
    ),
    "merged elsewhere": (
        merged("fc2"),
        {"adapter_name": "new"},
        RuntimeError,
        "merged",
    ),
    "name with a dot": (lambda model: None, {"adapter_name": "a.b"}, ValueError, "without dots"),
    "name of a method": (lambda model: None, {"adapter_name": "train"}, ValueError, "name.*'train'"),
    "integral dtype": (lambda model: None, {"dtype": torch.int8}, (TypeError, ValueError), "dtype"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_call_that_is_refused_leaves_the_model_as_it_was(case, saved):
    prepare, arguments, kind, message = REFUSED[case]
    model = tiny("llama")
    prepare(model)
    before = Snapshot.of(model)
    active = [layer.active_adapters for layer in lora_layers(model).values()]
    with pytest.raises(kind, match=message):
        load_adapter(model, saved, **arguments)
    before.check(model)
    assert [layer.active_adapters for layer in lora_layers(model).values()] == active


def test_a_model_that_is_the_layer_itself_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="it is the adapted layer itself"):
        save_adapter(LoRALinear(4, 4, r=2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_not_there_is_not_saved(tmp_path):
    with pytest.raises(KeyError, match="no adapter 'other' in this model"):
        save_adapter(adapted(), tmp_path, "other")
    assert not list(tmp_path.iterdir())


def test_layers_that_differ_in_what_a_file_holds_once_are_not_saved(tmp_path):
    model = adapted(targets="o_proj")
    add_lora(model, "fc2", r=4, rslora=True)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.down_proj differs in rslora or dropout"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


class Full(OSError):
    pass


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("what", ["tensors", "configuration"])
def test_when_writing_fails_what_was_there_is_still_there_and_nothing_else(
    what, earlier, tmp_path, monkeypatch
):
    if earlier:
        save_adapter(adapted(targets="fc2"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = adapted(targets="o_proj")

    def full(path: Any) -> None:
        Path(path).write_bytes(b"half")
        raise Full("no space left on device")

    if what == "tensors":
        monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, path, **_: full(path))
    else:
        write_text = Path.write_text
        monkeypatch.setattr(
            Path,
            "write_text",
            lambda path, *args, **kwargs: (
                full(path) if CONFIG in path.name else write_text(path, *args, **kwargs)
            ),
        )
    with pytest.raises(Full):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_adapter_put_on_by_hand_is_saved_too(tmp_path):
    layer = LoRALinear(8, 8)
    layer.add_adapter("default", LoRASettings(2, alpha=3.0))
    model = nn.Sequential(nn.Linear(8, 8), layer)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["1"]


@pytest.mark.parametrize(
    "use", [lambda path: save_adapter(adapted(), path), lambda path: load_adapter(tiny("llama"), path)]
)
def test_without_safetensors_both_say_what_to_install(use, saved, tmp_path, monkeypatch):
    directory = shutil.copytree(saved, tmp_path / "files")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"safetensors does not import .*pip install safetensors"):
        use(directory)
