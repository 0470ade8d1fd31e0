"""Bad arguments: every error names the argument, what was expected and what was given; and the compiled
path and the plain-torch path say it in the same words."""

from __future__ import annotations

import pytest
import torch

import fused_lora
from fused_lora import dropout_mask, lora_linear
from tests.operands import BF16, F16, F32, F64, operands

pytestmark = pytest.mark.usefixtures("either_path")


def changed(**changes):
    def make():
        given = operands()
        for name, change in changes.items():
            if name in ("dropout_p", "seed", "column_offset"):
                given.options[name] = change
            else:
                setattr(given, name, change(getattr(given, name)))
        return given

    return make


# in 24, out 16, rank 4, x 5×24
CASES = [
    (changed(x=lambda x: x[0, 0]), ValueError, "x must have at least 1 dimension, got shape []"),
    (
        changed(x=lambda x: x[:, :23]),
        ValueError,
        "x must have in_features = 24 (as weight) in dimension -1, got shape [5, 23]",
    ),
    (
        changed(weight=lambda w: w[0]),
        ValueError,
        "weight must be 2-D (out_features×in_features), got shape [24]",
    ),
    (
        changed(lora_a=lambda a: a[None]),
        ValueError,
        "lora_a must be 2-D (rank×in_features), got shape [1, 4, 24]",
    ),
    (
        changed(lora_a=lambda a: a.t()),
        ValueError,
        "lora_a must have in_features = 24 (as weight) in dimension 1, got shape [24, 4]",
    ),
    (changed(lora_b=lambda b: b[0]), ValueError, "lora_b must be 2-D (out_features×rank), got shape [4]"),
    (
        changed(lora_b=lambda b: b[:15]),
        ValueError,
        "lora_b must have out_features = 16 (as weight) in dimension 0, got shape [15, 4]",
    ),
    (
        changed(lora_b=lambda b: b[:, :3]),
        ValueError,
        "lora_b must have rank = 4 (as lora_a) in dimension 1, got shape [16, 3]",
    ),
    (
        changed(lora_a=lambda a: a[:0], lora_b=lambda b: b[:, :0]),
        ValueError,
        "lora_a must have rank ≥ 1, got shape [0, 24]",
    ),
    (changed(bias=lambda b: b[None]), ValueError, "bias must be 1-D (out_features), got shape [1, 16]"),
    (
        changed(bias=lambda b: b[:1]),
        ValueError,
        "bias must have out_features = 16 (as weight) in dimension 0, got shape [1]",
    ),
    (
        changed(x=lambda x: x.long()),
        TypeError,
        "x must be torch.float32, torch.float64, torch.bfloat16 or torch.float16, got torch.int64",
    ),
    (changed(x=lambda x: x.to(BF16)), TypeError, "weight must be torch.bfloat16 (as x), got torch.float32"),
    (
        changed(lora_a=lambda a: a.to(BF16)),
        TypeError,
        "lora_a must be torch.float32 (as x), got torch.bfloat16",
    ),
    (
        changed(x=lambda x: x.to(BF16), weight=lambda w: w.to(BF16), lora_a=lambda a: a.to(F16)),
        TypeError,
        "lora_a must be torch.bfloat16 (as x) or torch.float32 (masters), got torch.float16",
    ),
    (
        changed(lora_b=lambda b: b.to(F64)),
        TypeError,
        "lora_b must be torch.float32 (as lora_a), got torch.float64",
    ),
    (
        changed(bias=lambda b: b.to(F64)),
        TypeError,
        "bias must be torch.float32 (as x), got torch.float64",
    ),
    (changed(weight=lambda w: w.to("meta")), ValueError, "weight must be on cpu (as x), got meta"),
    (changed(bias=lambda b: b.to("meta")), ValueError, "bias must be on cpu (as x), got meta"),
    (changed(dropout_p=-0.5), ValueError, "dropout_p must be in [0, 1], got -0.5"),
    (changed(dropout_p=1.5), ValueError, "dropout_p must be in [0, 1], got 1.5"),
    (changed(dropout_p=float("nan")), ValueError, "dropout_p must be in [0, 1], got nan"),
    (
        changed(dropout_p=0.5, seed=torch.tensor([1.0])),
        TypeError,
        "seed must be torch.int64, got torch.float32",
    ),
    (
        changed(dropout_p=0.5, seed=torch.tensor([1, 2])),
        ValueError,
        "seed must hold one number, got shape [2]",
    ),
    (
        changed(dropout_p=0.5, seed=torch.empty(1, dtype=torch.int64, device="meta")),
        ValueError,
        "seed must be on cpu (as x), got meta",
    ),
    (changed(column_offset=-8), ValueError, "column_offset must be a multiple of 8 and ≥ 0, got -8"),
    (changed(column_offset=12), ValueError, "column_offset must be a multiple of 8 and ≥ 0, got 12"),
]


