"""Batches whose rows belong to different adapters: the op, LoRALinear and PEFT's adapter_names."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fused_lora
from fused_lora import LoRALinear, LoRASettings, lora_linear_mixed, reference, use_adapters
from fused_lora.paths import CPU_LEVELS
from fused_lora.peft_layers import FusedPeftLinear
from tests.models import example, output, shake, tiny
from tests.operands import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    assert_no_worse_than_torch,
    check_against_torch,
    exact_dy,
    operands,
)

either_path = pytest.mark.usefixtures("either_path")

RANKS = (4, 16, 3, 1)


@dataclass
class Mixed:
    """x: …×in, weight: out×in, lora_a: each r×in, lora_b: each out×r, index: of x's first dimensions."""

    x: Tensor
    weight: Tensor
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    index: Tensor
    bias: Tensor | None
    options: dict[str, Any]

    def leaves(self) -> Mixed:
        def leaf(t: Tensor) -> Tensor:
            return t.detach().clone().requires_grad_()

        a, b = [leaf(t) for t in self.lora_a], [leaf(t) for t in self.lora_b]
        return replace(self, x=leaf(self.x), lora_a=a, lora_b=b)

    def double(self) -> Mixed:
        return replace(
            self,
            x=self.x.double(),
            weight=self.weight.double(),
            lora_a=[t.double() for t in self.lora_a],
            lora_b=[t.double() for t in self.lora_b],
            bias=None if self.bias is None else self.bias.double(),
        )

    def call(self, op: Any) -> Tensor:
        y: Tensor = op(self.x, self.weight, self.lora_a, self.lora_b, self.index, self.bias, **self.options)
        return y


def mixed(
    index: Any,
    in_features: int = 24,
    out_features: int = 16,
    ranks: tuple[int, ...] = RANKS,
    dtype: torch.dtype = F32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    dropout_p: float = 0.0,
    lead: tuple[int, ...] = (),
) -> Mixed:
    """index: a tensor, or a list. lead: x's dimensions after those of index."""
    index = torch.as_tensor(index, dtype=torch.int64)
    first = operands((*index.shape, *lead), in_features, out_features, 2, dtype, bias=bias)
    drawn = [
        operands((1,), in_features, out_features, rank, dtype, adapter_dtype, key=rank) for rank in ranks
    ]
    options: dict[str, Any] = {"scaling": [0.5 + i for i in range(len(ranks))], "dropout_p": dropout_p}
    if dropout_p > 0:
        options["seed"] = torch.tensor([77])
    a, b = [d.lora_a for d in drawn], [d.lora_b for d in drawn]
    return Mixed(first.x, first.weight, a, b, index, first.bias, options)


def torch_sequence(
    x: Tensor,
    weight: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    index: Tensor,
    bias: Tensor | None,
    *,
    scaling: list[float],
    dropout_p: float,
    seed: Tensor | None = None,
) -> Tensor:
    """The unfused op sequence, an adapter at a time, in the operands' own dtypes."""
    rows = x.reshape(-1, x.shape[-1])
    spread = index.reshape(*index.shape, *(1,) * (x.dim() - 1 - index.dim())).expand(x.shape[:-1])
    mask, scale = torch.ones_like(rows, dtype=torch.bool), 1.0
    if dropout_p:
        assert seed is not None
        mask = reference.dropout_mask(seed, rows.shape[0], rows.shape[1], dropout_p)
        scale = reference.dropout_rule(dropout_p)[1]
    y = torch.nn.functional.linear(rows, weight, bias)
    for i, (a, b, s) in enumerate(zip(lora_a, lora_b, scaling, strict=True)):
        own = (spread.reshape(-1) == i).nonzero().squeeze(1)
        x_hat = rows[own].to(a.dtype) * (mask[own] * scale).to(a.dtype)
        y = y.index_put((own,), (y[own] + x_hat @ a.t() @ b.t() * s).to(y.dtype))
    return y.reshape(*x.shape[:-1], weight.shape[0])


