"""What the study's names select in each family, and that every family runs with what they select."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoRALinear, LoRASettings
from fused_lora.targets import ROLES, inventory, role_of, select
from tests import models
from tests.models import FAMILIES, example, output, shake, skeleton, tiny

steady = pytest.fixture(models.steady, autouse=True)


@dataclass(frozen=True)
class Expected:
    """The modules of a one-layer model by role; experts' stacks, which can only be reported; the rest of
    its linears, which no role may name."""

    qkv: list[str]
    o_proj: list[str]
    fc1: list[str]
    fc2: list[str]
    experts: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ("lm_head",)

    def paths(self, role: str) -> list[str]:
        paths: list[str] = getattr(self, role)
        return paths


def under(prefix: str, names: str) -> list[str]:
    return [f"{prefix}.{name}" for name in names.split()]


_LAYER = "model.layers.0"
_LLAMA = Expected(
    qkv=under(_LAYER, "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
    o_proj=under(_LAYER, "self_attn.o_proj"),
    fc1=under(_LAYER, "mlp.gate_proj mlp.up_proj"),
    fc2=under(_LAYER, "mlp.down_proj"),
)
_EXPERTS = Expected(
    qkv=_LLAMA.qkv,
    o_proj=_LLAMA.o_proj,
    fc1=[],
    fc2=[],
    experts={"fc1": f"{_LAYER}.mlp.experts.gate_up_proj", "fc2": f"{_LAYER}.mlp.experts.down_proj"},
)
_BERT = "{}.encoder.layer.0"
_ENCODER, _DECODER = "encoder.block.0.layer", "decoder.block.0.layer"


def bert(prefix: str, *others: str) -> Expected:
    layer = _BERT.format(prefix)
    return Expected(
        qkv=under(layer, "attention.self.query attention.self.key attention.self.value"),
        o_proj=under(layer, "attention.output.dense"),
        fc1=under(layer, "intermediate.dense"),
        fc2=under(layer, "output.dense"),
        others=others,
    )


EXPECTED: dict[str, Expected] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"], _LLAMA),
    **dict.fromkeys(["mixtral", "qwen3_moe"], _EXPERTS),
    "phi": Expected(
        qkv=_LLAMA.qkv,
        o_proj=under(_LAYER, "self_attn.dense"),
        fc1=under(_LAYER, "mlp.fc1"),
        fc2=under(_LAYER, "mlp.fc2"),
    ),
    "phi3": Expected(
        qkv=under(_LAYER, "self_attn.qkv_proj"),
        o_proj=under(_LAYER, "self_attn.o_proj"),
        fc1=under(_LAYER, "mlp.gate_up_proj"),
        fc2=under(_LAYER, "mlp.down_proj"),
    ),
    "gpt2": Expected(
        qkv=["transformer.h.0.attn.c_attn"],
        o_proj=["transformer.h.0.attn.c_proj"],
        fc1=["transformer.h.0.mlp.c_fc"],
        fc2=["transformer.h.0.mlp.c_proj"],
    ),
    "gptj": Expected(
        qkv=under("transformer.h.0.attn", "q_proj k_proj v_proj"),
        o_proj=["transformer.h.0.attn.out_proj"],
        fc1=["transformer.h.0.mlp.fc_in"],
        fc2=["transformer.h.0.mlp.fc_out"],
    ),
    "bloom": Expected(
        qkv=["transformer.h.0.self_attention.query_key_value"],
        o_proj=["transformer.h.0.self_attention.dense"],
        fc1=["transformer.h.0.mlp.dense_h_to_4h"],
        fc2=["transformer.h.0.mlp.dense_4h_to_h"],
    ),
    "opt": Expected(
        qkv=under("model.decoder.layers.0.self_attn", "q_proj k_proj v_proj"),
        o_proj=["model.decoder.layers.0.self_attn.out_proj"],
        fc1=["model.decoder.layers.0.fc1"],
        fc2=["model.decoder.layers.0.fc2"],
    ),
    "neox": Expected(
        qkv=["gpt_neox.layers.0.attention.query_key_value"],
        o_proj=["gpt_neox.layers.0.attention.dense"],
        fc1=["gpt_neox.layers.0.mlp.dense_h_to_4h"],
        fc2=["gpt_neox.layers.0.mlp.dense_4h_to_h"],
    ),
    "falcon": Expected(
        qkv=["transformer.h.0.self_attention.query_key_value"],
        o_proj=["transformer.h.0.self_attention.dense"],
        fc1=["transformer.h.0.mlp.dense_h_to_4h"],
        fc2=["transformer.h.0.mlp.dense_4h_to_h"],
    ),
    "bert": bert("bert", "bert.pooler.dense", "classifier"),
    "roberta": bert("roberta", "lm_head.dense", "lm_head.decoder"),
    "distilbert": Expected(
        qkv=under("distilbert.transformer.layer.0.attention", "q_lin k_lin v_lin"),
        o_proj=["distilbert.transformer.layer.0.attention.out_lin"],
        fc1=["distilbert.transformer.layer.0.ffn.lin1"],
        fc2=["distilbert.transformer.layer.0.ffn.lin2"],
        others=("vocab_transform", "vocab_projector"),
    ),
    "t5": Expected(
        qkv=[
            *under(f"{_ENCODER}.0.SelfAttention", "q k v"),
            *under(f"{_DECODER}.0.SelfAttention", "q k v"),
            *under(f"{_DECODER}.1.EncDecAttention", "q k v"),
        ],
        o_proj=[
            f"{_ENCODER}.0.SelfAttention.o",
            f"{_DECODER}.0.SelfAttention.o",
            f"{_DECODER}.1.EncDecAttention.o",
        ],
        fc1=[f"{_ENCODER}.1.DenseReluDense.wi", f"{_DECODER}.2.DenseReluDense.wi"],
        fc2=[f"{_ENCODER}.1.DenseReluDense.wo", f"{_DECODER}.2.DenseReluDense.wo"],
    ),
    "clip": Expected(
        qkv=under("encoder.layers.0.self_attn", "q_proj k_proj v_proj"),
        o_proj=["encoder.layers.0.self_attn.out_proj"],
        fc1=["encoder.layers.0.mlp.fc1"],
        fc2=["encoder.layers.0.mlp.fc2"],
        others=(),
    ),
    "vit": Expected(
        qkv=under("vit.layers.0.attention", "q_proj k_proj v_proj"),
        o_proj=["vit.layers.0.attention.o_proj"],
        fc1=["vit.layers.0.mlp.fc1"],
        fc2=["vit.layers.0.mlp.fc2"],
        others=("classifier",),
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(its name, a model of it on the meta device, what is expected of it)"""
    return request.param, skeleton(request.param), EXPECTED[request.param]


