"""The machine and the versions that figures belong to."""

from __future__ import annotations

import platform

import peft
import torch
import transformers

import fused_lora
from fused_lora.choices import processor_name


def describe() -> dict[str, str]:
    """What a run ran on, by name."""
    return {
        "processor": f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "fused_lora": fused_lora.__version__,
        "path": fused_lora.explain("cpu").split(":")[0],
    }
