"""fuse and unfuse: the same modules, keys and files, and a report."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as PeftLinear

from fused_lora import fuse, unfuse
from fused_lora.peft_layers import FusedPeftLinear
from tests import models
from tests.models import output, tiny
from tests.peft.parity import (
    BATCH,
    adapted,
    fused_twin,
    layers,
)


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
