"""Adapters over base layers that compute by themselves: PEFT's numbers, its states and its files, with the
adapters fused."""

from __future__ import annotations

import copy
import importlib
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear8bitLt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_lora import adapter_sum, fuse, groups, pack, unfuse
from fused_lora.peft_layers import FusedAdapters, fused_class
from tests.models import shake
from tests.operands import BF16, F16, F32
from tests.peft import bases
from tests.peft.bases import BASES, Quantised, adapted, in_double, inputs
from tests.peft.parity import assert_same, fused_twin, layers, output_and_gradients, same
from tests.test_saved_memory import saved_tensors

X = {dtype: inputs(3, 4, dtype=dtype) for dtype in (F32, BF16)}
QUANTISED = [name for name in BASES if "own" not in name]


@pytest.fixture
def sums(monkeypatch):
    """Which of the ops ran."""
    seen: list[str] = []

    def count(name: str) -> None:
        run = getattr(adapter_sum, name)

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(name)
            y: Tensor = run(*args, **kwargs)
            return y

        monkeypatch.setattr(adapter_sum, name, counted)

    count("lora_add")
    count("lora_add_")
    return seen


def the_layer(model: Any) -> Any:
    return model.base_model.model.base


# Numbers


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_computes_what_peft_does(base, dtype, dropout, sums):
    plain = adapted(base, dtype, lora_dropout=dropout).train(dropout > 0)
    same(plain, fused_twin(plain), X[dtype], in_double=in_double)
    assert len(sums) == 1


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_step_under_autocast_computes_what_peft_does(base, dtype, sums):
    plain = adapted(base, dtype, lora_dropout=0.3).train()
    same(plain, fused_twin(plain), X[dtype], autocast=BF16, in_double=in_double)
    assert len(sums) == 1


@pytest.mark.parametrize("base", QUANTISED)
@pytest.mark.parametrize("lead", [(1,), (5,), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_rows_of_every_shape(base, lead):
    # bitsandbytes' kernel for inference fails at no rows.
    plain = adapted(base).train()
    try:
        plain(inputs(*lead))
    except (RuntimeError, ValueError, TypeError):
        pytest.skip("the base layer takes no such input")
    same(plain, fused_twin(plain), inputs(*lead))


@pytest.mark.parametrize("base", BASES)
def test_adapters_in_bf16_over_a_layer_in_float32(base, sums):
    """PEFT casts x to the adapter's dtype, and adds what comes out to an output in float32."""
    plain = get_peft_model(
        adapted(base).unload(), LoraConfig(r=4, target_modules=["base"]), autocast_adapter_dtype=False
    )
    shake(plain)
    for parts in (the_layer(plain).lora_A, the_layer(plain).lora_B):
        parts.to(BF16)
    ours, theirs = (output_and_gradients(model, X[F32]) for model in (fused_twin(plain), plain))
    assert len(sums) == 1
    assert {name: value.dtype for name, value in ours.items()} == {n: v.dtype for n, v in theirs.items()}
    assert_same({"x": ours["x"]}, {"x": theirs["x"]}, roundings=2e5)  # float32's, of what bf16 rounds


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"r": 7}, {"lora_alpha": 0}, {"lora_bias": True}])
def test_settings(settings, sums):
    base = "a module of one's own"
    plain = adapted(base, **settings)
    same(plain, fused_twin(plain), X[F32])
    assert len(sums) == 1


@pytest.mark.parametrize("base", QUANTISED)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_active_adapters(base, dropout, sums):
    """By concatenated ranks; each by a mask of its own where they drop out."""
    plain = adapted(base, lora_dropout=dropout)
    plain.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["base"], lora_dropout=dropout))
    shake(plain, 3, only="second")
    plain.base_model.set_adapter(["default", "second"])
    plain.train(dropout > 0)
    same(plain, fused_twin(plain), X[F32])
    assert len(sums) == (2 if dropout else 1)


def test_a_scaling_that_is_a_tensor(sums):
    plain = adapted("bitsandbytes, 4 bits")
    the_layer(plain).scaling["default"] = torch.tensor(0.7)
    same(plain, fused_twin(plain), X[F32])
    assert len(sums) == 1


