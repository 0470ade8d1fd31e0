"""Transformers' Trainer, begun by `accelerate launch`: several processes train as one does, and go on from a
checkpoint as if nothing had been between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.models import OWNERS
from tests.distributed.train import STEPS

DROPPING = [f"{owner}:0.3" for owner in OWNERS]
# Relative, of losses in float32. AdamW divides gradients by their size, so that a small one's reordered sum
# counts for more than in its own step.
BOUND = 1e-4


def launch(directory, processes, batch, runs, *options):
    several = ["--multi_gpu"] if processes > 1 else []  # torchrun, whatever the device
    launched = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                *several,
                "--num_processes",
                str(processes),
            ),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--num_cpu_threads_per_process", "1", "--main_process_port", "0"),
            *("-m", "tests.distributed.train", str(directory), "--batch", str(batch)),
            *(f"--run={run}" for run in runs),
            *options,
        ],
        timeout=480,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    return directory


def history(directory, run):
    return json.loads((directory / run / "history.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two"), 2, 2, ["fuse:0.0", *DROPPING])


def test_two_processes_train_as_one(two, tmp_path):
    one = history(launch(tmp_path, 1, 4, ["fuse:0.0"]), "fuse:0.0")
    both = history(two, "fuse:0.0")
    assert (one["processes"], both["processes"]) == (1, 2)
    assert len(both["losses"]) == STEPS
    assert len(set(both["losses"])) == STEPS
    assert both["losses"] == pytest.approx(one["losses"], rel=BOUND)


def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_ended(two, tmp_path):
    """With dropout: each process draws again what it would have drawn."""
    launch(tmp_path, 2, 2, DROPPING, "--resume", str(two))
    for run in DROPPING:
        assert history(tmp_path, run)["losses"] == history(two, run)["losses"]
        ends = [torch.load(directory / run / "trained.pt") for directory in (tmp_path, two)]
        assert ends[0]
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
