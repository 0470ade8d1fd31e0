"""Layers of a model that share their input: computed by one call, and never other than by themselves."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections import Counter
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora import LoRALinear, add_lora, fuse, grouped, groups, remove_lora, unfuse, use_groups
from tests import models
from tests.models import Snapshot, example, output, shake, tiny

steady = pytest.fixture(models.steady, autouse=True)
TOGETHER = "lora_linear_grouped_forward"
ALONE = "lora_linear_forward"
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def always():
    """Small inputs are grouped too, and the fused kernels give a group's outputs bit for bit."""
    with use_groups("always"):
        yield
    grouped.conclude()


class Ops(TorchDispatchMode):
    """Counts the calls of fused_lora's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func.name().split("::")
        if space == "fused_lora":
            self.calls[name.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def ops_of(call) -> Counter[str]:
    with Ops() as ops:
        call()
    return ops.calls


def adapted(kind: str, family: str = "llama", targets: Any = None, dtype=F32, **sizes: Any) -> Any:
    model = tiny(family, dtype, **sizes)
    if kind == "LoRALinear":
        add_lora(model, targets or "all", r=4, alpha=6)
    else:
        names = targets or ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=names))
        fuse(model)
    shake(model)
    return model.train()


def output_and_gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    y = output(model, batch)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    torch.autograd.backward(y, dy)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **gradients}


def assert_as_ungrouped(model: Any, batch: dict[str, Tensor]) -> None:
    ours = output_and_gradients(model, batch)
    with use_groups("never"):
        alone = output_and_gradients(model, batch)
    assert ours.keys() == alone.keys()
    for name, value in ours.items():
        distance = (value - alone[name]).norm() / alone[name].norm().clamp(min=1e-6)
        assert distance < 1e-4, name


@pytest.mark.parametrize("kind", ["LoRALinear", "PEFT"])
def test_query_key_and_value_are_one_call_and_gate_and_up_another(kind):
    model = adapted(kind, num_hidden_layers=2, num_key_value_heads=2)
    batch = example("llama")
    calls = ops_of(lambda: output(model, batch).sum().backward())
    halves = ("lora_linear_grouped", "lora_linear")
    assert calls == {f"{op}_{half}": 4 for op in halves for half in ("forward", "backward")}
    assert_as_ungrouped(model, batch)
    with use_groups("never"):
        assert ops_of(lambda: output(model, batch)) == {ALONE: 14}


@pytest.mark.parametrize("family", ["t5", "bert", "opt", "phi3", "gpt2", "qwen2"])
def test_families_of_models_compute_what_they_did(family):
    model = adapted("LoRALinear", family).eval()
    for _ in range(2):  # after the first call layers may have parted
        assert_as_ungrouped(model, example(family))


@pytest.mark.parametrize(("family", "role"), [("gpt2", "attn.c_attn"), ("phi3", "qkv_proj")])
def test_a_linear_that_makes_query_key_and_value_at_once_is_one_layer(family, role):
    model = adapted("LoRALinear", family, [role])
    assert ops_of(lambda: output(model, example(family))) == {ALONE: 1}
    assert groups(model).groups == []


@pytest.mark.parametrize(
    ("targets", "together"),
    [(["q_proj", "v_proj"], 1), (["v_proj"], 0), (["v_proj", "o_proj", "up_proj"], 0)],
)
@pytest.mark.parametrize("kind", ["LoRALinear", "PEFT"])
def test_any_subset(kind, targets, together):
    model = adapted(kind, targets=targets)
    calls = ops_of(lambda: output(model, example("llama")))
    assert calls[TOGETHER] == together
    assert calls[ALONE] == len(targets) - 2 * together
    assert_as_ungrouped(model, example("llama"))


def test_mixed_ranks_and_scalings():
    model = tiny("llama")
    pattern = {"q_proj": 2, "v_proj": 7}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern=pattern)
    model = peft.get_peft_model(model, config)
    fuse(model)
    shake(model)
    assert ops_of(lambda: output(model, example("llama"))) == {TOGETHER: 1}
    assert_as_ungrouped(model, example("llama"))


def test_the_report_tells_groups():
    report = add_lora(tiny("llama", num_hidden_layers=2), "all", r=4)
    assert len(report.groups) == 4
    assert "10 share an input with others, in 4 groups" in str(report)
    assert "2 × model.layers.*.self_attn: q_proj + k_proj + v_proj" in str(report)
    assert add_lora(tiny("llama"), "all", r=4, grouped=False).groups == []


# Three layers, and what happens between their calls.


class Attention(nn.Module):
    def __init__(self, between=None, dtype=F32):
        super().__init__()
        for name, size in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
            setattr(self, name, nn.Linear(12, size, dtype=dtype))
        self.between = between

    def forward(self, x):
        q = self.q_proj(x)
        if self.between is not None:
            self.between(self, x)
        return q, self.k_proj(x), self.v_proj(x)


def attention(between=None, dtype=F32) -> Attention:
    torch.manual_seed(1)
    model = Attention(between, dtype)
    add_lora(model, ["q_proj", "k_proj", "v_proj"], r=4, dtype=dtype)
    shake(model)
    return model


def rows(dtype=F32, **options: Any) -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(2), dtype=dtype, **options)


def replace_parameter(model, x):
    model.k_proj.lora_A["default"] = nn.Parameter(torch.ones(4, 12))


def change_parameter(model, x):
    with torch.no_grad():
        model.k_proj.lora_B["default"].add_(1)


def change_weight(model, x):
    with torch.no_grad():
        model.k_proj.weight.add_(1)


def change_x(model, x):
    x.add_(1)


def disable(model, x):
    model.k_proj.enabled = False


def merge(model, x):
    model.k_proj.merge()


def another_adapter(model, x):
    model.k_proj.add_adapter("other", fused_lora.LoRASettings(r=2))
    nn.init.ones_(model.k_proj.lora_B["other"])


def dropout(model, x):
    model.k_proj.settings["default"] = fused_lora.LoRASettings(r=4, dropout=0.9)


def another_scaling(model, x):
    model.k_proj.settings["default"] = fused_lora.LoRASettings(r=4, alpha=1.0)


def hook(model, x):
    model.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def override_forward(model, x):
    model.k_proj.forward = lambda x: torch.zeros(5, 8)


CHANGES = [
    *(replace_parameter, change_parameter, change_weight, change_x, disable, merge, another_adapter),
    *(dropout, another_scaling, hook, override_forward),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_calls_shows(change):
    x = rows()
    with torch.no_grad():
        torch.manual_seed(3)
        ours = attention(change)(x.clone())
        torch.manual_seed(3)
        with use_groups("never"):
            alone = attention(change)(x.clone())
    for y, own in zip(ours, alone, strict=True):
        assert torch.equal(y, own)
    unchanged = attention()(x.clone())[1]
    assert not torch.equal(ours[1], unchanged)


class Between(Attention):
    """The layers are called under the modes that are given, one each."""

    def __init__(self, *modes) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, x):
        ys = []
        for layer, mode in zip((self.q_proj, self.k_proj, self.v_proj), self.modes, strict=True):
            with mode():
                ys.append(layer(x))
        return ys


def autocast():
    return torch.autocast("cpu", dtype=BF16)


def composed():
    return fused_lora.use_path("composed")


def saved_on_cpu():
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        autocast,
        saved_on_cpu,
        Ops,
        composed,
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_result_is_not_taken_under_another_mode(mode, place):
    modes = [torch.enable_grad] * 3
    modes[place] = mode
    model = Between(*modes)
    add_lora(model, ["q_proj", "k_proj", "v_proj"], r=4)
    shake(model)
    x = rows(requires_grad=True)
    ours = model(x)
    with use_groups("never"):
        alone = model(x)
    for y, own in zip(ours, alone, strict=True):
        torch.testing.assert_close(y, own)
        assert y.dtype == own.dtype
        assert y.requires_grad == own.requires_grad
        assert y.is_inference() == own.is_inference()


def test_each_result_is_taken_once():
    model = attention()
    x = rows()
    assert ops_of(lambda: model(x)) == {TOGETHER: 1}
    assert grouped._thread.held is None
    # A second call with the same tensor computes again: what was taken is the caller's, who may change it.
    first = model.k_proj(x)
    first.data.zero_()
    assert torch.equal(attention().k_proj(x), model.k_proj(x))


def test_layers_that_turn_out_to_have_inputs_of_their_own_part():
    """A cross-attention: the query is of x, key and value of something else."""

    class Cross(Attention):
        def forward(self, x, other):
            return self.q_proj(x), self.k_proj(other), self.v_proj(other)

    model = Cross()
    add_lora(model, ["q_proj", "k_proj", "v_proj"], r=4)
    assert groups(model).groups == [("q_proj", "k_proj", "v_proj")]
    x, other = rows(), rows() + 1
    assert ops_of(lambda: model(x, other)) == {TOGETHER: 2}  # one of them for the query alone
    assert ops_of(lambda: model(x, other)) == {TOGETHER: 1, ALONE: 1}
    report = groups(model)
    assert report.groups == [("k_proj", "v_proj")]
    assert [(s.name, s.reason) for s in report.apart] == [
        ("q_proj", "its siblings were not called with the tensor that it was called with")
    ]
    assert "q_proj: its siblings were not called" in str(report)
    assert fused_lora.group(model).groups == [("q_proj", "k_proj", "v_proj")]  # asked to expect it anew


def test_a_layer_that_is_never_called_costs_one_wasted_product():
    class Two(Attention):
        def forward(self, x):
            return self.q_proj(x), self.v_proj(x)

    model = Two()
    add_lora(model, ["q_proj", "k_proj", "v_proj"], r=4)
    for _ in range(2):
        assert ops_of(lambda: model(rows())) == {TOGETHER: 1}
    assert groups(model).groups == [("q_proj", "v_proj")]
    assert [s.name for s in groups(model).apart] == ["k_proj"]


def test_what_is_held_does_not_outlive_the_tensor():
    model = attention()
    with torch.no_grad():
        x = rows()
        model.q_proj(x)
        (_, _, result), _ = grouped._thread.held.results.values()
        result = weakref.ref(result)
        del x, _
    assert result() is None
    assert groups(model).groups == [("k_proj", "v_proj")]


def test_at_most_one_calls_results_are_held():
    first, second = attention(), attention()
    x = rows(requires_grad=True)
    first.q_proj(x)  # its graph keeps x
    held = weakref.ref(grouped._thread.held)
    second(x)
    assert held() is None
    assert grouped._thread.held is None


def test_a_hooked_layer_is_left_out_and_its_hooks_run_when_it_is_called():
    model = attention()
    order = []
    model.k_proj.register_forward_pre_hook(lambda *_: order.append("before k"))
    model.k_proj.register_forward_hook(lambda *_: order.append("after k"))
    model.v_proj.register_forward_hook(lambda *_: order.append("after v")).remove()
    x = rows()
    for _ in range(2):
        assert ops_of(lambda: model(x)) == {TOGETHER: 1, ALONE: 1}
    assert order == ["before k", "after k"] * 2
    model.q_proj.register_forward_hook(lambda *_: order.append("after q"))
    assert ops_of(lambda: model(x)) == {ALONE: 3}


def test_with_dropout_each_layer_draws_when_it_is_called():
    model = Attention()
    add_lora(model, ["q_proj", "k_proj", "v_proj"], r=4, dropout=0.2)
    shake(model)
    x = rows()
    torch.manual_seed(5)
    ours = model(x)
    torch.manual_seed(5)
    with use_groups("never"):
        alone = model(x)
    assert all(map(torch.equal, ours, alone))
    assert ops_of(lambda: model(x)) == {ALONE: 3}
    assert ops_of(lambda: model.eval()(x)) == {TOGETHER: 1}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    gradients = []
    for mode in ("always", "never"):
        model = attention()
        x = rows(requires_grad=True)
        with use_groups(mode):
            for _ in range(2):
                ys = checkpoint(model, x, use_reentrant=use_reentrant)
                sum(y.square().sum() for y in ys).backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-3)


def test_gradient_checkpointing_of_a_model():
    model = adapted("LoRALinear")
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert_as_ungrouped(model, example("llama"))


def test_a_traced_graph_holds_the_layers_own_calls():
    torch._dynamo.reset()
    model = attention()
    x = rows()
    expected = model(x)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected)
    graph = torch.export.export(model, (x,)).graph
    called = [str(node.target) for node in graph.nodes if "fused_lora" in str(node.target)]
    assert called == ["fused_lora.lora_linear.default"] * 3


def copied(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["LoRALinear", "PEFT"])
def test_copies_have_groups_of_their_own(how, kind):
    model = adapted(kind)
    batch = example("llama")
    output(model, batch)
    twin = copied(model, how)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    output(twin, batch)  # its layers find each other
    assert ops_of(lambda: output(twin, batch)) == {TOGETHER: 2, ALONE: 2}
    assert_as_ungrouped(twin, batch)
    assert_as_ungrouped(model, batch)
    assert len(groups(model).groups) == len(groups(twin).groups) == 2


def test_a_copy_of_one_layer_does_not_copy_its_siblings():
    model = attention()
    model.k_proj.lock = threading.Lock()  # cannot be copied
    twin = copy.deepcopy(model.q_proj)
    for _ in range(2):
        assert torch.equal(twin(rows()), model.q_proj(rows()))
        grouped.conclude()


def test_a_group_does_not_keep_its_layers():
    model = attention()
    model(rows())
    layer = weakref.ref(model.k_proj)
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_threads_hold_results_of_their_own():
    model = attention()
    inputs = [rows() + i for i in range(4)]
    with torch.no_grad():
        expected = [attention()(x) for x in inputs]
    wrong = []

    def serve(i):
        with torch.no_grad():
            for _ in range(50):
                for y, own in zip(model(inputs[i]), expected[i], strict=True):
                    if not torch.equal(y, own):
                        wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert groups(model).groups == [("q_proj", "k_proj", "v_proj")]


def test_functional_call():
    model = attention()
    x = rows()
    model(x)
    other = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    got = torch.func.functional_call(model, other, (x,))
    with use_groups("never"):
        expected = torch.func.functional_call(model, other, (x,))
    torch.testing.assert_close(got, expected)
    assert not torch.equal(got[1], model(x)[1])


def test_a_backward_of_part_of_the_outputs():
    """What does not lead to the loss gets no gradient, as ever."""
    model = attention()
    q, _, v = model(rows())
    (q.sum() + v.sum()).backward()
    assert model.k_proj.lora_A["default"].grad is None
    assert model.v_proj.lora_A["default"].grad is not None


def test_a_call_that_fails_fails_as_the_layers_own():
    model = attention()
    with pytest.raises(ValueError, match=r"x must have in_features = 12 \(as weight\).*got shape \[5, 7\]"):
        model(torch.randn(5, 7))
    assert ops_of(lambda: model(rows())) == {TOGETHER: 1}


def test_packed_weights():
    model = Attention(dtype=BF16)
    for name, size in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
        setattr(model, name, nn.Linear(12, size, dtype=BF16))
    add_lora(model, ["q_proj", "k_proj", "v_proj"], r=4)
    shake(model)
    x = rows(BF16)
    with torch.no_grad():
        expected = model(x)
        model.q_proj(x)  # and nobody takes the others
        assert len(fused_lora.pack(model).packed) == 3
        fused_lora.group(model)
        assert ops_of(lambda: model(x)) == {TOGETHER: 1}
        torch.testing.assert_close(model(x), expected)


def test_inference_mode():
    model = attention()
    with torch.inference_mode():
        # Such tensors do not tell that they changed.
        assert ops_of(lambda: model(rows())) == {"lora_linear": 3}
        made_inside = rows()
        torch.testing.assert_close(model(made_inside), attention()(made_inside))
    x = rows()
    with torch.inference_mode():
        assert ops_of(lambda: model(x)) == {"lora_linear_grouped": 1}


def test_under_autocast_x_is_cast_once():
    def casts(mode):
        model = attention()
        x = rows(requires_grad=True) * 1
        with use_groups(mode), torch.autocast("cpu", dtype=BF16):
            ys = model(x)
        nodes, todo = set(), [y.grad_fn for y in ys]
        while todo:
            node = todo.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                todo += [following for following, _ in node.next_functions]
        return sum("SharedCast" in node.name() for node in nodes)

    assert casts("always") == 1
    assert casts("never") == 3


def test_auto_computes_together_in_training_from_many_rows_on():
    model = attention()
    many = torch.randn(grouped.FEWEST_ROWS, 12, requires_grad=True) * 1
    with use_groups("auto"):
        assert ops_of(lambda: model(many)) == {TOGETHER: 1}
        assert ops_of(lambda: model(many[1:])) == {ALONE: 3}
        assert ops_of(lambda: model(many.detach())) == {ALONE: 3}
        assert ops_of(lambda: model(many.detach().requires_grad_())) == {ALONE: 3}
        with torch.no_grad():
            assert ops_of(lambda: model(many)) == {ALONE: 3}
        two = Attention(lambda model, x: None)
        add_lora(two, ["q_proj", "k_proj"], r=4)
        assert ops_of(lambda: two(many)) == {ALONE: 2}
        with torch.autocast("cpu", dtype=BF16):
            assert ops_of(lambda: two(many)) == {TOGETHER: 1}


def test_a_mode_that_there_is_not():
    with (
        pytest.raises(ValueError, match="mode must be one of auto, always, never, got 'on'"),
        use_groups("on"),
    ):
        pass


def test_taken_off_nothing_is_left():
    model = tiny("llama")
    before = Snapshot.of(model)
    add_lora(model, "all", r=4)
    output(model, example("llama"))
    remove_lora(model)
    before.check(model)

    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = Snapshot.of(model)
    fuse(model)
    output(model, example("llama"))
    unfuse(model)
    before.check(model)


def test_a_loaded_adapter_is_grouped(tmp_path):
    model = adapted("LoRALinear")
    fused_lora.save_adapter(model, tmp_path)
    other = tiny("llama")
    fused_lora.load_adapter(other, tmp_path)
    assert len(groups(other).groups) == 2
    assert isinstance(other.get_submodule("model.layers.0.self_attn.q_proj"), LoRALinear)
