"""Tensor parallelism: layers and models split over processes compute what one process does."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from transformers.distributed import DistributedConfig
from transformers.pytorch_utils import Conv1D

import fused_lora
from fused_lora.distributed import ColwiseLoRA, RowwiseLoRA
from fused_lora.layer import LoRALinear
from tests.distributed.models import (
    OWNERS,
    adapted_model,
    assert_same,
    gradients,
    loss_of,
    of_one_process,
    peft_model,
    plain_model,
    settle,
    whole,
    write,
)
from tests.distributed.test_data_parallel import Calls, rank, ranks, shard

IN, OUT, RANK = 48, 40, 3
STYLES = {"colwise": ColwiseLoRA, "rowwise": RowwiseLoRA}
BOTH = pytest.mark.parametrize("name", list(STYLES))


def mesh_of_all():
    return init_device_mesh("cpu", (ranks(),))


def layer_of(dropout=0.0, base="linear", bias_trains=False, dtype=torch.float32):
    torch.manual_seed(1)
    if base == "linear":
        linear = torch.nn.Linear(IN, OUT)
    else:
        linear = Conv1D(OUT, IN)
        torch.nn.init.normal_(linear.bias)
    linear.requires_grad_(False)
    linear.bias.requires_grad_(bias_trains)
    layer = LoRALinear.from_linear(linear.to(dtype), r=RANK, alpha=6, dropout=dropout)
    torch.nn.init.normal_(layer.lora_B["default"])
    return layer


def x_of(dtype=torch.float32, rows=(2, 5)):
    return torch.randn(*rows, IN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def dy_of(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)


def run(layer, x, seed):
    """y, and the gradients of x and of what trains."""
    torch.manual_seed(seed)
    y = layer(x)
    y.backward(dy_of(y))
    return y.detach(), {"x": x.grad, **gradients(layer)}


def magnitudes(layer, x, seed):
    """Of y and the gradients: the sums of the magnitudes of their terms, in float64."""
    exact = LoRALinear.from_linear(torch.nn.Linear(IN, OUT), r=RANK, alpha=6, dropout=layer_dropout(layer))
    exact.double().load_state_dict(state_of(layer))
    exact.requires_grad_(True)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.abs_()
    torch.manual_seed(seed)
    given = x.detach().double().abs().requires_grad_()
    y = exact(given)
    y.backward(dy_of(y).abs())
    return y.detach(), {"x": given.grad, **gradients(exact)}


def layer_dropout(layer):
    return layer.settings["default"].dropout


def state_of(layer):
    state = {name: whole(tensor).double() for name, tensor in layer.state_dict().items()}
    if layer.fan_in_fan_out:
        state["weight"] = state["weight"].t()
    return state


def split_layer(name, dropout, base, bias_trains, dtype, rows):
    one = layer_of(dropout, base, bias_trains, dtype)
    y, right = run(one, x_of(dtype, rows), seed=70)
    sums_y, sums = magnitudes(one, x_of(dtype, rows), seed=70)
    split = layer_of(dropout, base, bias_trains, dtype)
    style = STYLES[name](
        **({"output_layouts": Replicate()} if name == "colwise" else {"input_layouts": Replicate()})
    )
    parallelize_module(split, mesh_of_all(), style)
    sizes = {n: tuple(p.to_local().shape) for n, p in split.named_parameters()}
    n, k = OUT // ranks(), IN // ranks()
    weight, bias = {"colwise": ((n, IN), (n,)), "rowwise": ((OUT, k), (OUT,))}[name]
    assert sizes == {
        "weight": weight if base == "linear" else weight[::-1],
        "bias": bias,
        "lora_A.default": {"colwise": (RANK, IN), "rowwise": (RANK, k)}[name],
        "lora_B.default": {"colwise": (n, RANK), "rowwise": (OUT, RANK)}[name],
    }
    # Only the first process's generator is where one process's was.
    split_y, found = run(split, x_of(dtype, rows), seed=70 + rank())
    # Of n terms a sum in any order is off by n · eps / 2 of their magnitudes; y and dx are rounded by each
    # process before they are added up.
    bound = (max(IN, OUT, 10) + RANK + 4) * torch.finfo(torch.float32).eps
    bound += ranks() * torch.finfo(dtype).eps
    for what, a, b, total in (
        ("y", split_y, y, sums_y),
        *((what, found[what], right[what], sums[what]) for what in right),
    ):
        excess = (a.double() - b.double()).abs() - bound * total
        assert excess.numel() == 0 or excess.max() <= 0, f"{what}: {excess.max():.3g} beyond the bound"
    assert found.keys() == right.keys()


@BOTH
@pytest.mark.parametrize(
    ("dropout", "base", "bias_trains", "dtype", "rows"),
    [
        (0.0, "linear", False, torch.float32, (2, 5)),
        (0.4, "linear", True, torch.float32, (7,)),
        (0.4, "linear", False, torch.bfloat16, (2, 5)),
        (0.4, "conv1d", False, torch.float32, (1, 1)),
        (0.4, "linear", False, torch.float64, (0, 5)),
    ],
)
def test_a_split_layer_is_one_process_s(pair, name, dropout, base, bias_trains, dtype, rows):
    pair.run(split_layer, name, dropout, base, bias_trains, dtype, rows)


def mask_of_all(name):
    """x of ones, W = 0, A of ones, B of ones: dx is the mask."""
    layer = layer_of(0.5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A["default"].fill_(1.0)
        layer.lora_B["default"].fill_(1.0)
    options = {"output_layouts": Replicate()} if name == "colwise" else {"input_layouts": Replicate()}
    parallelize_module(layer, mesh_of_all(), STYLES[name](**options))
    torch.manual_seed(31 + rank())
    x = torch.ones(6, IN, requires_grad=True)
    layer(x).sum().backward()
    torch.manual_seed(31)
    seed = int(torch.randint(0, 2**63 - 1, (1,)))
    drawn = fused_lora.dropout_mask(seed, 6, IN, 0.5)
    assert torch.equal(x.grad != 0, drawn)


@BOTH
def test_all_draw_their_columns_of_the_first_one_s_mask(pair, name):
    pair.run(mask_of_all, name)


def plan(colwise=ColwiseLoRA, rowwise=RowwiseLoRA):
    ends = {"q_proj": colwise, "k_proj": colwise, "v_proj": colwise, "o_proj": rowwise}
    ends |= {"gate_proj": colwise, "up_proj": colwise, "down_proj": rowwise}
    block = {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }
    return {f"layers.*.{part}.{name}": ends[name]() for part, names in block.items() for name in names}


def decoder_of(model):
    return next(m for m in model.modules() if type(m).__name__ == "Qwen2Model")


def split_model(owner, dropout):
    """Every process has the same batch, and every layer the mask of the first process's generator."""
    one = adapted_model(owner, dropout)
    loss = loss_of(one, 0)
    loss.backward()
    model = adapted_model(owner, dropout)
    parallelize_module(decoder_of(model), mesh_of_all(), plan())
    with Calls() as calls:
        split_loss = loss_of(model, 0, seed=900 + rank())
    assert len(calls.weights) == 14
    split_loss.backward()
    torch.testing.assert_close(split_loss, loss)
    assert_same(gradients(model), gradients(one))


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_split_model_s_gradients_are_one_process_s(pair, owner, dropout):
    pair.run(split_model, owner, dropout)


