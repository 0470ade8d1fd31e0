"""What `explain` tells of the kernels where no GPU is at hand, and which choice it names."""

from __future__ import annotations

import pytest
import torch

import fused_lora
from fused_lora import choices, explanation, paths
from fused_lora.binary import Binary
from tests.operands import BF16, F32, F64

SHAPE = {"rows": 512, "in_features": 576, "out_features": 1536}


@pytest.fixture(autouse=True)
def cuda_build(emulated, monkeypatch):
    """The package as in a CUDA build, on a machine without a GPU."""
    binary = Binary(emulated.module, {"cuda": "yes"}, None)
    for module in (paths, explanation):
        monkeypatch.setattr(module, "BINARY", binary)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(choices, "_made", {})


def explain(**shape):
    return fused_lora.explain("cuda", **{**SHAPE, **shape})


def halves(text):
    """{half: (kernels, choice)}"""
    lines = [line.strip().partition(": ") for line in text.splitlines() if line.startswith("  ")]
    told = {half: [rest for name, _, rest in lines if name == half] for half in ("forward", "backward")}
    return {half: tuple(rests) for half, rests in told.items()}


def test_without_a_shape_it_is_one_line():
    assert fused_lora.explain("cuda").startswith("fused or composed: ")
    with fused_lora.use_path("fused"):
        assert fused_lora.explain("cuda") == "fused: asked for"


def test_the_kernels_are_named_with_whose_figures_they_were_planned_for():
    text = explain()
    assert "kernels, for the figures of an A100 (no GPU is at hand):" in text
    for kernels, choice in halves(text).values():
        assert "tensor cores" in kernels
        assert "plain" not in kernels
        assert choice == "made at the first call, by timing both"
    assert "the figures of an H100" in explain(gpu="H100")


@pytest.mark.parametrize("shape", [{"in_features": 203}, {"out_features": 113}, {"dtype": F32}])
def test_it_says_why_a_plain_kernel_serves(shape):
    kernels, _ = halves(explain(**shape))["backward"]
    assert "plain, because " in kernels


def test_options_reach_the_plan(monkeypatch):
    asked = []
    explain_shape = explanation.BINARY.module.explain_shape

    def spy(**arguments):
        asked.append(explain_shape(**arguments)["forward"][0])
        return explain_shape(**arguments)

    monkeypatch.setattr(explanation.BINARY.module, "explain_shape", spy)
    assert "plain" not in explain(weight_transposed=True, bias=True, dropout=True, autocast=True)
    explain(adapter_dtype=BF16, rank=8)
    size = "forward rows=512 in=576 out=1536"
    assert asked == [
        f"{size} rank=16 dtype=bfloat16 adapters=float32 rounded dropout bias x=rows weight=columns",
        f"{size} rank=8 dtype=bfloat16 adapters=bfloat16 x=rows weight=rows",
    ]
    torch.set_float32_matmul_precision("high")
    try:
        assert "plain" not in explain(dtype=F32)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_rule_is_named_where_nothing_is_timed(monkeypatch):
    torch.use_deterministic_algorithms(True)
    try:
        kept = halves(explain())["forward"][1]
        left = halves(explain(in_features=203))["forward"][1]
    finally:
        torch.use_deterministic_algorithms(False)
    assert kept.startswith("fused: not timed (deterministic algorithms")
    assert left.startswith("composed: not timed (deterministic algorithms")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "several ranks" in explain()


def test_a_path_asked_for_by_name_leaves_no_choice():
    with fused_lora.use_path("fused"):
        text = explain()
    assert text.startswith("fused: asked for\nkernels, ")
    assert "choices" not in text


def test_float64_and_other_devices_have_no_kernels():
    assert explain(dtype=F64).startswith("composed: there are no fused kernels for torch.float64")
    assert fused_lora.explain("meta", **SHAPE) == fused_lora.explain("meta")


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ({"rows": None}, ValueError, "explain: rows must be a number ≥ 1, got None"),
        ({"rank": 0}, ValueError, "explain: rank must be a number ≥ 1, got 0"),
        ({"dtype": torch.int8}, TypeError, "explain: dtype must be .*, got torch.int8"),
        ({"adapter_dtype": torch.float16}, TypeError, "explain: adapter_dtype must be .*, got torch.float16"),
        ({"gpu": "V100"}, ValueError, "explain: gpu must be one of A100, .*, got 'V100'"),
    ],
)
def test_bad_arguments(shape, kind, message):
    with pytest.raises(kind, match=message):
        explain(**shape)
