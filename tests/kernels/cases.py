"""What the end-to-end tests of the kernels vary, and a small design that covers every pair of values."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora import reference
from tests.kernels.call import Mode
from tests.operands import BF16, F16, F32, Operands, operands, torch_sequence

Results = tuple[Tensor, dict[str, Tensor]]  # y, and the gradients by name


@dataclass(frozen=True)
class Kind:
    """A dtype combination: of x, W, y and dy, of A and B, and how the products may be formed."""

    name: str
    dtype: torch.dtype
    adapters: torch.dtype
    mode: Mode

    @property
    def has_masters(self) -> bool:
        """Whether the low-rank path has more precision than x."""
        return self.adapters != self.dtype and not self.mode.round_adapters


PLAIN, AUTOCAST, TF32 = Mode(), Mode(round_adapters=True), Mode(allow_tf32=True)
KINDS = (
    Kind("bf16", BF16, BF16, PLAIN),
    Kind("fp16", F16, F16, PLAIN),
    Kind("bf16-autocast", BF16, F32, AUTOCAST),
    Kind("fp16-autocast", F16, F32, AUTOCAST),
    Kind("bf16-masters", BF16, F32, PLAIN),
    Kind("fp16-masters", F16, F32, PLAIN),
    Kind("fp32", F32, F32, PLAIN),
    Kind("tf32", F32, F32, TF32),
)
RANKS = (1, 3, 8, 16, 40, 64, 128, 256)
SHAPES = (  # M, K, N
    (1, 64, 64),
    (7, 203, 113),
    (16, 576, 576),
    (64, 576, 1536),
    (256, 1536, 576),
)
# Of x and dy: dense, rows further apart than they are long, rows that begin anywhere, columns contiguous.
LAYOUTS = ("dense", "padded", "unaligned", "transposed")
FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": KINDS,
    "shape": SHAPES,
    "rank": RANKS,
    "layout": LAYOUTS,
    "weight": ("rows", "transposed"),
    "bias": (False, True),
    "dropout_p": (0.0, 0.1),
    "order": ("forward", "reverse", "random"),
}


def covering(
    factors: Mapping[str, Sequence[Any]], cost: Callable[[dict[str, Any]], float], tries: int = 60
) -> list[dict[str, Any]]:
    """Cases in which every pair of values of two factors occurs; cheap ones where there is a choice."""
    generator = random.Random(4)
    open_pairs = {
        ((one, a), (other, b))
        for one, other in itertools.combinations(factors, 2)
        for a in factors[one]
        for b in factors[other]
    }

    def pairs(case: dict[str, Any]) -> set[Any]:
        return set(itertools.combinations(case.items(), 2))

    cases = []
    while open_pairs:
        best: dict[str, Any] = {}
        best_score = -1.0
        seeds = generator.choices(sorted(open_pairs, key=str), k=tries)
        for seed in seeds:
            fixed = dict(seed)
            case = {name: fixed.get(name, generator.choice(values)) for name, values in factors.items()}
            score = len(pairs(case) & open_pairs) / cost(case)
            if score > best_score:
                best, best_score = case, score
        cases.append(best)
        open_pairs -= pairs(best)
    return cases


def cost_of(case: dict[str, Any]) -> float:
    """Seconds of emulating a case, roughly. Without matrix units a multiplication costs ten times as much."""
    m, k, n = case["shape"]
    plain = case["kind"].name == "fp32" or k % 8 or n % 8 or case["layout"] in ("unaligned", "transposed")
    multiplications = -(-m // 16) * 16 * 2 * (k * n + case["rank"] * (k + n))
    return 0.1 + multiplications * (3e-8 if plain else 3e-9)


def case_of(kind: Kind, shape: tuple[int, int, int], rank: int, **options: Any) -> dict[str, Any]:
    """A case of the usual options, but for those that are given."""
    usual = {
        "layout": "dense",
        "weight": "rows",
        "bias": True,
        "dropout_p": 0.1,
        "order": "forward",
    }
    return {"kind": kind, "shape": shape, "rank": rank, **usual, **options}


# Large and odd: K = 1023 admits no tensor-core kernel that reads x or W, and N = 1024 admits those that read
# dy. Too dear for the design above, whose 7×203→113 is odd in every combination.
ODD = (129, 1023, 1024)
CASES = [
    *covering(FACTORS, cost_of),
    case_of(KINDS[0], ODD, 16, order="reverse"),
    case_of(KINDS[4], ODD, 40, weight="transposed", layout="padded", dropout_p=0.0),
    case_of(KINDS[7], ODD, 3, bias=False, order="random"),
]


def name_of(case: dict[str, Any]) -> str:
    m, k, n = case["shape"]
    options = [case["kind"].name, f"{m}x{k}-{n}", f"r{case['rank']}", case["layout"], case["order"]]
    options += [case["weight"]] if case["weight"] != "rows" else []
    options += ["bias"] if case["bias"] else []
    options += ["dropout"] if case["dropout_p"] else []
    return "-".join(options)


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """The same numbers at other strides."""
    rows, columns = matrix.shape
    if layout == "dense":
        return matrix.clone()
    if layout == "transposed":
        return matrix.t().contiguous().t()
    first = 1 if layout == "unaligned" else 0
    wide = torch.full((rows, (columns + 23) // 8 * 8), float("nan"), dtype=matrix.dtype)
    wide[:, first : first + columns] = matrix
    return wide[:, first : first + columns]


def operands_of(case: dict[str, Any]) -> tuple[Operands, Tensor]:
    """The operands and dy, laid out as the case says."""
    m, k, n = case["shape"]
    kind = case["kind"]
    given = operands(
        (m,),
        k,
        n,
        case["rank"],
        kind.dtype,
        kind.adapters,
        bias=case["bias"],
        dropout_p=case["dropout_p"],
        key=m + case["rank"],
    )
    given.x = laid_out(given.x, case["layout"])
    if case["weight"] == "transposed":
        given.weight = given.weight.t().contiguous().t()
    generator = torch.Generator().manual_seed(5)
    dy = torch.randn(m, n, generator=generator).to(BF16).to(kind.dtype)  # exact in every dtype
    return given, laid_out(dy, case["layout"])


def peft_sequence(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None = None,
) -> Tensor:
    """PEFT's forward under autocast, which sees its linears one by one."""
    with torch.autocast("cpu", dtype=x.dtype):
        y = F.linear(x, weight, bias)
        x_hat = x.to(lora_a.dtype)
        if dropout_p:
            assert seed is not None
            mask = reference.dropout_mask(seed, x.shape[0], x.shape[1], dropout_p)
            x_hat = x_hat * mask * reference.dropout_rule(dropout_p)[1]
        return (y + F.linear(F.linear(x_hat, lora_a), lora_b) * scaling).to(y.dtype)


