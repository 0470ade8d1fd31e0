"""Misused barriers are found, and what can never go on ends with a report of where everybody waits."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from tests.emulator import Machine, Output
from tests.emulator.toolchain import compile_ptx

KERNELS = Path(__file__).parent / "kernels"


def launch(kernel, block, *arguments, grid=1):
    return Machine("a100").load(compile_ptx(KERNELS / "checks.cu")).launch(kernel, grid, block, *arguments)


def launch_sm90(kernel, block, *arguments):
    module = Machine("h100").load(compile_ptx(KERNELS / "checks_sm90.cu", arch="sm_90a"))
    return module.launch(kernel, 1, block, *arguments)


def ints(count):
    return Output(np.zeros(count, np.int32))


def test_lanes_of_a_warp_at_two_barrier_instructions():
    result = launch("divergent_barrier", 32, ints(32))
    assert "barrier" in result.kinds()
    assert not result.only.completed
    messages = [f.message for f in result.findings if f.check == "barrier"]
    assert any("lanes 0000ffff" in m and "lanes ffff0000" in m and "bar.sync" in m for m in messages), (
        messages
    )


def test_warps_that_wait_at_two_barriers():
    result = launch("two_barriers", 64, ints(64))
    assert result.kinds() == {"deadlock"}
    assert not result.only.completed
    message = result.findings[0].message
    assert "warp 0 lanes ffffffff at PTX line" in message
    assert "warp 1 lanes ffffffff at PTX line" in message


def test_a_count_that_is_never_reached():
    result = launch("counted_barrier", 64, ints(64), 96)
    assert {"barrier", "deadlock"} <= result.kinds()
    assert not result.only.completed
    assert any("a count of 96 threads in a block of 64" in f.message for f in result.findings)


@pytest.mark.parametrize("count", [0, 40])
def test_a_count_that_is_no_multiple_of_a_warp(count):
    result = launch("counted_barrier", 64, ints(64), count)
    assert any(
        f"a count of {count} threads: not a positive multiple of 32" in f.message for f in result.findings
    )


def test_a_count_that_is_reached():
    launch("counted_barrier", 64, ints(64), 64).assert_clean()


def test_threads_that_exited_before_a_barrier():
    result = launch("exited_threads", 64, ints(32))
    (finding,) = result.findings
    assert finding.check == "barrier"
    assert "32 of the block's 64 threads have exited" in finding.message


@pytest.mark.parametrize("grid", [1, 3])
def test_spinning_on_a_flag_that_nobody_sets_ends(grid):
    begin = time.monotonic()
    result = launch("spin_forever", 32, np.zeros(1, np.int32), grid=grid)
    assert time.monotonic() - begin < 5
    assert result.kinds() == {"deadlock"}
    assert not result.only.completed
    assert "warp 0 lanes" in result.findings[0].message


def test_a_shuffle_among_the_lanes_of_its_mask():
    launch("shuffle_by", 32, ints(32), np.uint32(0xFFFF), 16).assert_clean()


def test_a_shuffle_whose_mask_omits_lanes_that_run_it():
    result = launch("shuffle_by", 32, ints(32), np.uint32(0xFF), 16)
    assert "convergence" in result.kinds()


def test_a_shuffle_whose_mask_names_lanes_that_never_come():
    result = launch("shuffle_by", 32, ints(32), np.uint32(0xFFFFFFFF), 16)
    assert result.kinds() & {"convergence", "barrier", "deadlock"}


def test_an_mbarrier_orders_those_who_arrive():
    out = np.zeros(64, np.int32)
    launch_sm90("arrivals", 64, Output(out), 64, 0, 1).assert_clean()
    assert (out == np.arange(64) ^ 32).all()


def test_an_mbarrier_that_lacks_arrivals():
    result = launch_sm90("arrivals", 64, ints(64), 65, 0, 1)
    assert "deadlock" in result.kinds()
    assert not result.only.completed


def test_an_mbarrier_with_more_arrivals_than_its_phase_has_room_for():
    (finding,) = launch_sm90("surplus", 1, ints(1)).findings
    assert finding.check == "barrier"
    assert "3 arrivals at an mbarrier whose phase lacks only 2" in finding.message


def test_the_parity_of_the_phase_before_is_complete_at_once():
    assert "race" in launch_sm90("arrivals", 64, ints(64), 64, 1, 1).kinds()


def test_an_mbarrier_that_nobody_initialised():
    result = launch_sm90("arrivals", 64, ints(64), 64, 0, 0)
    assert any("no mbarrier was initialised" in f.message and f.check == "barrier" for f in result.findings)


def bulk_load(bug):
    out = np.zeros(32, np.int32)
    return launch_sm90("bulk_load", 32, np.arange(32, dtype=np.int32), Output(out), bug), out


def test_a_bulk_load_with_all_that_it_needs():
    result, out = bulk_load(0)
    result.assert_clean()
    assert (out == np.arange(32)).all()


def test_a_bulk_load_signals_an_mbarrier_that_the_async_proxy_does_not_know():
    assert "proxy" in bulk_load(1)[0].kinds()


def test_a_bulk_load_of_more_bytes_than_expected_never_completes_the_phase():
    assert not bulk_load(2)[0].only.completed


def test_a_bulk_load_of_fewer_bytes_than_expected_never_completes_the_phase():
    result, _ = bulk_load(3)
    assert "deadlock" in result.kinds()
    assert not result.only.completed


def test_a_bulk_load_that_is_read_in_flight():
    result, _ = bulk_load(4)
    assert "asynchronous" in result.kinds()
    assert any("cp.async.bulk" in f.message for f in result.findings if f.check == "asynchronous")


def test_a_bulk_store_with_all_that_it_needs():
    out = np.zeros(32, np.int32)
    launch_sm90("bulk_store", 32, Output(out), 0).assert_clean()
    assert (out == np.arange(32)).all()


def test_a_bulk_store_of_what_ordinary_stores_wrote_needs_a_proxy_fence():
    assert launch_sm90("bulk_store", 32, ints(32), 1).kinds() == {"proxy"}


def test_a_bulk_store_must_be_waited_for():
    assert launch_sm90("bulk_store", 32, ints(32), 2).kinds() == {"asynchronous"}