@pytest.mark.parametrize("path", ["composed", "reference"])
@pytest.mark.parametrize(("make", "kind", "message"), CASES, ids=[case[2][:50] for case in CASES])
def test_the_error_names_the_argument(path, make, kind, message):
    given = make()
    with fused_lora.use_path(path), pytest.raises(kind) as raised:
        lora_linear(*given.tensors, **given.options)
    assert str(raised.value).splitlines()[0] == f"lora_linear: {message}"


@pytest.mark.parametrize(("make", "kind", "message"), CASES[:5])
def test_fakes_raise_the_same(make, kind, message):
    given = make()
    tensors = [t if t is None else t.to("meta") for t in given.tensors]
    with pytest.raises(kind) as raised:
        lora_linear(*tensors, **given.options)
    assert str(raised.value).splitlines()[0] == f"lora_linear: {message}"


def backward_arguments():
    x, weight, lora_a, lora_b, _ = operands().tensors
    named = {"dy": torch.randn(5, 16), "x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    named |= {"h": torch.randn(5, 4), "scaling": 1.0, "dropout_p": 0.0, "seed": None}
    return named | {"round_adapters": False, "needed": [True] * 5}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"dy": torch.randn(5, 15)}, ValueError, "dy must have out_features = 16"),
        ({"dy": torch.randn(4, 16)}, ValueError, "x must have rows = 4"),
        ({"dy": torch.randn(5, 16, dtype=F64)}, TypeError, "weight must be torch.float64"),
        ({"x": None}, ValueError, "x must be given"),
        ({"x": torch.randn(2, 5, 24)}, ValueError, "x must have as many dimensions as dy"),
        ({"x": torch.randn(5, 24, dtype=F64)}, TypeError, "x must be torch.float32"),
        ({"h": None}, ValueError, "h must be given"),
        ({"h": torch.randn(5, 3)}, ValueError, "h must have rank = 4"),
        ({"h": torch.randn(6, 4)}, ValueError, "h must have rows = 5"),
        ({"h": torch.randn(5, 4, dtype=F64)}, TypeError, "h must be torch.float32"),
        ({"dropout_p": 0.5}, ValueError, "seed must be given"),
        ({"round_adapters": True, "lora_a": torch.randn(4, 24)}, None, ""),
    ],
)
def test_backward_checks_what_it_is_handed(changes, kind, message):
    call = lambda: torch.ops.fused_lora.lora_linear_backward(**{**backward_arguments(), **changes})  # noqa: E731
    if kind is None:
        call()
        return
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("path", ["composed", "reference"])
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, -2, 3, 0.5), {}, "rows must be ≥ 0, got -2"),
        ((1, 2, -3, 0.5), {}, "columns must be ≥ 0, got -3"),
        ((1, 2, 3, 1.5), {}, "p must be in \\[0, 1\\], got 1.5"),
        ((1, 2, 3, 0.5), {"row_offset": -1}, "row_offset must be ≥ 0, got -1"),
        ((1, 2, 3, 0.5), {"column_offset": -1}, "column_offset must be ≥ 0, got -1"),
        ((torch.tensor([1, 2]), 2, 3, 0.5), {}, "seed must hold one number, got shape \\[2\\]"),
    ],
)
def test_mask_errors(path, arguments, options, message):
    with fused_lora.use_path(path), pytest.raises(ValueError, match=message):
        dropout_mask(*arguments, **options)


def test_a_mask_of_integers_is_refused():
    with pytest.raises((RuntimeError, NotImplementedError), match="dropout_mask"):
        dropout_mask(1, 2, 3, 0.5, dtype=torch.int32)


def test_what_is_not_a_tensor_is_a_type_error():
    given = operands()
    with pytest.raises((TypeError, AttributeError)):
        lora_linear([1.0], *given.tensors[1:])
    with pytest.raises(TypeError):
        lora_linear(given.x, "weight", *given.tensors[2:])


def test_a_failed_call_changes_nothing():
    given = operands()
    before = [t.clone() for t in given.tensors]
    with pytest.raises(TypeError):
        lora_linear(given.x, given.weight, given.lora_a, given.lora_b.to(F32).double(), given.bias)
    assert all(torch.equal(t, b) for t, b in zip(given.tensors, before, strict=True))