def round_to_tf32(matrix: Tensor) -> Tensor:
    """To 10 bits of mantissa, to nearest, ties away from zero, as the operands of tf32 matrix units are."""
    bits = matrix.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(F32)


def product_in_tf32(left: Tensor, right: Tensor) -> Tensor:
    return round_to_tf32(left) @ round_to_tf32(right)


def tf32_results(given: Operands, dy: Tensor) -> Results:
    """torch's own sequence with its switch for tf32 on: operands are rounded, sums are in fp32."""
    x, weight, lora_a, lora_b, bias = given.tensors
    scaling, p = given.options["scaling"], given.options["dropout_p"]
    scale = torch.ones(x.shape)
    if p:
        mask = reference.dropout_mask(given.options["seed"], x.shape[0], x.shape[1], p)
        scale = mask * reference.dropout_rule(p)[1]
    product = product_in_tf32
    x_hat = x * scale
    h = product(x_hat, lora_a.t())
    y = product(x, weight.t()) + (0 if bias is None else bias) + scaling * product(h, lora_b.t())
    g = product(scaling * dy, lora_b)
    gradients = {
        "x": product(dy, weight) + product(g, lora_a) * scale,
        "lora_a": product(g.t(), x_hat),
        "lora_b": product(scaling * dy.t(), h),
    }
    return y, gradients


def torch_results(kind: Kind, given: Operands, dy: Tensor) -> Results:
    """What torch's own op sequence gives for the kind."""
    if kind.mode.allow_tf32:
        return tf32_results(given, dy)
    sequence = peft_sequence if kind.mode.round_adapters else torch_sequence
    return results_of(sequence, given, dy)


def results_of(sequence: Callable[..., Tensor], given: Operands, dy: Tensor) -> Results:
    names = ("x", "lora_a", "lora_b")
    leaves = {name: getattr(given, name).detach().clone().requires_grad_() for name in names}
    y = sequence(leaves["x"], given.weight, leaves["lora_a"], leaves["lora_b"], given.bias, **given.options)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return y.detach(), dict(zip(names, gradients, strict=True))


def exact_results(given: Operands, dy: Tensor) -> Results:
    return results_of(torch_sequence, given.double(), dy.double())
