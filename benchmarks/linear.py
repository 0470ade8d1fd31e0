"""One layer, forward and backward: LoRALinear and PEFT's layer beside the frozen linear.

The sides run interleaved in one process, in turning order, and each ratio is the median of the ratios of
single rounds, because the speed of a shared machine drifts by more than what is to be seen.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from itertools import product

import peft
import torch
from torch import Tensor, nn

import fused_lora
from fused_lora.binary import BINARY

Step = Callable[[], None]

# Name, in_features, out_features: SmolLM2-135M's projections, and a layer so small that only the call costs.
LAYERS = [("tiny", 64, 64), ("o_proj", 576, 576), ("gate/up", 576, 1536), ("down", 1536, 576)]
SIDES = ("frozen", "peft", "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    print(
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, peft {peft.__version__}, "
        f"fused-lora {fused_lora.__version__} ({BINARY.facts.get('commit', 'not built')})"
    )
    print(f"forward + backward, r={asked.r}, median of paired ratios")
    head = f"{'layer':<9}{'rows':>6} {'dtype':<9}{'dropout':>8}{'frozen µs':>11}"
    print(f"{head}{'peft/ours':>11}{'(min–max)':>14}{'ours/frozen':>13}")
    for dtype, dropout, layer, rows in product(asked.dtype, asked.dropout, LAYERS, asked.rows):
        name, in_features, out_features = layer
        steps = sides(rows, in_features, out_features, asked.r, dropout, getattr(torch, dtype))
        rounds = interleaved(steps, asked.rounds)
        speedup = [times["peft"] / times["ours"] for times in rounds]
        price = statistics.median(times["ours"] / times["frozen"] for times in rounds)
        frozen = statistics.median(times["frozen"] for times in rounds)
        spread = f"({min(speedup):.2f}–{max(speedup):.2f})"
        print(
            f"{name:<9}{rows:>6} {dtype:<9}{dropout:>8}{1e6 * frozen:>11.0f}"
            f"{statistics.median(speedup):>11.2f}{spread:>14}{price:>13.2f}",
            flush=True,
        )


def sides(
    rows: int, in_features: int, out_features: int, r: int, dropout: float, dtype: torch.dtype
) -> dict[str, Step]:
    """A training step of each side, on the same weights and the same input; adapters in the base's dtype."""
    torch.manual_seed(0)
    frozen = nn.Linear(in_features, out_features, bias=False, dtype=dtype).requires_grad_(False)
    ours = fused_lora.LoRALinear.from_linear(frozen)
    settings = fused_lora.LoRASettings(r, alpha=2.0 * r, dropout=dropout)
    ours.add_adapter("default", settings, dtype=dtype)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["0"])
    wrapped = peft.get_peft_model(nn.Sequential(frozen), config, autocast_adapter_dtype=False)
    x = torch.randn(rows, in_features, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, out_features, dtype=dtype)
    modules = {"frozen": frozen, "peft": wrapped.to(dtype).base_model.model[0], "ours": ours}
    return {name: _step(module, x, dy) for name, module in modules.items()}


def _step(module: nn.Module, x: Tensor, dy: Tensor) -> Step:
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]

    def step() -> None:
        torch.autograd.grad(module(x), wanted, dy)

    return step


def interleaved(steps: dict[str, Step], rounds: int) -> list[dict[str, float]]:
    """Seconds a call of each side, for each round. A round's sides make as many calls, about 10 ms' worth."""
    for step in steps.values():
        step()
    began = time.perf_counter()
    steps["peft"]()
    calls = max(1, min(200, int(0.01 / (time.perf_counter() - began))))
    results = []
    for turn in range(rounds):
        order = SIDES[turn % len(SIDES) :] + SIDES[: turn % len(SIDES)]
        times = {}
        for name in order:
            began = time.perf_counter()
            for _ in range(calls):
                steps[name]()
            times[name] = (time.perf_counter() - began) / calls
        results.append(times)
    return results


if __name__ == "__main__":
    main()