# Roles


def test_every_role_names_exactly_its_modules_in_every_family(family):
    _, model, expected = family
    for role in ROLES:
        if expected.paths(role):
            assert sorted(select(model, role).chosen) == sorted(expected.paths(role)), role


def test_no_role_names_a_head_a_pooler_or_a_classifier(family):
    _, model, expected = family
    linears = {name for name, module in model.named_modules() if hasattr(module, "weight")}
    for path in expected.others:
        assert path in linears  # as the table says
        assert role_of(path) is None
    assert not set(select(model, "all").chosen) & set(expected.others)


def test_all_is_the_union_of_the_four(family):
    _, model, expected = family
    union = [path for role in ROLES for path in expected.paths(role)]
    assert sorted(select(model, "all").chosen) == sorted(union)
    assert sorted(select(model, "+".join(ROLES)).chosen) == sorted(union)


def test_the_table_knows_every_linear_of_every_family(family):
    _, model, expected = family
    known = {*expected.others, *(path for role in ROLES for path in expected.paths(role))}
    kinds = {"Linear", "Conv1D", "FalconLinear"}
    assert {name for name, module in model.named_modules() if type(module).__name__ in kinds} == known


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("mixtral", {"fc1": "4×128×32", "fc2": "4×32×64"}), ("qwen3_moe", {"fc1": "4×32×32", "fc2": "4×32×16"})],
)
def test_experts_in_3d_parameters_are_reported_with_the_reason(name, shapes):
    expected = EXPECTED[name]
    for role, shape in shapes.items():
        selection = select(skeleton(name), f"o_proj+{role}")
        (skipped,) = selection.skipped
        assert skipped.name == expected.experts[role]
        assert skipped.reason == f"experts held as one 3-D parameter ({shape}), not as linears"
        assert list(selection.chosen) == expected.o_proj


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model.decoder.layers.1.encoder_attn.out_proj", "o_proj"),  # BART
        ("vit.encoder.layer.0.attention.attention.query", "qkv"),  # ViT before transformers 5
        ("vit.encoder.layer.0.attention.output.dense", "o_proj"),
        ("vit.encoder.layer.0.output.dense", "fc2"),
        ("decoder.block.1.layer.2.DenseReluDense.wi_1", "fc1"),  # gated T5
        ("gpt2.transformer.h.0.crossattention.c_attn", "qkv"),
        ("gpt2.transformer.h.0.crossattention.c_proj", "o_proj"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", "qkv"),  # DeepSeek
        ("transformer.h.0.attn.attention.out_proj", "o_proj"),  # GPT-Neo
        ("layers.0.attn.Wqkv", "qkv"),  # ModernBERT
        ("layers.0.attn.Wo", "o_proj"),
        ("layers.0.mlp.Wi", "fc1"),
        ("layers.0.mlp.Wo", "fc2"),
        ("o_proj", "o_proj"),
        ("model.layers.3.mlp.shared_expert.down_proj", "fc2"),
        ("model.layers.0.mlp.gate", None),
        ("model.layers.0.mlp.shared_expert_gate", None),
        ("model.layers.0.not_o_proj", None),
        ("model.o_proj.inner", None),
        ("score", None),
        ("embed_out", None),
        ("pooler.dense", None),
        ("classifier.out_proj", None),
        ("", None),
    ],
)
def test_a_role_is_read_off_the_end_of_a_path(path, role):
    assert role_of(path) == role


