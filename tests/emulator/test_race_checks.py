"""Accesses that nothing orders are found, whatever the schedule; those that are ordered raise no alarm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.emulator import Machine, Output
from tests.emulator.toolchain import compile_ptx

SOURCE = Path(__file__).parent / "kernels" / "checks.cu"
ORDERS = pytest.mark.parametrize("order", ["forward", "reverse", "random"])


def load(order="forward"):
    return Machine("a100", order=order, seed=5).load(compile_ptx(SOURCE))


def ints(count):
    return np.zeros(count, np.int32)


# kernel, threads, what the second access does
SHARED = [
    ("exchange_halves", 64, "reads"),
    ("exchange_lanes", 32, "reads"),
    ("write_after_read", 64, "writes"),
    ("write_after_write", 64, "writes"),
]


@ORDERS
@pytest.mark.parametrize(("kernel", "threads", "verb"), SHARED)
def test_shared_memory_needs_a_barrier(kernel, threads, verb, order):
    out = ints(threads)
    result = load(order).launch(kernel, 1, threads, Output(out), 0)
    assert "race" in result.kinds()
    assert result.only.completed
    races = [f for f in result.findings if f.check == "race"]
    assert any(f" {verb} shared memory `" in f" {f.message}" for f in races), races
    assert all("nothing orders them" in f.message and "at PTX line" in f.message for f in races)
    lines = SOURCE.read_text().splitlines()
    assert all("tile[" in lines[f.cuda_line - 1] for f in races)


@ORDERS
@pytest.mark.parametrize(("kernel", "threads", "verb"), SHARED)
def test_a_barrier_orders_shared_memory(kernel, threads, verb, order):
    load(order).launch(kernel, 1, threads, Output(ints(threads)), 1).assert_clean()


def test_a_named_barrier_orders_those_who_meet_there():
    out = ints(128)
    load().launch("named_barriers", 1, 128, Output(out), 32).assert_clean()
    assert (out == np.arange(128) ^ 32).all()


def test_a_named_barrier_orders_nobody_else():
    assert "race" in load().launch("named_barriers", 1, 128, Output(ints(128)), 64).kinds()


@ORDERS
def test_arriving_without_waiting_releases(order):
    out = ints(32)
    load(order).launch("arrive_and_wait", 1, 64, Output(out)).assert_clean()
    assert (out == np.arange(32)).all()


def test_atomics_do_not_race():
    out = ints(1)
    load().launch("shared_atomics", 1, 128, Output(out)).assert_clean()
    assert out[0] == 128


def test_lanes_of_one_instruction_may_store_the_same_value():
    out = ints(32)
    load().launch("same_place", 1, 32, Output(out), 9, 0).assert_clean()
    assert (out == 9).all()


def test_lanes_of_one_instruction_may_not_store_different_values():
    assert load().launch("same_place", 1, 32, Output(ints(32)), 9, 1).kinds() == {"race"}


@pytest.mark.parametrize("bug", [1, 2])
def test_reading_what_cp_async_still_writes(bug):
    result = load().launch("copy_and_read", 1, 64, np.arange(64, dtype=np.int32), Output(ints(64)), bug)
    assert "asynchronous" in result.kinds()
    finding = next(f for f in result.findings if f.check == "asynchronous")
    assert "is still writing asynchronously" in finding.message
    assert "cp.async" in finding.message


def test_waiting_for_ones_own_copies_is_not_waiting_for_those_of_others():
    result = load().launch("copy_and_read", 1, 64, np.arange(64, dtype=np.int32), Output(ints(64)), 3)
    assert result.kinds() & {"race", "asynchronous"}


def test_cp_async_with_its_waits_is_clean():
    out = ints(64)
    load().launch("copy_and_read", 1, 64, np.arange(64, dtype=np.int32), Output(out), 0).assert_clean()
    assert (out == np.arange(64) ^ 32).all()


@ORDERS
def test_refilling_a_stage_that_is_still_read(order):
    data = np.arange(192, dtype=np.int32)
    out = ints(64)
    assert "race" in load(order).launch("refill_stage", 1, 64, data, Output(out), 0).kinds()
    load(order).launch("refill_stage", 1, 64, data, Output(out), 1).assert_clean()
    assert (out == data.reshape(3, 64).sum(0)[np.arange(64) ^ 32]).all()


@ORDERS
def test_blocks_that_write_one_place(order):
    result = load(order).launch("write_one_place", 2, 32, Output(ints(1)), names=["out"])
    (finding,) = result.findings
    assert (finding.check, finding.buffer, finding.offset) == ("race", "out", 0)
    first = 1 if finding.block[0] == 0 else 0
    assert f"block {first} thread 0 wrote" in finding.message


@ORDERS
def test_a_block_that_reads_its_neighbours_data(order):
    assert "race" in load(order).launch("read_neighbour", 2, 1, ints(2), ints(2)).kinds()


def sum_by_last_block(order, kernel, mode):
    out = ints(1)
    result = load(order).launch(kernel, 5, 32, Output(ints(5)), np.zeros(1, np.uint32), Output(out), mode)
    return result, out[0]


@ORDERS
def test_the_last_block_sees_what_device_fences_order(order):
    result, total = sum_by_last_block(order, "last_block_sum", 2)
    result.assert_clean()
    assert total == 15


@ORDERS
@pytest.mark.parametrize("fence", [0, 1], ids=["none", "of_the_block"])
def test_the_last_block_needs_device_fences(order, fence):
    result, _ = sum_by_last_block(order, "last_block_sum", fence)
    assert result.kinds() == {"race"}
    assert {f.buffer for f in result.findings} == {"argument 0"}


@ORDERS
def test_acquire_and_release_order_blocks(order):
    result, total = sum_by_last_block(order, "last_block_sum_by_atomic_ref", 1)
    result.assert_clean()
    assert total == 15


@ORDERS
def test_relaxed_atomics_order_nothing(order):
    assert sum_by_last_block(order, "last_block_sum_by_atomic_ref", 0)[0].kinds() == {"race"}


@ORDERS
def test_a_spin_lock_between_blocks(order):
    total = ints(1)
    load(order).launch("spin_lock", 6, 32, ints(1), total).assert_clean()
    assert total[0] == 6


@ORDERS
@pytest.mark.parametrize("first", [0, 1])
def test_a_flag_hands_data_from_block_to_block(order, first):
    out = ints(1)
    load(order).launch("hand_over", 2, 1, ints(1), Output(ints(1)), Output(out), first).assert_clean()
    assert out[0] == 42


@pytest.mark.parametrize(("value", "racy"), [("0", False), ("threadIdx.x", True)])
def test_lanes_of_one_instruction_may_store_one_value_to_global_memory(value, racy, tmp_path):
    source = tmp_path / "flag.cu"
    source.write_text(f'extern "C" __global__ void set(int* x) {{ *x = 7 + {value}; }}\n')
    module = Machine("a100").load(compile_ptx(source, arch="sm_80"))
    result = module.launch("set", 1, 32, Output(np.zeros(1, np.int32)))
    assert result.kinds() == ({"race"} if racy else set())
