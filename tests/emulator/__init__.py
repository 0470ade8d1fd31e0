"""A functional PTX emulator: the GPU of the tests. See README.md beside this file."""

from tests.emulator.machine import (
    ArgumentError,
    Buffer,
    EmulatorError,
    Finding,
    Launch,
    Machine,
    Module,
    Output,
    ParseError,
    Result,
    Unsupported,
)

__all__ = [
    "ArgumentError",
    "Buffer",
    "EmulatorError",
    "Finding",
    "Launch",
    "Machine",
    "Module",
    "Output",
    "ParseError",
    "Result",
    "Unsupported",
]
