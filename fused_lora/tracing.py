"""What torch.compile need not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant(function: _Function) -> _Function:
    """For a function of plain values that gives the same for the same ones as long as the process runs.

    A trace takes what it gives as a constant, and does not guard, at every call of what was compiled, on each
    name and table that the function looks at. torch.compiler.assume_constant_result, without the import of
    torch._dynamo that it costs.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