def output_and_gradients(given: Mixed, op: Any) -> dict[str, Tensor]:
    given = given.leaves()
    y = given.call(op)
    wanted = [given.x, *given.lora_a, *given.lora_b]
    gradients = torch.autograd.grad(y, wanted, exact_dy(y).to(y.dtype), allow_unused=True)
    names = ["x", *(f"{m}[{i}]" for m in ("lora_a", "lora_b") for i in range(len(given.lora_a)))]
    found = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for name, leaf, gradient in zip(names, wanted, gradients, strict=True)
    }
    return {"y": y.detach(), **found}


def check(given: Mixed, op: Any = lora_linear_mixed) -> None:
    """Output and every gradient by the rule of tests/operands.py."""
    ours, own = output_and_gradients(given, op), output_and_gradients(given, torch_sequence)
    exact = output_and_gradients(given.double(), torch_sequence)
    for name, value in exact.items():
        assert_no_worse_than_torch(ours[name], own[name], value, name)


def shuffled(rows: int, adapters: int = len(RANKS), key: int = 3) -> Tensor:
    """Every adapter and none, in any order."""
    return torch.randint(-1, adapters, (rows,), generator=torch.Generator().manual_seed(key))


# The op

INDICES: dict[str, Any] = {
    "sorted": shuffled(40).sort().values,
    "in any order": shuffled(40),
    "segments in any order": torch.tensor([2, -1, 0, 3, 1, -1]).repeat_interleave(9),
    "many rows in any order": shuffled(560),
    "an adapter's many rows, apart": torch.tensor([0, 2, 0]).repeat_interleave(torch.tensor([520, 3, 40])),
    "long segments": torch.tensor([1, -1, 3]).repeat_interleave(torch.tensor([530, 5, 30])),
    "one adapter": torch.ones(33),
    "one row": [2],
    "few rows": [3, 0, -1, 0, 1],
    "none has any": [-1] * 20,
    "no rows": [],
}


@either_path
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_order_of_rows_is_as_exact_as_torch(index, dtype, adapter_dtype, dropout_p):
    check(mixed(index, 70, 45, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p))


@either_path
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_every_dtype_is_as_exact_as_torch(dtype, adapter_dtype):
    check(mixed(shuffled(50), 136, 72, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=0.1))


@pytest.fixture(params=CPU_LEVELS[1:])
def level(request):
    try:
        with fused_lora.use_cpu_level(request.param):
            yield request.param
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"), [(64, 576, 192), (9, 203, 113), (130, 1, 40)]
)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, BF16)])
def test_every_level_is_as_exact_as_torch(level, rows, in_features, out_features, dtype, adapter_dtype):
    given = mixed(
        shuffled(rows), in_features, out_features, (16, 8, 130), dtype, adapter_dtype, dropout_p=0.2
    )
    given.index.clamp_(max=2)
    with fused_lora.use_path("fused"):
        check(given)


@either_path
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3)])
def test_an_index_counts_for_the_rows_of_its_element(bias, lead):
    check(mixed([1, -1, 3, 0], bias=bias, lead=lead))
    check(mixed([[1, -1], [3, 0]], bias=bias, lead=lead))


def test_one_adapter_for_all_rows_is_lora_linear():
    given = operands((2, 30), 64, 48, 8, dropout_p=0.2)

    def op(x, weight, lora_a, lora_b, bias, *, scaling, **options):
        index = torch.zeros(x.shape[0], dtype=torch.int64)
        return lora_linear_mixed(x, weight, [lora_a], [lora_b], index, bias, scaling=[scaling], **options)

    check_against_torch(given, op)


