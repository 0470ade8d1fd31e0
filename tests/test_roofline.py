"""Counted kernels and what they predict, against the figures that were worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.roofline import report, seconds, time
from benchmarks.sequences import (
    COMPOSED,
    FROZEN,
    FUSED,
    PEFT,
    PEFT_DROPOUT,
    PEFT_MASTERS,
    PEFT_MASTERS_DROPOUT,
    Kernel,
    coefficients,
)
from benchmarks.shapes import Shape
from tests.emulator.devices import DEVICES

SHAPE = Shape("square", 8192, 4096, 4096)
H100 = DEVICES["h100"]


@pytest.mark.parametrize(
    ("sequence", "kernels", "uvw"),
    [
        (FROZEN, 2, (4, 4, 4)),
        (PEFT, 12, (16, 24, 4)),
        (PEFT_DROPOUT, 14, (26, 24, 4)),
        (PEFT_MASTERS, 20, (40, 24, 4)),
        (PEFT_MASTERS_DROPOUT, 22, (58, 24, 4)),
        (FUSED, 6, (8, 6, 4)),
        (COMPOSED, 8, (12, 12, 4)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_kernels_and_bytes_add_up(sequence, kernels, uvw):
    both = sequence.forward + sequence.backward
    assert len(both) == kernels
    assert coefficients(both) == uvw


@pytest.mark.parametrize(("sequence", "microseconds"), [(PEFT_DROPOUT, 495), (PEFT_MASTERS_DROPOUT, 872)])
def test_what_peft_adds_on_an_h100(sequence, microseconds):
    frozen = time(FROZEN, "both", SHAPE, H100)
    assert frozen == pytest.approx(793e-6, rel=2e-3)
    assert time(sequence, "both", SHAPE, H100) - frozen == pytest.approx(1e-6 * microseconds, rel=1e-2)


def test_what_fusing_would_add_at_the_librarys_rate():
    """71 µs of traffic, and the low-rank products that ride in the frozen main loops."""
    added = time(FUSED, "both", SHAPE, H100, "library") - time(FROZEN, "both", SHAPE, H100)
    assert added == pytest.approx(71e-6 + 793e-6 * 16 / 4096, rel=2e-2)


def test_mma_sync_bounds_the_fused_kernels_where_newer_instructions_exist():
    main_loop = Kernel("gemm", frozen=1, engine="mma.sync")
    assert seconds(main_loop, SHAPE, H100) / seconds(main_loop, SHAPE, H100, "library") == pytest.approx(
        1 / 0.63
    )
    a100 = DEVICES["a100"]
    assert seconds(main_loop, SHAPE, a100) == seconds(main_loop, SHAPE, a100, "library")


def test_the_report_says_that_it_predicts():
    text = report()
    assert text.startswith("# A prediction, not a measurement")
    for device in DEVICES.values():
        assert f"## {device.name}: " in text
    tables = [line for line in text.splitlines() if line.startswith("Predicted: ")]
    assert len(tables) == 3 * len(DEVICES)
    assert "| 8192×4096→4096 |     793.7 |" in text
