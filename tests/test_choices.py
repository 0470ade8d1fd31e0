"""How `auto` chooses between two paths: the rules, and what is remembered."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fused_lora import FusedLoRAWarning, choices
from fused_lora.binary import BINARY

SHAPE, OTHER = "forward rows=8", "forward rows=16"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A machine with one GPU and nothing remembered."""
    monkeypatch.setenv(choices.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.delenv(choices.TIMING_VARIABLE, raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(choices, "_device_name", lambda device: "GPU of a test")
    restart(monkeypatch)
    return tmp_path


def restart(monkeypatch):
    """Another process: what is on disk stays."""
    for name in ("_made", "_remembered", "_shared"):
        monkeypatch.setattr(choices, name, {})


def timer(fused, composed):
    calls = []

    def time():
        calls.append(1)
        return fused, composed

    time.calls = calls
    return time


def unexpected():
    pytest.fail("it was timed")


@pytest.mark.parametrize(("times", "path"), [((1.0, 2.0), "fused"), ((2.0, 1.0), "composed")])
@pytest.mark.parametrize("presumed_faster", [False, True])
def test_the_faster_one_is_taken(times, path, presumed_faster):
    assert choices.decide("cuda:0", SHAPE, presumed_faster, timer(*times)) == path
    assert choices.made("cuda:0", SHAPE).path == path
    assert "ms (timed now)" in choices.made("cuda:0", SHAPE).reason
    assert choices.made("cuda:0", OTHER) is None


@pytest.mark.parametrize(("presumed_faster", "path"), [(True, "fused"), (False, "composed")])
def test_the_presumed_one_is_taken_unless_the_other_one_is_clearly_faster(presumed_faster, path):
    other = {"fused": "composed", "composed": "fused"}[path]

    def decided(shape, presumed, rival):
        times = {path: presumed, other: rival}
        return choices.decide("cpu", shape, presumed_faster, timer(times["fused"], times["composed"]))

    assert decided("equal", 1.0, 1.0) == path
    assert decided("close", 1.0, 0.98) == path
    assert decided("clear", 1.0, 0.96) == other
    assert ", not clearly less (timed now)" in choices.made("cpu", "close").reason
    assert "clearly" not in choices.made("cpu", "clear").reason


class Machine:
    """What two paths take on it, in milliseconds, and what someone else on it adds at each turn."""

    def __init__(self, fused, composed, noise=lambda path, turn: 0.0):
        self.takes = {"fused": fused, "composed": composed}
        self.noise = noise
        self.turns = dict.fromkeys(self.takes, 0)
        self.spent = 0.0

    def timed(self):
        return BINARY.module.time_in_turns(lambda: self.run("fused"), lambda: self.run("composed"))

    def run(self, path):
        time = self.takes[path] + self.noise(path, self.turns[path])
        self.turns[path] += 1
        self.spent += time
        return time


def test_a_quiet_machine_is_timed_for_some_milliseconds():
    short, medium, long = Machine(0.01, 0.02), Machine(0.5, 1.0), Machine(300.0, 200.0)
    for machine in (short, medium, long):
        assert machine.timed() == tuple(machine.takes.values())
    assert 5 <= short.spent < 6
    assert medium.turns == {"fused": 5, "composed": 5}
    assert long.turns == {"fused": 3, "composed": 3}  # and no more than that


@pytest.mark.parametrize("seed", range(8))
def test_a_busy_machine_does_not_turn_the_choice(seed):
    """Someone takes the processor at times, for longer than a call takes, and more often from one path."""
    draw = random.Random(seed)

    def noise(path, turn):
        return draw.expovariate(0.5) if draw.random() < {"fused": 0.8, "composed": 0.3}[path] else 0.0

    machine = Machine(0.9, 1.0, noise)
    fused, composed = machine.timed()
    assert fused == pytest.approx(0.9, rel=0.03)
    assert composed == pytest.approx(1.0, rel=0.03)
    assert machine.spent < 75


def test_a_machine_that_is_busy_at_first_is_timed_when_it_is_not():
    machine = Machine(0.5, 0.6, lambda path, turn: 0.1 * ((7 * turn) % 5) + 1.0 if turn < 8 else 0.0)
    assert machine.timed() == (0.5, 0.6)


def test_who_is_never_done_costs_a_bounded_time():
    machine = Machine(0.0, 0.0)
    assert machine.timed() == (0.0, 0.0)
    assert machine.turns["fused"] <= 1000
    machine = Machine(1.0, 1.0, lambda path, turn: 1000.0 / (turn + 1))  # faster at every turn
    machine.timed()
    assert machine.turns == {"fused": 3, "composed": 3}


def test_what_was_timed_is_remembered_for_other_processes(monkeypatch, cache):
    choices.decide("cuda:0", SHAPE, True, timer(2.0, 1.0))
    choices.decide("cuda:0", OTHER, True, timer(1.0, 2.0))
    restart(monkeypatch)
    assert choices.decide("cuda:0", SHAPE, True, unexpected) == "composed"
    assert choices.decide("cuda:0", OTHER, True, None) == "fused"  # also where nothing can be timed
    assert choices.made("cuda:0", SHAPE).reason == "fused took 2 ms, composed 1 ms (remembered)"
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())[SHAPE] == {"path": "composed", "fused_ms": 2.0, "composed_ms": 1.0}


def test_two_processes_add_to_one_file(monkeypatch, cache):
    choices.decide("cuda:0", SHAPE, True, timer(1.0, 2.0))
    ours = choices._remembered
    restart(monkeypatch)
    (file,) = cache.iterdir()
    file.rename(cache / "elsewhere")
    choices.decide("cuda:0", OTHER, True, timer(1.0, 2.0))  # a process that began before the file was there
    monkeypatch.setattr(choices, "_remembered", ours)
    choices.decide("cuda:0", "forward rows=32", True, timer(1.0, 2.0))
    assert set(json.loads(file.read_text())) == {SHAPE, OTHER, "forward rows=32"}


def test_each_kind_of_device_and_version_has_its_own_file(monkeypatch):
    names = {choices.file_of("NVIDIA A100"), choices.file_of("NVIDIA H100")}
    monkeypatch.setattr(torch, "__version__", "9.9")
    names.add(choices.file_of("NVIDIA A100"))
    monkeypatch.setattr(choices, "__version__", "9.9")
    names.add(choices.file_of("NVIDIA A100"))
    assert len(names) == 4
    assert all("/" not in path.name and " " not in path.name for path in names)


def test_where_the_files_are(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert choices.directory() != Path("/xdg/fused-lora")  # the variable of our own comes first
    monkeypatch.delenv(choices.DIRECTORY_VARIABLE)
    assert choices.directory() == Path("/xdg/fused-lora")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert choices.directory() == Path.home() / ".cache" / "fused-lora"


DAMAGED = [
    "",
    "{",
    "[]",
    "1",
    '{"a": 1}',
    '{"a": {}}',
    '{"a": {"path": "fast", "fused_ms": 1, "composed_ms": 2}}',
    '{"a": {"path": "fused", "fused_ms": "x", "composed_ms": 2}}',
    "\xff",
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_ignored_with_one_warning_and_replaced(monkeypatch, text):
    path = choices.file_of("GPU of a test")
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(FusedLoRAWarning, match="cannot read"):
        assert choices.decide("cuda:0", SHAPE, True, timer(2.0, 1.0)) == "composed"
    assert (
        choices.decide("cuda:0", OTHER, True, timer(1.0, 2.0)) == "fused"
    )  # warnings are errors in these tests
    restart(monkeypatch)
    assert choices.decide("cuda:0", SHAPE, True, unexpected) == "composed"


def test_a_directory_that_cannot_be_written_to_is_no_matter(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(choices.DIRECTORY_VARIABLE, str(tmp_path / "file" / "below"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choices.decide("cuda:0", SHAPE, True, timer(2.0, 1.0)) == "composed"
        assert choices.decide("cuda:0", SHAPE, True, unexpected) == "composed"  # this process knows


@pytest.mark.parametrize("presumed_faster", [False, True])
def test_where_nothing_can_be_timed_the_rule_decides(monkeypatch, cache, presumed_faster):
    path = "fused" if presumed_faster else "composed"
    assert choices.decide("cuda:0", SHAPE, presumed_faster, None) == path
    assert "a CUDA graph is captured" in choices.made("cuda:0", SHAPE).reason
    assert choices.decide("cuda:0", OTHER, presumed_faster, lambda: None) == path
    assert "too little memory" in choices.made("cuda:0", OTHER).reason
    monkeypatch.setenv(choices.TIMING_VARIABLE, "0")
    assert choices.decide("cuda:1", SHAPE, presumed_faster, unexpected) == path
    assert "FUSED_LORA_TIMING=0" in choices.made("cuda:1", SHAPE).reason
    assert not list(cache.iterdir())  # only what was timed is remembered


@pytest.mark.parametrize("world", ["2", "launched without torch.distributed"])
def test_several_ranks_do_not_time_and_look_at_no_file(monkeypatch, world):
    choices.decide("cuda:0", SHAPE, True, timer(2.0, 1.0))
    restart(monkeypatch)
    if world == "2":
        monkeypatch.setenv("WORLD_SIZE", "2")
    else:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert choices.decide("cuda:0", SHAPE, True, unexpected) == "fused"
    assert choices.decide("cuda:0", OTHER, False, unexpected) == "composed"
    assert "several ranks" in choices.made("cuda:0", SHAPE).reason


@pytest.mark.parametrize("world", ["1", "", "many"])
def test_one_rank_is_no_job_of_several(monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    assert not choices.several_ranks()


RANK = """
import sys, torch
from fused_lora import choices, share_choices
rank = int(sys.argv[1])
choices._device_name = lambda device: f"machine {rank}"
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
assert choices.decide("cpu", "a", True, None) == "fused"
assert share_choices() == 1
assert choices.made("cpu", "a") is None
print(choices.decide("cpu", "a", True, None), choices.decide("cpu", "b", True, None))
torch.distributed.destroy_process_group()
"""


def test_all_ranks_take_what_rank_0_remembers(monkeypatch, tmp_path):
    monkeypatch.setattr(choices, "_device_name", lambda device: "machine 0")
    choices.decide("cpu", "a", True, timer(2.0, 1.0))
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["composed fused\n"] * 2


TIMED = """
import torch, fused_lora
from fused_lora import choices
torch.set_num_threads(2)
x, w, a, b = torch.randn(40, 64), torch.randn(64, 64), torch.randn(4, 64), torch.randn(64, 4)
explain = lambda: fused_lora.explain(rows=33, in_features=64, out_features=64, rank=4, dtype=torch.float32)
assert "forward: made at the first call, by timing both" in explain()
fused_lora.lora_linear(x, w, a, b)
print(explain())
torch.set_num_threads(1)
print(explain())
"""


def test_on_the_cpu_the_op_itself_is_timed_once_for_a_number_of_threads(cache):
    done = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=True)
    lines = [line.strip() for line in done.stdout.splitlines()]
    forward = [line for line in lines if line.startswith("forward:")]
    assert "took" in forward[0]
    assert "timed now" in forward[0]
    assert "made at the first call" in forward[1]  # with another number of threads
    (file,) = cache.iterdir()
    (shape,) = json.loads(file.read_text())
    assert shape.startswith("forward rows=64 in=64 out=64 rank=4 dtype=float32 adapters=float32 x=rows")
    assert " threads=2 " in shape