STRIDED = {
    "every second row": lambda x: x[::2],
    "a slice of columns": lambda x: x[:, 3:27],
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded rows": lambda x: x[:1].expand(20, -1),
    "every second column": lambda x: torch.cat([x, x], 1)[:, ::2],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("index", [shuffled(20), shuffled(20).sort().values], ids=["any order", "sorted"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strided_x_gives_what_a_contiguous_copy_gives(view, index, dtype):
    x = view(operands((40,), in_features=32, dtype=dtype).x)[:20]
    given = mixed(index, x.shape[1], dtype=dtype)
    rounding = {"rtol": 2**-7, "atol": 2**-8} if dtype == BF16 else {"rtol": 1e-5, "atol": 1e-5}
    expected = replace(given, x=x.contiguous()).call(lora_linear_mixed)
    torch.testing.assert_close(replace(given, x=x).call(lora_linear_mixed), expected, **rounding)


@pytest.mark.parametrize("rows", [9, 300])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_threads_change_no_bit(rows, dtype):
    given = mixed(shuffled(rows), 200, 300, dtype=dtype, dropout_p=0.1)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(output_and_gradients(given, lora_linear_mixed))
    torch.set_num_threads(threads)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("transposed", ["weight", "adapters"])
def test_parameters_may_be_stored_transposed(transposed):
    given = mixed(shuffled(30))
    expected = output_and_gradients(given, lora_linear_mixed)

    def stored(t: Tensor) -> Tensor:
        return t.t().contiguous().t()

    if transposed == "weight":
        given.weight = stored(given.weight)
    else:
        given.lora_a, given.lora_b = [*map(stored, given.lora_a)], [*map(stored, given.lora_b)]
    torch.testing.assert_close(output_and_gradients(given, lora_linear_mixed), expected)


@pytest.mark.parametrize("index", [shuffled(64), shuffled(64).sort().values], ids=["any order", "sorted"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_packed_weight_gives_what_a_plain_one_gives(index, dtype):
    given = mixed(index, 96, 64, dtype=dtype)
    expected = output_and_gradients(given, lora_linear_mixed)
    given.weight = torch.ops.fused_lora.pack_weight(given.weight)
    rounding = {"rtol": 2**-6, "atol": 2**-6} if dtype == BF16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(output_and_gradients(given, lora_linear_mixed), expected, **rounding)


@either_path
@pytest.mark.parametrize("index", [shuffled(40), shuffled(40).sort().values], ids=["any order", "sorted"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_stay_with_their_adapter(index, number):
    given = mixed(index)
    clean = output_and_gradients(given, lora_linear_mixed)
    given.lora_a[1].fill_(number)
    given.lora_b[1].fill_(number)
    spoilt = output_and_gradients(given, lora_linear_mixed)
    others = given.index != 1
    for name in ("y", "x"):
        assert torch.equal(spoilt[name][others], clean[name][others])
        assert not spoilt[name][~others].isfinite().any()
    for i in (0, 2, 3):
        assert torch.equal(spoilt[f"lora_a[{i}]"], clean[f"lora_a[{i}]"])
        assert torch.equal(spoilt[f"lora_b[{i}]"], clean[f"lora_b[{i}]"])


@either_path
def test_an_adapter_without_rows_has_gradients_of_zeros():
    found = output_and_gradients(mixed([0, 0, 2, -1]), lora_linear_mixed)
    for i in range(len(RANKS)):
        assert found[f"lora_a[{i}]"].any() == (i in (0, 2))
        assert found[f"lora_b[{i}]"].any() == (i in (0, 2))


@either_path
@pytest.mark.parametrize("trains", [("x",), ("a0",), ("b2",), ("a1", "b1"), ("weight", "bias", "a3")])
def test_gradients_go_to_what_needs_them(trains):
    given = mixed(shuffled(25))
    leaves = {"x": given.x, "weight": given.weight, "bias": given.bias}
    leaves |= {f"a{i}": t for i, t in enumerate(given.lora_a)} | {
        f"b{i}": t for i, t in enumerate(given.lora_b)
    }
    found = []
    for op in (lora_linear_mixed, torch_sequence):
        for name, leaf in leaves.items():
            leaf.grad = None
            leaf.requires_grad_(name in trains)
        given.call(op).square().sum().backward()
        found.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    assert set(found[0]) == set(trains)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@either_path
def test_gradcheck_and_second_derivatives_in_float64():
    given = mixed([1, 0, -1, 1], 5, 4, (2, 3), F64)
    leaves = [given.x, *given.lora_a, *given.lora_b]
    for leaf in leaves:
        leaf.requires_grad_()
    for dropout_p in (0.0, 0.4):

        def op(x, a0, a1, b0, b1, p=dropout_p):
            return lora_linear_mixed(
                x, given.weight, [a0, a1], [b0, b1], given.index, scaling=[2.0, 0.5], dropout_p=p, seed=3
            )

        assert torch.autograd.gradcheck(op, leaves)
        assert torch.autograd.gradgradcheck(op, leaves)


@either_path
@pytest.mark.parametrize("base", [F32, BF16], ids=str)
def test_autocast_rounds_masters_inside(base):
    given = mixed(shuffled(40), 64, 48, dtype=base, adapter_dtype=F32)
    exact = output_and_gradients(given.double(), torch_sequence)
    with torch.autocast("cpu", dtype=BF16):
        ours, own = (output_and_gradients(given, op) for op in (lora_linear_mixed, torch_sequence))
    for name, value in exact.items():
        if name != "y" and name != "x":
            assert ours[name].dtype == F32
        assert_no_worse_than_torch(ours[name].to(own[name].dtype), own[name], value, name)


def test_the_reference_path_agrees():
    given = mixed(shuffled(30), dropout_p=0.3)
    expected = output_and_gradients(given, lora_linear_mixed)
    with fused_lora.use_path("reference"):
        torch.testing.assert_close(output_and_gradients(given, lora_linear_mixed), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p):
    given = mixed([1, -1, 2], dropout_p=dropout_p, lead=(2,)).leaves()
    arguments = (given.x, given.weight, given.lora_a, given.lora_b, given.index, given.bias)
    options = {**given.options, "round_adapters": False}
    torch.library.opcheck(torch.ops.fused_lora.lora_linear_mixed.default, arguments, options)


def test_a_full_graph_compiles_forward_and_backward():
    given = mixed([1, -1, 2], lead=(2,))
    compiled = torch.compile(lora_linear_mixed, backend="aot_eager", fullgraph=True)
    expected = output_and_gradients(given, lora_linear_mixed)
    torch.testing.assert_close(output_and_gradients(given, compiled), expected)


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "index too large": (lambda g: replace(g, index=g.index + 9), IndexError, "adapter_index must be below 4"),
    "index dtype": (
        lambda g: replace(g, index=g.index.int()),
        TypeError,
        "adapter_index must be torch.int64",
    ),
    "index shape": (
        lambda g: replace(g, index=g.index[1:]),
        ValueError,
        r"adapter_index must have the first dimensions of x \(\[3, 24\]\), got shape \[2\]",
    ),
    "no adapters": (
        lambda g: replace(g, lora_a=[], lora_b=[], options={"scaling": []}),
        ValueError,
        "lora_a must have at least 1 entry",
    ),
    "one B too few": (lambda g: replace(g, lora_b=g.lora_b[1:]), ValueError, r"lora_b must have 4 entries"),
    "scalings": (lambda g: replace(g, options={"scaling": [1.0]}), ValueError, "scaling must have 4 entries"),
    "rank": (
        lambda g: replace(g, lora_b=g.lora_b[::-1]),
        ValueError,
        r"lora_b\[0\] must have rank = 4 \(as lora_a\[0\]\)",
    ),
    "mixed dtypes": (
        lambda g: replace(
            g,
            x=g.x.bfloat16(),
            weight=g.weight.bfloat16(),
            bias=None,
            lora_a=[*g.lora_a[:3], g.lora_a[3].bfloat16()],
            lora_b=[*g.lora_b[:3], g.lora_b[3].bfloat16()],
        ),
        TypeError,
        r"lora_a\[3\] must be torch.float32 \(as lora_a\[0\]\), got torch.bfloat16",
    ),
    "dtype": (
        lambda g: replace(g, lora_a=[g.lora_a[0], g.lora_a[1].half(), *g.lora_a[2:]]),
        TypeError,
        r"lora_a\[1\] must be torch.float32 \(as x\), got torch.float16",
    ),
    "x": (lambda g: replace(g, x=g.x[:, 1:]), ValueError, "x must have in_features = 24"),
}


@pytest.mark.parametrize("path", ["composed", "reference"])
@pytest.mark.parametrize(("spoil", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(path, spoil, kind, message):
    with fused_lora.use_path(path), pytest.raises(kind, match=message):
        spoil(mixed([1, -1, 2])).call(lora_linear_mixed)


# LoRALinear


NAMES = ["b", None, "a", "c", "a"]


def adapted_model(dtype: torch.dtype = F32, **settings: Any) -> Any:
    model = tiny("llama", dtype)
    for name, r in (("a", 4), ("b", 2), ("c", 7)):
        targets = ["o_proj"] if name == "c" else ["o_proj", "down_proj"]
        fused_lora.add_lora(model, targets, r=r, adapter_name=name, **settings)
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3
    return model.eval()


def alone(model: Any, batch: dict[str, Tensor], row: int, name: str | None) -> Tensor:
    one = {key: value[row : row + 1] for key, value in batch.items()}
    if name is None:
        with fused_lora.disabled(model):
            return output(model, one)
    fused_lora.set_adapter(model, name)
    return output(model, one)


def test_each_element_is_computed_by_its_own_adapter():
    model, batch = adapted_model(), example("llama", rows=len(NAMES))
    with use_adapters(model, NAMES), torch.no_grad():
        got = output(model, batch)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(got[row : row + 1], alone(model, batch, row, name), rtol=1e-4, atol=1e-4)


def test_several_adapters_train_at_once():
    model, batch = adapted_model(), example("llama", rows=len(NAMES))
    expected: dict[str, Tensor] = {}
    for row, name in enumerate(NAMES):
        if name is not None:
            model.zero_grad()
            alone(model, batch, row, name).sum().backward()
            for key, parameter in model.named_parameters():
                if parameter.grad is not None and key.endswith("." + name):
                    expected[key] = expected.get(key, 0) + parameter.grad
    model.zero_grad()
    fused_lora.train_adapters(model, ["a", "b", "c"])
    with use_adapters(model, NAMES):
        output(model, batch).sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_adapters_that_drop_out_differently_train_in_one_batch():
    torch.manual_seed(0)
    layer = LoRALinear(24, 16)
    for name, dropout in (("kept", 0.0), ("dropped", 1.0)):
        layer.add_adapter(name, LoRASettings(4, dropout=dropout))
        nn.init.normal_(layer.lora_B[name])
    x = torch.randn(3, 5, 24)
    with use_adapters(layer, ["dropped", "kept", None]):
        y = layer(x)
        y.sum().backward()
    layer.set_adapter("kept")
    torch.testing.assert_close(y[1:2], layer(x[1:2]))
    layer.set_adapter([])
    torch.testing.assert_close(y[::2], layer(x[::2]))
    assert not layer.lora_B["dropped"].grad.any()
    assert layer.lora_B["kept"].grad.any()


def test_the_context_leaves_everything_as_it_was():
    model, batch = adapted_model(), example("llama", rows=2)
    before = output(model, batch)
    with use_adapters(model, ["a", None]):
        outer = output(model, batch)
        with use_adapters(model, ["b", "b"]):
            output(model, batch)
        assert torch.equal(output(model, batch), outer)
    assert torch.equal(output(model, batch), before)


def test_a_layer_compiles_in_the_context():
    torch.manual_seed(0)
    layer = LoRALinear(24, 16)
    for name in ("a", "b"):
        layer.add_adapter(name, LoRASettings(4))
        nn.init.normal_(layer.lora_B[name])
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(3, 5, 24)
    for names in (["b", None, "a"], ["a", "a", "b"]):
        with use_adapters(layer, names):
            torch.testing.assert_close(compiled(x), layer(x))


def test_switched_off_adapters_stay_off_in_the_context():
    model, batch = adapted_model(), example("llama", rows=2)
    with fused_lora.disabled(model):
        expected = output(model, batch)
        with use_adapters(model, ["a", "b"]):
            assert torch.equal(output(model, batch), expected)


def test_wrong_names_are_refused():
    model = adapted_model()

    def enter(names: Any) -> None:
        with use_adapters(model, names):
            output(model, example("llama", rows=2))

    with pytest.raises(KeyError, match="no adapter 'z' in this model"):
        enter(["a", "z"])
    with pytest.raises(TypeError, match="sequence of names"):
        enter("ab")
    with pytest.raises(ValueError, match="names: it is empty"):
        enter([])
    with pytest.raises(ValueError, match=r"names: 3 adapters are given for a batch .* \[2, "):
        enter(["a", "b", None])
    fused_lora.set_adapter(model, "a")
    fused_lora.merge(model)
    with pytest.raises(RuntimeError, match="merged"):
        enter(["a", "b"])


# PEFT


PEFT_NAMES = ["german", "__base__", "french", "dutch", "french"]


def peft_model(dtype: torch.dtype = F32, **of_dutch: Any) -> Any:
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["o_proj", "down_proj"], "lora_dropout": 0.2}
    model = get_peft_model(tiny("llama", dtype), LoraConfig(r=4, **settings), adapter_name="french")
    model.add_adapter("german", LoraConfig(r=9, lora_alpha=3, **settings))
    model.add_adapter("dutch", LoraConfig(r=2, **{**settings, "target_modules": ["o_proj"], **of_dutch}))
    shake(model, 1)
    return model.eval()


@pytest.fixture
def calls(monkeypatch):
    """How often the fused op ran."""
    from fused_lora import peft_layers

    seen: list[Any] = []
    run = fused_lora.lora_linear_mixed
    monkeypatch.setattr(
        peft_layers, "lora_linear_mixed", lambda *args, **kwargs: seen.append(args) or run(*args, **kwargs)
    )
    return seen


@pytest.mark.parametrize(("dtype", "autocast"), [(F32, False), (BF16, False), (F16, False), (F32, True)])
def test_adapter_names_give_pefts_result(dtype, autocast, calls):
    plain, batch = peft_model(dtype), example("llama", rows=len(PEFT_NAMES))
    fused = copy.deepcopy(plain)
    fused_lora.fuse(fused)
    exact = output(copy.deepcopy(plain).double(), {**batch, "adapter_names": PEFT_NAMES})
    with torch.autocast("cpu", dtype=BF16, enabled=autocast), torch.no_grad():
        theirs = output(plain, {**batch, "adapter_names": PEFT_NAMES})
        ours = output(fused, {**batch, "adapter_names": PEFT_NAMES})
    assert len(calls) == sum(isinstance(m, FusedPeftLinear) for m in fused.modules())
    assert_no_worse_than_torch(ours, theirs, exact, "output")


def test_gradients_by_adapter_names_are_pefts(calls):
    plain, batch = peft_model(), example("llama", rows=len(PEFT_NAMES))
    fused = copy.deepcopy(plain)
    fused_lora.fuse(fused)
    found = []
    for model in (plain, fused):
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in key)
        output(model, {**batch, "adapter_names": PEFT_NAMES}).square().mean().backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert calls
    assert set(found[0]) == set(found[1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


def test_generation_by_adapter_names_is_pefts():
    plain, batch = peft_model(), example("llama", rows=2)
    fused = copy.deepcopy(plain)
    fused_lora.fuse(fused)
    for beams in (1, 2):
        made = [
            model.generate(
                **batch,
                adapter_names=["german", "__base__"],
                num_beams=beams,
                do_sample=False,
                max_new_tokens=4,
            )
            for model in (plain, fused)
        ]
        assert torch.equal(made[0], made[1])


def test_a_batch_with_an_adapter_that_is_not_covered_is_pefts_own(calls):
    """Where an adapter of a batch does not run fused, the layer is PEFT's, and the other layers are not."""
    plain, batch = peft_model(lora_bias=True), example("llama", rows=len(PEFT_NAMES))
    fused = copy.deepcopy(plain)
    fused_lora.fuse(fused)
    ours, theirs = (output(m, {**batch, "adapter_names": PEFT_NAMES}) for m in (fused, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    layers = {name: m for name, m in fused.named_modules() if isinstance(m, FusedPeftLinear)}
    assert len(calls) == sum(
        "down_proj" in name for name in layers
    )  # Dutch, which has a bias, is in o_proj alone


def test_errors_by_adapter_names_are_pefts():
    model, batch = peft_model(), example("llama", rows=2)
    fused_lora.fuse(model)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(**batch, adapter_names=["french"])
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(**batch, adapter_names=["french", "greek"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(**batch, adapter_names=["french", "german"])
