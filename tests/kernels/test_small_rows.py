"""Few rows in one launch: right, clean, W read once, and the low-rank product beside it."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.emulator import Machine
from tests.emulator.mutations import unnoticed_mutants
from tests.kernels.call import Mode, load, run_forward
from tests.operands import BF16, F16, F32, assert_no_worse_than_torch, operands, torch_sequence

AUTOCAST = Mode(round_adapters=True)
# dtype, adapters, mode, ranks that one launch takes
KINDS = {
    "bf16": (BF16, BF16, Mode(), (1, 16, 40, 64)),
    "fp16": (F16, F16, Mode(), (3, 32)),
    "bf16 rounded": (BF16, F32, AUTOCAST, (5, 32)),
    "fp16 rounded": (F16, F32, AUTOCAST, (16,)),
    "bf16 masters": (BF16, F32, Mode(), (8, 17, 32)),
    "fp16 masters": (F16, F32, Mode(), (16, 31)),
}
CASES = [(name, rank) for name, kind in KINDS.items() for rank in kind[3]]
ONE_LAUNCH = "few rows in one launch"


@cache
def kernels():
    return load()


def check(kind, rank, rows, in_features, out_features, *, transposed=False, bias=True, order="forward"):
    dtype, adapters, mode, _ = KINDS[kind]
    given = operands((rows,), in_features, out_features, rank, dtype, adapters, bias=bias)
    if transposed:
        given.weight = given.weight.t().contiguous().t()
    forward = run_forward(kernels(), Machine("a100", order=order, seed=5), given, mode)
    assert forward.run.description.startswith(ONE_LAUNCH), forward.run.description
    forward.run.result.assert_clean()
    assert forward.run.planned_launches == len(forward.run.result.launches) == 1
    assert forward.run.workspace_bytes == 0
    exact = given.double()
    own_adapters = [t.to(dtype) for t in given.tensors[2:4]] if mode.round_adapters else given.tensors[2:4]
    own = torch_sequence(given.x, given.weight, *own_adapters, given.bias, **given.options)
    y = torch_sequence(*exact.tensors, **given.options)
    assert_no_worse_than_torch(forward.y, own, y, "y")
    # h is rounded once, if at all, beside what fp32 sums lose of the sum of the magnitudes.
    used = own_adapters[0].double() * given.options["scaling"]
    h, magnitude = exact.x @ used.t(), exact.x.abs() @ used.abs().t()
    rounding = torch.finfo(forward.h.dtype).eps / 2
    assert ((forward.h.double() - h).abs() <= rounding * h.abs() + 2.0**-20 * magnitude).all()
    return forward


@pytest.mark.parametrize(("kind", "rank"), CASES, ids=[f"{kind} r{rank}" for kind, rank in CASES])
def test_every_dtype_and_rank(kind, rank):
    check(kind, rank, 9, 200, 136, order="reverse")


@pytest.mark.parametrize("transposed", [False, True], ids=["N×K", "K×N"])
@pytest.mark.parametrize("rows", [1, 16, 33, 64])
def test_every_number_of_rows_and_both_storages_of_the_weight(rows, transposed):
    check("bf16", 16, rows, 96, 200, transposed=transposed, order="random")
    check("bf16 masters", 12, rows, 96, 200, transposed=transposed, bias=False)


@pytest.mark.parametrize(("in_features", "out_features"), [(8, 1), (40, 7), (1000, 65)])
def test_ragged_sizes(in_features, out_features):
    check("bf16", 8, 3, in_features, out_features)


def test_the_weight_is_read_once_and_nothing_is_wasted():
    rows, in_features, out_features, rank = 16, 256, 192, 16
    forward = check("bf16", rank, rows, in_features, out_features, bias=False)
    launch = forward.run.result.only
    blocks = out_features // 64
    assert launch.grid == (blocks, 1, 1)
    weight, x, lora_a = (launch.buffers[name] for name in ("weight", "x", "lora_a"))
    assert weight.bytes_read == weight.unique_read == out_features * in_features * 2
    assert x.unique_read == rows * in_features * 2
    assert lora_a.unique_read == rank * in_features * 2
    assert lora_a.bytes_read == blocks * lora_a.unique_read
    assert launch.buffers["y"].bytes_written == rows * out_features * 2
    assert launch.buffers["h"].bytes_written == rows * rank * 2
    for opcode in ("cp.async", "st.global"):
        assert launch.total("sectors", opcode) == launch.total("ideal_sectors", opcode) > 0
    assert launch.total("wavefronts", "ldmatrix") == launch.total("ideal_wavefronts", "ldmatrix") > 0


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("more than 64 rows", {"lead": (65,)}),
        ("dropout", {"dropout_p": 0.1}),
        ("A is large", {"rank": 65}),
        ("masters are large", {"rank": 33, "adapter_dtype": F32}),
        ("fp32", {"dtype": F32}),
    ],
)
def test_other_calls_take_two_launches(reason, changes):
    given = operands(
        **{"lead": (8,), "in_features": 64, "out_features": 64, "rank": 8, "dtype": BF16, **changes}
    )
    forward = run_forward(kernels(), Machine("a100"), given, Mode(allow_tf32=True))
    assert not forward.run.description.startswith(ONE_LAUNCH)
    assert len(forward.run.result.assert_clean().launches) == forward.run.planned_launches == 2


def test_an_adapter_whose_rows_are_no_chunks_takes_two_launches():
    given = operands((8,), 64, 64, 8, BF16)
    given.lora_a = given.lora_a.t().contiguous().t()
    forward = run_forward(kernels(), Machine("a100"), given, Mode())
    assert forward.run.planned_launches == 2
    forward.run.result.assert_clean()


# More tiles of the reduction than stages, and the last one lies where h goes next.
@pytest.mark.parametrize(("kind", "rank", "tiles"), [("bf16", 16, 8), ("bf16 masters", 32, 7)])
def test_every_synchronisation_is_needed(kind, rank, tiles):
    dtype, adapters, mode, _ = KINDS[kind]
    given = operands((5,), tiles * 32, 64, rank, dtype, adapters)

    def launch(machine):
        return run_forward(kernels(), machine, given, mode).run.result

    assert not unnoticed_mutants(launch)


def test_the_same_bits_in_any_order_of_the_blocks():
    given = operands((40,), 128, 200, 16, BF16)
    runs = [
        run_forward(kernels(), Machine("a100", order=order, seed=1), given, Mode())
        for order in ("forward", "reverse", "random")
    ]
    for other in runs[1:]:
        assert torch.equal(runs[0].y, other.y)
        assert torch.equal(runs[0].h, other.h)
