from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import fused_lora
from tests import models

steady = pytest.fixture(models.steady, autouse=True)


@pytest.fixture
def calls(monkeypatch):
    """How often the fused op ran."""
    seen: list[tuple[Any, ...]] = []
    run = fused_lora.lora_linear

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args)
        return run(*args, **kwargs)

    for module in models.CALLERS:
        monkeypatch.setattr(module, "lora_linear", counted)
    return seen
