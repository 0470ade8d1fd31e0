"""What counted bytes and flops predict for a device. A prediction: nothing here was measured on a GPU.

A kernel takes the longer of its bytes at 85 % of the data sheet's bandwidth and its flops at 70 % of the
rate that its instructions can reach, and kernels run one after another. Launches, latency, caches, tails of
the grid and the sums of split reductions are not in it: at few rows the launches alone (a few microseconds
each) decide, so those are printed as counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from benchmarks.sequences import (
    ADAPTER,
    COMPOSED,
    FROZEN,
    FUSED,
    PEFT_SEQUENCES,
    Kernel,
    Sequence,
    without_frozen,
)
from benchmarks.shapes import DECODE, TRAINING, Shape
from benchmarks.tables import markdown
from tests.emulator.devices import DEVICES, Device

BANDWIDTH_SHARE = 0.85
TENSOR_SHARE = 0.70

# The part of the data sheet's dense bf16 rate that mma.sync can reach, by major compute capability.
MMA_SYNC_SHARE: Mapping[int, float] = MappingProxyType(
    {
        8: 1.0,  # the only instruction there is
        9: 0.63,  # microbenchmarks: the rest needs wgmma
        # An assumption: that data-centre Blackwell, which doubled the rate for tcgen05.mma, kept Hopper's for
        # mma.sync, 0.63 × 4096 of now 8192 flops for an SM and a clock.
        10: 0.31,
        12: 1.0,  # GeForce Blackwell has no tcgen05
    }
)


def rate(device: Device, engine: str) -> float:
    """FLOP/s that an engine (see sequences.Engine) can reach on a device at best."""
    share = MMA_SYNC_SHARE[device.compute_capability[0]] if engine == "mma.sync" else 1.0
    return device.bf16_tflops * 1e12 * share


def seconds(kernel: Kernel, shape: Shape, device: Device, engine: str | None = None) -> float:
    """The predicted time of one kernel; `engine` in place of its own."""
    moving = kernel.bytes(shape) / (BANDWIDTH_SHARE * device.memory_bandwidth * 1e9)
    computing = kernel.flops(shape) / (TENSOR_SHARE * rate(device, engine or kernel.engine))
    return max(moving, computing)


HEADERS = (
    "rows×in→out",
    "frozen µs",
    "fused µs",
    "fused/frozen",
    "composed/fused",
    *(f"({letter})/fused" for letter in "abcd"),
    "fused/frozen at library rate",
)

OTHERS = (COMPOSED, *PEFT_SEQUENCES)

# Every prediction scales with the rows once they are many: the ends of the range tell it all.
SHOWN_TRAINING = tuple(shape for shape in TRAINING if shape.rows in (2048, 8192))
SHOWN_DECODE = tuple(shape for shape in DECODE if shape.rows in (1, 16, 64))


def time(sequence: Sequence, half: str, shape: Shape, device: Device, engine: str | None = None) -> float:
    """Predicted seconds of a sequence; half is "forward", "backward" or "both"."""
    kernels = {
        "forward": sequence.forward,
        "backward": sequence.backward,
        "both": sequence.forward + sequence.backward,
    }
    return sum(seconds(kernel, shape, device, engine) for kernel in kernels[half])


def rows(shapes: Iterable[Shape], device: Device, half: str) -> list[list[str]]:
    """The last column: had our main loop the library's instructions."""
    table = []
    for shape in shapes:
        frozen, fused = (time(sequence, half, shape, device) for sequence in (FROZEN, FUSED))
        table.append(
            [
                str(shape),
                f"{1e6 * frozen:.1f}",
                f"{1e6 * fused:.1f}",
                f"{fused / frozen:.2f}",
                *(f"{time(sequence, half, shape, device) / fused:.2f}" for sequence in OTHERS),
                f"{time(FUSED, half, shape, device, 'library') / frozen:.2f}",
            ]
        )
    return table


ADAPTER_HEADERS = (
    "rows×in→out",
    "forward µs",
    "backward µs",
    *(f"({letter})'s adapter/fused" for letter in "abcd"),
)


def adapter_rows(shapes: Iterable[Shape], device: Device) -> list[list[str]]:
    """What the adapter costs beside a frozen product that another computes."""
    others = tuple(without_frozen(sequence) for sequence in PEFT_SEQUENCES)
    table = []
    for shape in shapes:
        ours = time(ADAPTER, "both", shape, device)
        table.append(
            [
                str(shape),
                *(f"{1e6 * time(ADAPTER, half, shape, device):.1f}" for half in ("forward", "backward")),
                *(f"{time(sequence, 'both', shape, device) / ours:.2f}" for sequence in others),
            ]
        )
    return table


def report(device_names: Iterable[str] = tuple(DEVICES)) -> str:
    """Predictions for every device: training shapes forward and backward, few rows forward."""
    legend = (f"({letter}) {sequence.name}" for letter, sequence in zip("abcd", PEFT_SEQUENCES, strict=True))
    launches = (
        f"{sequence.name} {len(sequence.forward)}+{len(sequence.backward)}"
        for sequence in (FROZEN, FUSED, *OTHERS)
    )
    lines = [
        "# A prediction, not a measurement",
        (__doc__ or "").partition("\n\n")[2].strip(),
        "\nlaunches, forward + backward: " + "; ".join(launches) + "; fused at few rows 1+1",
        "; ".join(legend) + "; composed is without dropout",
    ]
    for name in device_names:
        device = DEVICES[name]
        share = MMA_SYNC_SHARE[device.compute_capability[0]]
        lines.append(
            f"\n## {device.name}: {device.memory_bandwidth:.0f} GB/s, {device.bf16_tflops:.0f} TFLOP/s dense "
            f"bf16, of which mma.sync is taken to reach {share:.0%}"
        )
        for title, shapes, half in (
            ("forward + backward", SHOWN_TRAINING, "both"),
            ("forward, few rows", SHOWN_DECODE, "forward"),
        ):
            lines.append(f"\nPredicted: {title}, bf16, r={shapes[0].rank}\n")
            lines.append(markdown(HEADERS, rows(shapes, device, half)))
        lines.append("\nPredicted: the adapter alone, on top of a frozen product that another computes\n")
        lines.append(markdown(ADAPTER_HEADERS, adapter_rows(SHOWN_TRAINING, device)))
    return "\n".join(lines)