def test_gradient_checkpointing_draws_the_same_masks_again():
    fused = fused_twin(adapted("bitsandbytes, 4 bits", lora_dropout=0.4)).train()
    results = []
    for run in (fused, lambda x: checkpoint(fused, x, use_reentrant=False)):
        torch.manual_seed(5)
        fused.zero_grad()
        x = X[F32].clone().requires_grad_()
        run(x).square().sum().backward()
        results.append([x.grad, *(p.grad.clone() for p in fused.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_model_that_is_compiled_as_one_graph():
    fused = fused_twin(adapted("a module of one's own", lora_dropout=0.3)).train()
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    results = []
    for model in (fused, compiled):
        torch.manual_seed(5)
        results.append(model(X[F32]).detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("base", QUANTISED)
def test_saved_beside_what_the_base_saves_is_no_more_than_x_h_and_the_seed(base):
    plain = adapted(base, lora_dropout=0.3).train()
    fused = fused_twin(plain)
    x = X[F32].clone().requires_grad_()

    def sizes(layer: Any, call: Any) -> list[tuple[int, ...]]:
        known = {p.data_ptr() for p in layer.parameters()}
        return sorted(tuple(t.shape) for t in saved_tensors(call) if t.data_ptr() not in known)

    own = sizes(the_layer(fused), lambda: the_layer(fused).base_layer(x))
    with_adapter = sizes(the_layer(fused), lambda: the_layer(fused)(x))
    for shape in own:
        with_adapter.remove(shape)
    assert with_adapter == sorted([(1,), (12, 4), tuple(x.shape)])


# Where the sum goes


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("training", [False, True])
def test_only_what_a_known_layer_gave_is_overwritten(base, training, sums):
    """Linears of bitsandbytes and torchao keep nothing of their output, of other modules nobody knows."""
    fused = fused_twin(adapted(base))
    with torch.set_grad_enabled(training):
        fused(X[F32])
    assert sums == ["lora_add_" if base in QUANTISED else "lora_add"]


class Squashed(nn.Linear):
    """Its backward is made of its output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


class Remembering(nn.Linear):
    """It hands out what it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Constant(nn.Linear):
    """It gives a Parameter of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(*x.shape[:-1], -1)


@pytest.mark.parametrize("kind", [Squashed, Remembering, Constant, nn.Linear])
def test_what_a_base_keeps_of_its_output_stays(kind, sums):
    """Here with a hook that keeps it, too."""
    torch.manual_seed(0)
    plain = get_peft_model(nn.Sequential(nn.Linear(64, 32), kind(32, 32)), LoraConfig(target_modules=["1"]))
    shake(plain)
    fused = fused_twin(plain)
    kept: list[Tensor] = []
    for model in (plain, fused):
        layer = layers(model)[0]
        layer.base_layer.register_forward_hook(lambda _module, _inputs, y: kept.append(y))
    assert_same(output_and_gradients(fused, X[F32]), output_and_gradients(plain, X[F32]))
    assert torch.equal(*kept)
    assert sums == ["lora_add"]


# States


def test_the_report_says_that_the_adapter_alone_is_fused():
    report = fuse(adapted("bitsandbytes, 4 bits"))
    assert [swapped.note for swapped in report.swapped] == [
        "adapter fused over the base's own forward: a Linear4bit is not a plain linear"
    ]
    assert report.swapped[0].note in str(report)
    assert not report.skipped
    assert "Int8Tensor" in str(fuse(adapted("torchao, 8-bit weights")))


@pytest.mark.parametrize("base", BASES)
def test_fuse_changes_classes_alone_and_unfuse_gives_them_back(base, sums):
    model = adapted(base)
    before = [(name, id(m), type(m)) for name, m in model.named_modules()]
    keys = list(model.state_dict())
    fuse(model)
    layer = the_layer(model)
    assert isinstance(layer, FusedAdapters)
    assert layer.why_not_fused() is None
    assert layer.why_base_not_fused() is not None
    assert list(model.state_dict()) == keys
    assert [id(m) for m in model.modules()] == [identity for _, identity, _ in before]
    unfuse(model)
    assert [(name, id(m), type(m)) for name, m in model.named_modules()] == before
    assert vars(layer).keys() == vars(the_layer(adapted(base))).keys()
    model(X[F32])
    assert not sums


@pytest.mark.parametrize("base", QUANTISED[:3])
def test_copies_are_fused(base):
    fused = fused_twin(adapted(base))
    twin = copy.deepcopy(fused)
    assert type(the_layer(twin)) is type(the_layer(fused))
    assert torch.equal(twin(X[F32]), fused(X[F32]))


@pytest.mark.parametrize("base", QUANTISED[:2])
def test_pickles_are_fused(base, tmp_path):
    fused = fused_twin(adapted(base))
    torch.save(fused, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(the_layer(twin)) is type(the_layer(fused))
    assert torch.equal(twin(X[F32]), fused(X[F32]))


def test_saved_files_are_the_same_byte_for_byte(tmp_path):
    model = adapted("bitsandbytes, 4 bits")
    model.save_pretrained(tmp_path / "plain")
    fuse(model)
    model.save_pretrained(tmp_path / "fused")
    file = "adapter_model.safetensors"
    assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "fused" / file).read_bytes()


@pytest.mark.parametrize("base", QUANTISED)
def test_disabled_and_switched_adapters(base):
    plain = adapted(base)
    plain.add_adapter("second", LoraConfig(r=3, target_modules=["base"]))
    shake(plain, 3, only="second")
    fused = fused_twin(plain)
    with plain.disable_adapter(), fused.disable_adapter():
        assert the_layer(fused).why_not_fused() == "its adapters are switched off"
        same(plain, fused, X[F32])
    for model in (plain, fused):
        model.set_adapter("second")
    same(plain, fused, X[F32])


@pytest.mark.parametrize("base", QUANTISED[:2])
@pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module")
def test_merged_and_unmerged(base):
    plain = adapted(base)
    fused = fused_twin(plain)
    for model in (plain, fused):
        model.merge_adapter()
    assert the_layer(fused).why_not_fused() == "it is merged"
    assert torch.equal(fused(X[F32]), plain(X[F32]))
    for model in (plain, fused):
        model.unmerge_adapter()
    assert the_layer(fused).why_not_fused() is None
    same(plain, fused, X[F32])


@pytest.mark.parametrize("base", QUANTISED[:2])
def test_adapter_names_run_pefts_own_forward(base, sums):
    plain = adapted(base)
    fused = fused_twin(plain)
    layer_of = [the_layer(model) for model in (plain, fused)]
    with torch.no_grad():  # PEFT's writes in place what it cannot under autograd
        ours, theirs = (layer(X[F32], adapter_names=["default", "__base__", "default"]) for layer in layer_of)
    assert torch.equal(ours, theirs)
    assert not sums


def test_a_variant_keeps_pefts_forward_and_is_listed(sums):
    model = adapted("bitsandbytes, 4 bits", use_dora=True)
    report = fuse(model)
    assert [skip.reason for skip in report.skipped] == ["adapter 'default' is a variant (DoraLinearVariant)"]
    model(X[F32])
    assert not sums


def test_siblings_over_such_bases_are_no_group_and_are_not_packed():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (Quantised(64, 32) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.q_proj(x) + self.k_proj(x) * self.v_proj(x)
            return y

    plain = get_peft_model(Attention(), LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"]))
    shake(plain)
    fused = copy.deepcopy(plain)
    assert not fuse(fused).groups
    assert not groups(fused).groups
    report = pack(fused)
    assert not report.packed
    assert {left.reason for left in report.left_plain} == {"a Quantised is not a plain linear"}
    same(plain, fused, X[F32])


# Layers of libraries that are not here


OTHERS = ["gptq.GPTQLoraLinear", "awq.AwqLoraLinear", "aqlm.AqlmLoraLinear", "te.TeLinear"]


@pytest.mark.parametrize("where", OTHERS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_pefts_layers_for_other_libraries(where, dtype, sums):
    """Over a stand-in: their forward is PEFT's, and the base's output alone enters it."""
    module, _, name = where.rpartition(".")
    kind = getattr(importlib.import_module(f"peft.tuners.lora.{module}"), name)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["base"], lora_dropout=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = kind(Quantised(64, 32).to(dtype), "default", config=config, r=4, lora_alpha=8)
    plain: Any = nn.Module()
    plain.layer = layer
    shake(plain)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert type(fused.layer) is fused_class(kind)
    assert "a Quantised is not a plain linear" in str(report)
    ours, theirs = (output_and_gradients(model.layer.eval(), X[dtype]) for model in (fused, plain))
    assert len(sums) == 1
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        torch.testing.assert_close(
            ours[name], value, rtol=2e-2 if dtype == BF16 else 1e-4, atol=1e-2 * dtype.itemsize
        )
    assert type(unfuse(fused).layer) is kind


# What is not as a linear would have it


def test_what_no_op_takes_is_added_as_peft_adds_it(sums):
    """An output of more rows than x has, and one of no floating-point dtype."""

    class Wide(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[None].expand(2, *x.shape[:-1], -1)

    class Whole(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).round().long()

    for kind in (Wide, Whole):
        plain = get_peft_model(nn.Sequential(kind(64, 32)), LoraConfig(target_modules=["0"]))
        shake(plain)
        assert torch.equal(fused_twin(plain)(X[F32]), plain(X[F32]))
    assert not sums


def test_under_an_autocast_that_widens_the_sum_it_is_as_wide_as_pefts(sums):
    """Under CUDA's autocast PEFT's layers for bitsandbytes leave the dtype of the sum to torch."""

    class Half(Quantised):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).half()

    config = LoraConfig(r=4, target_modules=["base"])
    plain = Linear8bitLt(Half(64, 32).to(BF16), "default", config=config, r=4, lora_alpha=8).to(BF16)
    shake(plain)
    fused = fused_twin(plain)
    torch.set_autocast_enabled("cuda", True)
    try:
        theirs, ours = (layer(X[BF16]) for layer in (plain, fused))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert ours.dtype == theirs.dtype == F32
    assert torch.equal(ours, theirs)
    assert not sums
    assert fused(X[BF16]).dtype == plain(X[BF16]).dtype == F16


def test_the_bases_are_those_of_the_libraries():
    kinds = [type(the_layer(adapted(base)).base_layer) for base in QUANTISED]
    assert [kind.__module__.partition(".")[0] for kind in kinds[:2]] == ["bitsandbytes", "bitsandbytes"]
    weights = [the_layer(adapted(base)).base_layer.weight for base in QUANTISED[2:]]
    assert {type(weight).__module__.partition(".")[0] for weight in weights} == {"torchao"}
    assert bases.bitsandbytes(4).weight.dtype == torch.uint8
