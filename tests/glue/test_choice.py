"""The choice of `auto`: made once for a class of shapes, kept, and never by timing what cannot be timed."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from tests.emulator import cuda_runtime
from tests.operands import BF16, F32, check_against_torch, forward_and_backward, operands


class Policy:
    """Answers as it is told, and remembers what it was asked."""

    def __init__(self, answer="fused", timing=False):
        self.answer, self.timing, self.questions, self.times = answer, timing, [], []

    def __call__(self, device, shape, presumed_faster, time):
        self.questions.append((device, shape, presumed_faster, time is not None))
        if self.timing:
            self.times.append(time())
        return self.answer

    @property
    def shapes(self):
        return [shape for _, shape, _, _ in self.questions]


@pytest.fixture
def ask(emulated):
    def set_policy(**options):
        policy = Policy(**options)
        emulated.module.set_policy(policy)
        emulated.module.set_path("auto")
        emulated.module.forget_choices()
        return policy

    return set_policy


def kernels(result):
    """What was launched: the fused kernels, or the masks that the composed path draws."""
    return {"masks" if "dropout_mask" in launch.kernel else "fused" for launch in result.launches}


@pytest.mark.parametrize(("answer", "launched"), [("fused", {"fused"}), ("composed", {"masks"})])
def test_the_policy_is_asked_once_and_followed(emulated, ask, answer, launched):
    policy = ask(answer=answer)
    given = operands((6,), dropout_p=0.3)
    for _ in range(2):
        assert kernels(emulated.run(lambda: check_against_torch(given, emulated))) == launched
    assert policy.shapes == [
        "forward rows=8 in=24 out=16 rank=4 dtype=float32 adapters=float32 dropout bias x=rows weight=rows",
        "backward rows=8 in=24 out=16 rank=4 dtype=float32 adapters=float32 dropout dx da db dy=rows x=rows "
        "weight=rows",
    ]


def test_what_makes_another_class(emulated, ask):
    policy = ask()

    def count(given, needs=("x",)):
        before = len(policy.questions)
        forward_and_backward(emulated, given, needs)
        return len(policy.questions) - before

    given = operands((5,), 32)
    assert count(given) == 2
    assert count(operands((8,), 32)) == 0  # as many rows, to a power of two
    assert count(operands((9,), 32)) == 2
    assert count(given, ("x", "lora_a")) == 1  # another backward
    assert count(operands((5,), 32, bias=False)) == 1
    assert count(operands((5,), 32, dtype=BF16)) == 2
    assert count(operands((5,), 32, dtype=BF16, adapter_dtype=F32)) == 2
    given.x = torch.randn(5, 33)[:, 1:]  # no longer in chunks of 16 bytes
    assert count(given) == 1
    given.weight = given.weight.t().contiguous().t()
    assert count(given) == 2
    with torch.autocast("cpu", dtype=BF16):
        assert count(operands((5,), 32)) == 2


def test_what_asks_nobody(emulated, ask):
    policy = ask()
    forward_and_backward(emulated, operands((0,)))
    forward_and_backward(emulated, operands(dtype=torch.float64))
    emulated.module.set_path("composed")
    forward_and_backward(emulated, operands())
    emulated.module.set_path("fused")
    forward_and_backward(emulated, operands())
    assert not policy.questions


def test_deterministic_algorithms_ask_nobody(emulated, ask):
    policy = ask(answer="composed")
    given = operands((5,), 7, 9)  # no tensor core takes rows of 7
    forward_and_backward(emulated, given)
    asked = len(policy.questions)
    torch.use_deterministic_algorithms(True)
    try:
        assert not emulated.run(lambda: forward_and_backward(emulated, given)).launches
        aligned = operands((16,), 64, 64, 16, BF16)
        assert emulated.run(lambda: forward_and_backward(emulated, aligned)).launches
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(policy.questions) == asked


def test_forgotten_choices_are_made_again(emulated, ask):
    policy = ask()
    for _ in range(2):
        emulated(*operands().tensors)
        emulated.module.forget_choices()
    assert policy.shapes[0] == policy.shapes[1]


def test_timing_runs_both_and_changes_no_result(emulated, ask):
    policy = ask(timing=True)
    given = operands((6,), 16, 8, dropout_p=0.3)
    timed = emulated.run(lambda: forward_and_backward(emulated, given))
    assert kernels(timed) == {"fused", "masks"}
    assert all(fused >= 0 and composed >= 0 for fused, composed in policy.times)
    settled = emulated.run(lambda: forward_and_backward(emulated, given))
    assert kernels(settled) == {"fused"}
    torch.testing.assert_close(timed.value, settled.value, rtol=0, atol=0)


def test_nothing_is_timed_while_a_graph_is_captured(emulated, ask):
    policy = ask()
    runtime = cuda_runtime.runtime()
    stream = ctypes.c_void_p()
    assert runtime.cudaStreamCreate(ctypes.byref(stream)) == 0
    emulated.set_stream(stream)
    assert runtime.cudaStreamBeginCapture(stream, 0) == 0
    given = operands()
    launched = emulated.run(lambda: emulated(*given.tensors)).launches
    graph, nodes = ctypes.c_void_p(), ctypes.c_size_t()
    assert runtime.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
    assert runtime.cudaGraphGetNodes(graph, None, ctypes.byref(nodes)) == 0
    assert not launched
    assert 1 <= nodes.value <= 2  # the launches went to the current stream
    assert [timed for *_, timed in policy.questions] == [False]
    emulated.set_stream(None)
    emulated(*given.tensors)
    assert len(policy.questions) == 1  # a choice once made holds


def test_an_error_of_the_policy_is_the_calls(emulated, ask):
    ask()

    def fail(*question):
        raise ValueError("no")

    emulated.module.set_policy(fail)
    with pytest.raises(ValueError, match="no"):
        emulated.module.lora_linear(*operands().tensors, 1.0, 0.0, None, False)
    emulated.module.set_policy(lambda *question: "fused")
    emulated(*operands().tensors)


def test_threads_that_ask_at_once_take_the_same_path(emulated, ask):
    barrier = threading.Barrier(2)
    answers = iter(["fused", "composed"])

    def policy(*question):
        barrier.wait(timeout=10)
        return next(answers)

    ask()
    emulated.module.set_policy(policy)
    given = operands((6,), dropout_p=0.3)
    call = lambda: emulated(*given.tensors, **given.options)  # noqa: E731
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    emulated.module.set_policy(lambda *question: pytest.fail("asked again"))
    assert emulated.run(call).launches


@pytest.fixture
def matmul_precision():
    matmul = torch.backends.cuda.matmul
    yield matmul
    torch.set_float32_matmul_precision("highest")


def test_both_names_of_torchs_switch_for_tf32_count(emulated, matmul_precision):
    figures = (80, 108, 163 << 10)

    def allowed():
        shape = (64, 64, 64, 16, F32, F32, False, False, False, False, False)
        return " tf32" in emulated.module.explain_shape(*shape, figures)["forward"][0]

    assert not allowed()
    matmul_precision.allow_tf32 = True
    assert allowed()
    matmul_precision.allow_tf32 = False
    assert not allowed()
    matmul_precision.fp32_precision = "tf32"
    assert allowed()
    matmul_precision.fp32_precision = "ieee"
    assert not allowed()
    torch.set_float32_matmul_precision("high")
    assert allowed()