def split_both_ways(owner):
    """Processes 0, 1 have one batch and 2, 3 another; a row of the mesh shares each weight's shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    right = of_one_process(adapted_model(owner, 0.3), 2)[1]
    model = adapted_model(owner, 0.3)
    parallelize_module(decoder_of(model), mesh["tp"], plan())
    shard(model, mesh=mesh["dp"])
    group = mesh.get_local_rank("dp")
    with Calls() as calls:
        loss = loss_of(model, group, seed=900 + group + 10 * mesh.get_local_rank("tp"))
    assert len(calls.weights) == 14
    loss.backward()
    assert_same(gradients(model), right)


@pytest.mark.parametrize("owner", OWNERS)
def test_fsdp_of_a_split_model(four, owner):
    four.run(split_both_ways, owner)


def add_to_split():
    """The adapter's halves are laid out beside what torch's own styles have split."""
    one = adapted_model("add_lora", 0.3)
    loss_of(one, 0).backward()
    model = plain_model()
    parallelize_module(decoder_of(model), mesh_of_all(), plan(ColwiseParallel, RowwiseParallel))
    torch.manual_seed(rank())
    fused_lora.add_lora(model, "all", r=4, alpha=8, dropout=0.3)
    first = model.model.layers[0].self_attn.q_proj.lora_A["default"]
    assert first.placements == (Replicate(),)
    assert model.model.layers[0].mlp.down_proj.lora_A["default"].placements == (Shard(1),)
    a = first.to_local().clone()
    torch.distributed.broadcast(a, 0)
    assert torch.equal(a, first.to_local())
    for name, parameter in one.named_parameters():
        write(model.get_parameter(name), parameter)
    loss_of(model, 0, seed=900 + rank()).backward()
    assert_same(gradients(model), gradients(one))


def test_adapters_are_added_to_a_split_model(pair):
    pair.run(add_to_split)


def life_of_split(directory):
    def same(atol=1e-5):
        tokens = torch.arange(5)[None]
        return torch.allclose(model(input_ids=tokens).logits, one(input_ids=tokens).logits, atol=atol)

    one, model = adapted_model("add_lora"), adapted_model("add_lora")
    parallelize_module(decoder_of(model), mesh_of_all(), plan())
    fused_lora.save_adapter(model, directory)
    torch.distributed.barrier()
    for each in (one, model):
        fused_lora.add_lora(each, "all", r=2, adapter_name="second")
        fused_lora.load_adapter(each, directory, "loaded")
    assert same()
    for each in (one, model):  # concatenated ranks, and what `second` adds is nothing
        for layer in fused_lora.swap.lora_layers(each).values():
            layer.set_adapter(["default", "second", "loaded"])
    assert same()
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.to_local().clone()
    fused_lora.merge(model)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight.to_local(), before)
    assert same()
    fused_lora.unmerge(model)
    assert model.model.layers[0].mlp.up_proj.weight is weight
    assert torch.equal(weight.to_local(), before)
    with fused_lora.disabled(model):
        assert not same()
        with fused_lora.disabled(one):
            assert same()


def test_a_split_model_is_saved_loaded_merged_and_switched(pair, tmp_path):
    pair.run(life_of_split, tmp_path)


def refuse():
    mesh = mesh_of_all()
    whole_, rows, columns = [Replicate()], [Shard(0)], [Shard(1)]

    def call(x=whole_, weight=rows, a=whole_, b=rows, **options):
        parts = (torch.randn(5, 20), torch.randn(8, 20), torch.randn(2, 20), torch.randn(8, 2))
        placed = [
            distribute_tensor(t, mesh, p) if p else t for t, p in zip(parts, (x, weight, a, b), strict=True)
        ]
        return fused_lora.lora_linear(*placed, **options)

    for changes, message in (
        ({"weight": whole_}, r"its weight is a DTensor laid out as \(Replicate\(\),\), not as"),
        (
            {"a": rows},
            r"lora_a must be laid out as \(Replicate\(\),\) beside a colwise weight, and is \(Shard",
        ),
        ({"b": whole_}, "lora_b must be laid out as"),
        ({"weight": columns}, r"lora_a must be laid out as \(Shard\(dim=1\),\) beside a rowwise weight"),
        (
            {"weight": columns, "a": columns, "b": whole_, "dropout_p": 0.5},
            "in_features in multiples of 8, and each of 2 has 10 of 20",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changes)
    for name, place in (("x", 0), ("lora_a", 2)):
        changes = {("x", "weight", "a", "b")[place]: None}
        with pytest.raises(TypeError, match=f"{name} must be a DTensor, as weight is, got a Tensor"):
            call(**changes)
    assert call(x=rows).placements == (Shard(1),)  # x is brought to the layout that it must have

    layer = LoRALinear.from_linear(torch.nn.Linear(16, 16), r=2, dropout=0.5)
    layer.add_adapter("second", layer.settings["default"], activate=False)
    layer.set_adapter(["default", "second"])
    parallelize_module(layer, mesh, ColwiseLoRA())
    with pytest.raises(NotImplementedError, match="each drop out by a mask of its own"):
        layer(torch.randn(3, 16))
    merged = layer_of()
    merged.merge()
    with pytest.raises(RuntimeError, match="unmerge it before"):
        parallelize_module(merged, mesh, ColwiseLoRA())


def test_other_layouts_are_refused_by_their_names(pair):
    pair.run(refuse)


def report_others():
    """Layouts that the op does not know stand in the reports, and PEFT computes them."""
    mesh = mesh_of_all()
    linear = torch.distributed.tensor.distribute_module(torch.nn.Sequential(torch.nn.Linear(16, 8)), mesh)
    with pytest.raises(ValueError, match=r"laid out as \(Replicate"):
        fused_lora.add_lora(linear, ["0"])
    model = peft_model(plain_model())
    settle(model)
    right = model(input_ids=torch.arange(5)[None]).logits
    layer = decoder_of(model).layers[0].self_attn.o_proj
    parallelize_module(layer, mesh, RowwiseLoRA(input_layouts=Replicate()))
    a = layer.lora_A["default"]
    a.weight = torch.nn.Parameter(a.weight.redistribute(placements=[Replicate()]))
    report = fused_lora.fuse(model)
    (skip,) = report.skipped
    assert skip.name.endswith("layers.0.self_attn.o_proj")
    assert skip.reason.startswith("lora_a must be laid out as (Shard(dim=1),) beside a rowwise weight")
    torch.testing.assert_close(model(input_ids=torch.arange(5)[None]).logits, right)


def test_other_layouts_stand_in_the_report(pair):
    pair.run(report_others)


def plain_styles():
    """One plan for all: what has no adapter is split as torch splits it."""
    mesh = mesh_of_all()
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 8)
    x = torch.randn(3, 16)
    right = F.linear(x, linear.weight, linear.bias)
    for style in (ColwiseLoRA(output_layouts=Replicate()), RowwiseLoRA(input_layouts=Replicate())):
        torch.manual_seed(0)
        split = parallelize_module(torch.nn.Linear(16, 8), mesh, style)
        torch.testing.assert_close(split(x), right)
    biased = peft_model(plain_model()).base_model.model.model.layers[0].mlp.up_proj
    biased.lora_B["default"].bias = torch.nn.Parameter(torch.zeros(biased.out_features))
    with pytest.raises(TypeError, match="it is not split: adapter 'default' has a bias"):
        parallelize_module(biased, mesh, ColwiseLoRA())
    assert not isinstance(biased.base_layer.weight, DTensor)


def test_the_styles_serve_plain_layers_too(pair):
    pair.run(plain_styles)


def split_by_transformers(directory):
    """It splits a model by forwards of its own, which PEFT's layers go through and the op would pass by."""
    config = DistributedConfig(tp_plan="auto", tp_size=ranks())
    model = transformers.Qwen2ForCausalLM.from_pretrained(directory, distributed_config=config)
    with pytest.raises(ValueError, match="its forward is overridden on the instance"):
        fused_lora.add_lora(model, "all")
    # Those that it splits colwise: PEFT 0.21 makes a shape of its own for the others' A, and fails on it.
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    one, model = peft_model(plain_model(), 0.0, targets), peft_model(model, 0.0, targets)
    settle(one)
    for name, parameter in one.named_parameters():
        if "lora_" in name:
            write(model.get_parameter(name), parameter)
    report = fused_lora.fuse(model)
    assert not report.swapped
    assert len(report.skipped) == 10
    assert all("its forward is overridden on the instance" in skip.reason for skip in report.skipped)
    fused_lora.fuse(one)
    loss_of(one, 0).backward()
    loss_of(model, 0).backward()
    assert_same(gradients(model), gradients(one))


def test_what_transformers_has_split_is_left_to_peft(pair, tmp_path):
    plain_model().save_pretrained(tmp_path)
    pair.run(split_by_transformers, tmp_path)