def test_all_says_which_role_it_found_nothing_for():
    model = nn.ModuleDict({"o_proj": nn.Linear(4, 4), "up_proj": nn.Linear(4, 4), "lens": nn.Linear(4, 4)})
    selection = select(model, "all")
    assert set(selection.chosen) == {"o_proj", "up_proj"}
    reason = "no path of this model is known by this role"
    assert {(skip.name, skip.reason) for skip in selection.skipped} == {("qkv", reason), ("fc2", reason)}


def test_spaces_around_the_plus_do_not_matter():
    model = nn.ModuleDict({"o_proj": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})
    assert set(select(model, "o_proj + fc2").chosen) == {"o_proj", "fc2"}


def test_a_layer_that_torch_reads_past_is_left_alone():
    """nn.TransformerEncoderLayer hands linear1's weight to a fused kernel, in evaluation, without a call."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match=r"layers\.0\.linear1: torch's encoder layer, in evaluation, reads"):
        select(model, ["linear1"])


# Running


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_its_adapters_alone_and_starts_as_the_frozen_model(name):
    model, batch = tiny(name), example(name)
    frozen = output(model.requires_grad_(False), batch)
    report = fused_lora.add_lora(model, "o_proj+fc2", r=4)
    expected = EXPECTED[name].o_proj + EXPECTED[name].fc2
    assert [layer.name for layer in report.swapped] == expected

    torch.testing.assert_close(output(model, batch), frozen)

    shake(model)
    y = output(model, batch)
    assert not torch.allclose(y, frozen)
    torch.autograd.backward(y.square().sum())
    trained = {f"{path}.lora_{letter}.default" for path in expected for letter in "AB"}
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in trained:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.any(), parameter_name
        else:
            assert parameter.grad is None, parameter_name


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "t5"])
def test_adapters_on_all_of_a_model_compute_what_their_merge_does(name):
    model, batch = tiny(name), example(name)
    fused_lora.add_lora(model, "all", r=4)
    shake(model)
    expected = output(model, batch)
    fused_lora.remove_lora(model, merge=True)
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-3, atol=1e-3)


# Lists and patterns


@pytest.fixture
def llama():
    return skeleton("llama", num_hidden_layers=2)


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (["o_proj"], ["0.self_attn.o_proj", "1.self_attn.o_proj"]),
        (
            ("self_attn.o_proj", "1.mlp.down_proj"),
            ["0.self_attn.o_proj", "1.self_attn.o_proj", "1.mlp.down_proj"],
        ),
        (["model.layers.1.self_attn.q_proj"], ["1.self_attn.q_proj"]),
        (["o_proj", "self_attn.o_proj"], ["0.self_attn.o_proj", "1.self_attn.o_proj"]),
        (r".*\.1\..*(q|o)_proj", ["1.self_attn.q_proj", "1.self_attn.o_proj"]),
        (r"model\.layers\.0\.mlp\.(gate|down)_proj", ["0.mlp.gate_proj", "0.mlp.down_proj"]),
    ],
    ids=str,
)
def test_lists_name_ends_of_paths_and_patterns_whole_paths(llama, targets, paths):
    assert list(select(llama, targets).chosen) == [f"model.layers.{path}" for path in paths]


def test_a_list_can_name_the_head(llama):
    assert list(select(llama, ["lm_head"]).chosen) == ["lm_head"]


def test_a_pattern_over_everything_takes_the_linears_and_reports_the_rest(llama):
    selection = select(llama, ".*")
    assert len(selection.chosen) == 2 * 7 + 1
    reasons = {skip.name: skip.reason for skip in selection.skipped}
    assert reasons["model.embed_tokens"] == "a Embedding is not a plain linear"
    assert reasons["model.norm"] == "a LlamaRMSNorm is not a plain linear"


def test_a_pattern_over_everything_calls_no_embedding_an_expert():
    """ViT's class token and position embeddings are 3-D parameters too."""
    selection = select(skeleton("vit"), ".*")
    assert not [skip for skip in selection.skipped if "expert" in skip.reason]


