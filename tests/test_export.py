"""torch.export and AOTInductor: the op in programs that live on without Python."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

import fused_lora
from fused_lora import LoRALinear
from tests import models
from tests.operands import F32

steady = pytest.fixture(models.steady, autouse=True)
OP = torch.ops.fused_lora.lora_linear.default


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(input_ids=tokens, use_cache=False)[0]


def adapted(kind, family):
    return models.adapted(kind, family, dropout=0.0).eval()


def ops_in(program) -> int:
    return sum(node.target is OP for node in program.graph.nodes)


def trained(dropout=0.0) -> LoRALinear:
    layer = LoRALinear(24, 16, r=4, dropout=dropout)
    nn.init.normal_(layer.lora_B["default"])
    return layer


@pytest.mark.parametrize(("kind", "family"), [("ours", "llama"), ("fused", "llama"), ("fused", "gpt2")])
def test_a_model_is_exported_with_the_op_for_any_batch_and_length(kind, family):
    model = Logits(adapted(kind, family))
    tokens = models.example(family)["input_ids"]
    with torch.no_grad():
        program = torch.export.export(model, (tokens,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
        assert ops_in(program) == (7 if family == "llama" else 4)
        for rows, columns in ((2, 7), (5, 9)):
            tokens = models.example(family, rows, columns)["input_ids"]
            torch.testing.assert_close(program.module()(tokens), model(tokens))


def test_a_saved_program_computes_the_same():
    layer = trained().eval()
    x = torch.randn(5, 24)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,), dynamic_shapes=({0: Dim("rows", min=2)},)), file)
    file.seek(0)
    program = torch.export.load(file)
    assert ops_in(program) == 1
    x = torch.randn(9, 24)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_what_is_not_computed_fused_is_exported_as_it_is(state):
    layer = trained().eval()
    if state == "merged":
        layer.merge()
    else:
        layer.enabled = False
    x = torch.randn(5, 24)
    program = torch.export.export(layer, (x,))
    assert ops_in(program) == 0
    torch.testing.assert_close(program.module()(x), layer(x))


def test_a_packed_layer_is_exported_plain():
    layer = LoRALinear(64, 64, r=4).requires_grad_(False).eval()
    nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(5, 64)
    expected = layer(x)
    assert fused_lora.pack(layer).packed
    program = torch.export.export(layer, (x,))
    assert ops_in(program) == 1
    torch.testing.assert_close(program.module()(x), expected)
    assert program.state_dict["weight"].shape == (64, 64)


def test_a_layer_exported_in_training_draws_masks_and_trains():
    layer = trained(dropout=0.5)
    x = torch.randn(5, 24)
    program = torch.export.export(layer, (x,)).module()
    torch.manual_seed(1)
    y = program(x)
    assert not torch.equal(program(x), y)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), y)
    y.sum().backward()
    assert program.get_parameter("lora_A.default").grad.any()


def test_aot_inductor_serves_any_batch_in_this_and_in_a_fresh_process(tmp_path):
    network = nn.Sequential(trained(), nn.GELU()).eval()
    with torch.no_grad():
        program = torch.export.export(
            network, (torch.randn(5, 24),), dynamic_shapes=({0: Dim("rows", min=2, max=64)},)
        )
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        x = torch.randn(9, 24)
        expected = network(x)
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), expected)

    torch.save((x, expected), tmp_path / "case.pt")
    script = (
        "import sys, torch, fused_lora\n"
        "x, expected = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(x), expected)\n"
    )
    call = [sys.executable, "-c", script, package, str(tmp_path / "case.pt")]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_fused_peft_layers_count_as_plain_where_tracing_stands_in_for_their_parameters():
    layer = adapted("fused", "llama").get_submodule("base_model.model.model.layers.0.self_attn.o_proj")
    x = torch.randn(3, 32, dtype=F32)
    for strict in (False, True):
        assert ops_in(torch.export.export(layer, (x,), strict=strict)) == 1
    swapped = {name: 2 * value for name, value in layer.named_parameters()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        torch.func.functional_call(layer, swapped, (x,))
    assert (3, 4) in saved  # h: the op was called
