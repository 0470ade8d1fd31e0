"""Transformers' Trainer, begun by `accelerate launch`: several processes train as one does, and go on from a
checkpoint as if nothing had been between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("train.py")
STEPS = 6
# Losses in float32, through AdamW, which divides a gradient by its size: of what reordered sums change there is
# more than in one step's gradients.
BOUND = 1e-4


def launch(directory, processes, *options):
    """The losses, step by step, and what the adapter is at the end (a number)."""
    command = ["--cpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1", "--dynamo_backend", "no"]
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *command, str(SCRIPT), str(directory), *options],
        check=True,
        timeout=240,
        cwd=SCRIPT.parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    return json.loads((directory / "history.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    return directory, launch(directory, 2)


def test_two_processes_train_as_one(uninterrupted, tmp_path):
    _, two = uninterrupted
    one = launch(tmp_path, 1, "--dropout", "0.0", "--batch", "4")
    two = launch(tmp_path / "again", 2, "--dropout", "0.0", "--batch", "2")
    assert two["processes"] == 2
    assert two["fused"] == one["fused"] > 0
    assert len(two["losses"]) == STEPS
    assert two["losses"] == pytest.approx(one["losses"], rel=BOUND)


def test_a_run_that_is_resumed_has_the_losses_of_one_that_was_not(uninterrupted, tmp_path):
    directory, whole = uninterrupted
    resumed = launch(tmp_path, 2, "--resume", str(directory / f"checkpoint-{STEPS // 2}"))
    assert resumed["losses"] == whole["losses"]
    assert resumed["sum"] == whole["sum"]
