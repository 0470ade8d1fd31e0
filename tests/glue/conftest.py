"""The ops of csrc/torch/cuda on the emulated GPU. What a test runs there must leave the checks silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.emulator import Machine, Result, cuda_runtime
from tests.glue import build


@dataclass(frozen=True)
class Emulated:
    """The build's module and ops. Called as lora_linear is, it is differentiable."""

    module: ModuleType
    machine: Machine
    set_stream: Callable[[int | None], None]

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, build.LIBRARY)

    def __call__(self, *tensors, **options):
        return self.ops.lora_linear(*tensors, **options)

    def run(self, call: Callable[[], Any], **settings: Any) -> Result:
        """Runs `call` on the machine, or one of other settings. The result has its value and its launches,
        which no check may find fault with."""
        machine = Machine("a100", **settings) if settings else self.machine
        return machine.run(call).assert_clean()


@pytest.fixture(scope="session")
def _glue() -> build.Glue:
    return build.load()


@pytest.fixture
def emulated(_glue: build.Glue) -> Iterator[Emulated]:
    """With the fused path asked for."""
    _glue.module.set_path("fused")
    _glue.module.set_policy(lambda *question: "fused")
    _glue.module.forget_choices()
    yield Emulated(_glue.module, Machine("a100"), _glue.set_stream)
    _glue.set_stream(None)
    _glue.module.set_path("auto")
    cuda_runtime.reset()
