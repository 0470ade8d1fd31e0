"""Every example in Python runs, in the order of its page."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import fused_lora
from fused_lora import reference
from tests.documents.markdown import DOCUMENTS, EMULATOR, README, Document
from tests.models import tiny


@pytest.fixture
def given(tmp_path, monkeypatch):
    """What the examples find: a directory of their own, one process of a job, a model and its operands."""
    monkeypatch.chdir(tmp_path)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    tiny("llama").save_pretrained("my-model")
    adapted = tiny("llama")
    fused_lora.add_lora(adapted, "o_proj", r=2)
    fused_lora.save_adapter(adapted, "italian-adapter")
    input_ids = torch.ones(3, 5, dtype=torch.int64)
    yield {
        **{name: tiny("llama") for name in ("model", "another_model", "third_model")},
        "peft_model": get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["o_proj"])),
        "linear": nn.Linear(8, 4),
        "input_ids": input_ids,
        "batches": [input_ids, input_ids + 1],
        "mesh": init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp")),
        "parallelize_module": parallelize_module,
        "torch": torch,
        "fused_lora": fused_lora,
        **_operands(),
    }
    torch.distributed.destroy_process_group()


def _operands():
    operands = {"x": torch.randn(3, 8), "weight": torch.randn(4, 8), "bias": torch.randn(4)}
    return operands | {"lora_a": torch.randn(2, 8), "lora_b": torch.randn(4, 2)}


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.examples], ids=lambda d: d.name)
def test_every_example_runs(document: Document, given):
    for number, example in enumerate(document.examples):
        exec(compile(example, f"{document.name}, example {number}", "exec"), given)


def test_the_readmes_examples_do_what_it_says(given, tmp_path, capsys):
    operands = {name: given[name] for name in _operands()}
    assert len(README.examples) >= 3
    for example in README.examples:
        exec(example, given)
    assert "layers swapped" in capsys.readouterr().out
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    assert given["y"].shape == reference.lora_linear(**operands).shape


def test_the_emulators_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kernel.cu").write_text(
        """extern "C" __global__ void scale(const float* x, float* y, float factor, int count) {
             const int i = blockIdx.x * blockDim.x + threadIdx.x;
             if (i < count) y[i] = factor * x[i];
           }"""
    )
    x, y = torch.randn(512), torch.zeros(512)
    (example,) = EMULATOR.examples
    exec(example, {"x": x, "y": y})
    assert torch.equal(y, 2 * x)