def test_a_pattern_does_not_reach_inside_a_lora_layer(llama):
    fused_lora.add_lora(llama, "o_proj", r=4)
    selection = select(llama, r".*self_attn.*")
    assert len(selection.chosen) == 8
    assert not selection.skipped


def test_a_lora_layer_is_chosen_again_for_a_second_adapter(llama):
    fused_lora.add_lora(llama, "o_proj", r=4)
    assert all(isinstance(module, LoRALinear) for module in select(llama, "o_proj").chosen.values())


def test_what_cannot_carry_an_adapter_is_skipped_with_the_reason(llama):
    llama.model.layers[0].self_attn.o_proj.forward = lambda x: x
    selection = select(llama, "o_proj")
    assert list(selection.chosen) == ["model.layers.1.self_attn.o_proj"]
    (skip,) = selection.skipped
    assert skip.name == "model.layers.0.self_attn.o_proj"
    assert skip.reason.startswith("its forward is overridden on the instance")


@pytest.mark.parametrize("layers", [0, 2], ids=["a layer", "an encoder"])
def test_torchs_own_encoder_layer_is_left_alone(layers):
    """In evaluation it reads its linears' weights and would pass the adapters by."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model: nn.Module = nn.TransformerEncoder(layer, layers) if layers else layer
    with pytest.raises(ValueError, match="torch's encoder layer, in evaluation, reads its weight past"):
        select(model, ["linear1", "linear2"])
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear is not a plain linear"):
        select(model, ["out_proj"])


def test_a_lone_linear_is_a_model_too():
    linear = nn.Linear(8, 8)
    fused_lora.add_lora(linear, ".*", r=2)
    assert isinstance(linear, LoRALinear)


# Errors


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["o_proj", "no_such"], "'no_such'"),
        ("no_such", "'no_such'"),
        ("o_proj+no_such", "'o_proj+no_such'"),
        (r"layers\..*", r"'layers\\..*'"),
        (["proj"], "'proj'"),
        ("", "''"),
    ],
    ids=str,
)
def test_a_target_that_names_nothing_is_answered_with_the_models_linears(llama, targets, named):
    kinds = {name: type(module) for name, module in llama.named_modules()}
    with pytest.raises(ValueError, match="names nothing in this model") as caught:
        fused_lora.add_lora(llama, targets)
    first, *lines = str(caught.value).splitlines()
    assert first == f"targets: {named} names nothing in this model. It has:"
    *linears, hint = lines
    assert linears == inventory(llama).splitlines()
    assert hint.startswith("A target is made of qkv, o_proj, fc1, fc2 and all, joined by '+'")
    assert "  2 × model.layers.*.self_attn.o_proj  32→32" in lines
    assert "  1 × lm_head  32→64" in lines
    assert {name: type(module) for name, module in llama.named_modules()} == kinds
    assert all(parameter.requires_grad for parameter in llama.parameters())


def test_a_role_that_the_model_lacks_is_an_error_too():
    with pytest.raises(ValueError, match="targets: 'qkv' names nothing in this model"):
        select(nn.Sequential(nn.Linear(4, 4)), "qkv")


def test_a_model_without_linears_says_so():
    with pytest.raises(ValueError, match="no linears"):
        select(nn.Sequential(nn.Conv2d(3, 3, 1)), "o_proj")


def test_an_empty_list_is_refused(llama):
    with pytest.raises(ValueError, match="targets: the list is empty"):
        select(llama, [])


def test_an_invalid_pattern_is_refused_and_the_names_are_given(llama):
    with pytest.raises(ValueError, match="neither made of qkv, o_proj, fc1, fc2, all nor a pattern"):
        select(llama, "o_proj(")


def test_where_everything_named_is_skipped_the_reasons_are_given():
    model = skeleton("mixtral")
    with pytest.raises(ValueError, match="can carry an adapter") as caught:
        select(model, "fc1+fc2")
    first, *reasons = str(caught.value).splitlines()
    assert first == "targets: nothing that 'fc1+fc2' names can carry an adapter:"
    assert [line.split(":")[0].strip() for line in reasons] == sorted(EXPECTED["mixtral"].experts.values())


def test_a_conv1d_is_listed_by_what_it_takes_and_gives():
    model = skeleton("gpt2")
    assert "  1 × transformer.h.*.attn.c_attn  32→96" in inventory(model).splitlines()
    layer = LoRALinear.adopt(model.transformer.h[0].attn.c_attn)
    layer.add_adapter("default", LoRASettings(4))
    assert layer.lora_A["default"].shape == (4, 32)
    assert layer.lora_B["default"].shape == (96, 4)
    assert "  1 × transformer.h.*.attn.c_attn  32→96" in inventory(model).splitlines()
