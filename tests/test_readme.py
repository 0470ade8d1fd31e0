"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fused_lora import reference
from tests.models import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    operands = {"x": torch.randn(3, 8), "weight": torch.randn(4, 8), "bias": torch.randn(4)}
    operands |= {"lora_a": torch.randn(2, 8), "lora_b": torch.randn(4, 2)}
    shown = {
        "model": tiny("llama"),
        "peft_model": get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["o_proj"])),
        "linear": nn.Linear(8, 4),
        "input_ids": torch.ones(3, 5, dtype=torch.int64),
        # tests/distributed runs it, in processes.
        "mesh": {"tp": None},
        "parallelize_module": lambda model, mesh, plan: model,
        **operands,
    }
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) >= 3
    for example in examples:
        exec(example, shown)
    assert "layers swapped" in capsys.readouterr().out
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    assert shown["y"].shape == reference.lora_linear(**operands).shape


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_make_target_is_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
