"""The machine and the versions that figures belong to."""

from __future__ import annotations

import platform
from pathlib import Path

import peft
import torch
import transformers

import fused_lora


def describe() -> dict[str, str]:
    """What a run ran on, by name."""
    return {
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "fused_lora": fused_lora.__version__,
        "path": fused_lora.explain("cpu").split(":")[0],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
