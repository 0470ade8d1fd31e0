"""Which path serves, when it is asked for, and what happens where there is no binary."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

import fused_lora
from fused_lora import binary, lora_linear, paths
from fused_lora.binary import BINARY
from tests.operands import operands


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def calls_of_the_op(call) -> int:
    with torch.profiler.profile() as profile:
        call()
    return sum(event.name == "fused_lora::lora_linear_forward" for event in profile.events())


@pytest.mark.parametrize(("path", "count"), [("composed", 1), ("fused", 1), ("auto", 1), ("reference", 0)])
def test_a_path_asked_for_by_name_is_taken(path, count):
    given = operands()
    with fused_lora.use_path(path):
        assert calls_of_the_op(lambda: lora_linear(*given.tensors)) == count
        assert fused_lora.explain().split(":")[0] == ("fused or composed" if path == "auto" else path)


def test_use_path_ends_with_its_context_and_reaches_other_threads():
    seen = []
    with fused_lora.use_path("reference"):
        thread = threading.Thread(target=lambda: seen.append(paths.choose("cpu")))
        thread.start()
        thread.join()
    assert seen == ["reference"]
    assert paths.choose("cpu") == "auto"


def test_a_device_that_was_served_before_follows_another_path():
    def calls() -> int:
        return calls_of_the_op(lambda: lora_linear(*operands().tensors))

    assert calls() == 1
    with fused_lora.use_path("reference"):
        assert calls() == 0
    assert calls() == 1


def test_an_unknown_path_is_an_error():
    message = "path must be one of auto, fused, composed, reference, got 'fast'"
    with pytest.raises(ValueError, match=message), fused_lora.use_path("fast"):
        pass
    done = run("import fused_lora", FUSED_LORA_PATH="fast")
    assert "FUSED_LORA_PATH must be one of auto, fused, composed, reference, got 'fast'" in done.stderr


def test_the_environment_variable_chooses():
    done = run("import fused_lora; print(fused_lora.explain())", FUSED_LORA_PATH="reference")
    assert done.stdout == "reference: asked for\n"


def test_auto_warns_once_a_device_and_serves_where_no_kernel_does(monkeypatch):
    monkeypatch.setattr(paths, "_warned", set())
    with pytest.warns(fused_lora.FusedLoRAWarning, match="no kernels for 'xpu' tensors") as warned:
        assert [paths.choose("xpu") for _ in range(3)] == ["reference"] * 3
    assert len(warned) == 1
    assert fused_lora.explain("xpu").startswith("reference: ")


def test_a_path_that_cannot_serve_is_an_error_where_it_is_asked_for_by_name():
    with fused_lora.use_path("composed"), pytest.raises(RuntimeError, match="'composed' was asked for, but"):
        paths.choose("xpu")


@pytest.mark.parametrize("op", [lora_linear, torch.ops.fused_lora.lora_linear])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_fused_never_falls_through_to_another_path(op, dtype):
    given = operands(dtype=dtype)
    leaves = [t.requires_grad_() for t in given.tensors]
    y = op(*leaves)
    message = f"path 'fused' was asked for, but there are no fused kernels for {dtype} on the CPU"
    with fused_lora.use_path("fused"):
        with pytest.raises(RuntimeError, match=message):
            op(*leaves)
        with pytest.raises(RuntimeError, match=message):
            y.sum().backward()
        assert fused_lora.dropout_mask(1, 2, 3, 0.5).shape == (2, 3)  # no path has another mask
    op(*leaves).sum().backward()


def bits_of(given):
    leaves = [t.requires_grad_() for t in given.tensors]
    y = lora_linear(*leaves, **given.options)
    return [y, *torch.autograd.grad(y.sum(), leaves)]


def test_every_level_of_instructions_can_be_asked_for_and_they_agree():
    given = operands((33,), 70, 50, 5, dropout_p=0.2)
    results = {}
    with fused_lora.use_path("fused"):
        for level in paths.CPU_LEVELS:
            try:
                with fused_lora.use_cpu_level(level):
                    assert level in ("best", BINARY.module.cpu_level())
                    results[level] = bits_of(given)
            except ValueError as error:
                assert f"this processor, or this build, has no {level}" in str(error)  # noqa: PT017
    assert len(results) >= 2
    for result in results.values():
        torch.testing.assert_close(result, results["plain"])
    with pytest.raises(ValueError, match=r"level must be one of best, plain, .*, got 'sse9'"):
        fused_lora.use_cpu_level("sse9").__enter__()
    done = run("import fused_lora", FUSED_LORA_CPU_LEVEL="sse9")
    assert "FUSED_LORA_CPU_LEVEL: level must be one of best, plain, " in done.stderr
    code = "from fused_lora.binary import BINARY; print(BINARY.module.cpu_level())"
    done = run(code, FUSED_LORA_CPU_LEVEL="plain")
    assert done.stdout == "plain\n", done.stderr


def test_explain_tells_of_mixed_batches_and_their_own_choices():
    shape = {"rows": 6, "in_features": 20, "out_features": 24, "rank": 3, "dtype": torch.float32}
    one, mixed = (fused_lora.explain(**shape, adapters=adapters) for adapters in (1, 3))
    assert "mixed" not in one
    assert "a mixed batch of 3 adapters: one call for all rows (lora_linear_mixed)" in mixed
    with fused_lora.use_path("reference"):
        assert "adapters one after another" in fused_lora.explain(adapters=3)


def test_explain_names_the_choice_that_a_mixed_batch_took():
    shape = {"in_features": 20, "out_features": 24, "dtype": torch.float32}
    said = functools.partial(fused_lora.explain, rows=6, rank=3, **shape)
    assert "forward: made at the first call" in said(adapters=3)
    x, weight = torch.randn(6, 20), torch.randn(24, 20)
    a, b = [torch.randn(3, 20) for _ in range(3)], [torch.randn(24, 3) for _ in range(3)]
    fused_lora.lora_linear_mixed(x, weight, a, b, torch.arange(6) % 3, scaling=[1.0] * 3)
    assert "forward: made at the first call" not in said(adapters=3)
    assert "forward: made at the first call" in said(adapters=2)


def test_explain_tells_whether_layers_of_one_x_are_computed_together():
    said = functools.partial(fused_lora.explain, layers=3)
    for arguments, words in (
        ({}, "3 layers of one x: in training by one call (lora_linear_grouped), from 512 rows on"),
        ({"dropout": True}, "each by a call of its own: it draws its mask"),
        ({"layers": 2}, "each by a call of its own: two of them spare one sum"),
        ({"layers": 2, "autocast": True}, "2 layers of one x: in training by one call"),
        ({"rows": 511, "in_features": 20, "out_features": 24}, "511 rows are fewer than 512"),
    ):
        assert words in said(**arguments)
    for mode, words in (("always", "by one call (lora_linear_grouped): use"), ("never", "each by a call")):
        with fused_lora.use_groups(mode):
            assert words in said()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": 0}, "adapters must be a number ≥ 1, got 0"),
        ({"layers": 1.5}, "layers must be a number ≥ 1, got 1.5"),
        ({"adapters": 2, "layers": 3}, r"layers: a mixed batch \(2 adapters\) computes each by itself"),
    ],
)
def test_explain_refuses_counts_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        fused_lora.explain(**arguments)


def test_explain_tells_of_the_cpus_kernels():
    shape = {"rows": 128, "in_features": 576, "out_features": 1536}
    text = fused_lora.explain("cpu", **shape)
    assert f"kernels: {BINARY.module.cpu_level()}, {torch.get_num_threads()} threads" in text
    with fused_lora.use_path("fused"):
        assert "choices" not in fused_lora.explain("cpu", **shape)
    for dtype in (torch.float16, torch.float64):
        told = fused_lora.explain("cpu", **shape, dtype=dtype)
        assert told == f"composed: there are no fused kernels for {dtype} tensors on 'cpu'"
    torch.use_deterministic_algorithms(True)
    try:
        assert "forward: fused: not timed (deterministic algorithms" in fused_lora.explain("cpu", **shape)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_processor_without_the_instructions_is_left_to_torch(monkeypatch):
    class Old:
        def cpu_obstacle(self):
            return "there are no fused kernels for this processor: it has no AVX2"

        def set_path(self, name):
            pass

    monkeypatch.setattr(paths, "BINARY", binary.Binary(Old(), {}, None))
    monkeypatch.setattr("fused_lora.explanation.BINARY", paths.BINARY)
    assert paths.choose("cpu") == "auto"
    shape = {"rows": 1, "in_features": 8, "out_features": 8}
    assert fused_lora.explain("cpu", **shape).startswith("composed: there are no fused kernels for this")
    with fused_lora.use_path("fused"), pytest.raises(RuntimeError, match="this processor: it has no AVX2"):
        paths.choose("cpu")


class OldGPU:
    """The binary of a CUDA build, on a GPU that its kernels do not know."""

    def __init__(self, answer):
        self.answer = answer

    def set_path(self, name):
        pass

    def device_figures(self, index):
        if isinstance(self.answer, str):
            raise RuntimeError(self.answer)
        return self.answer


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((75, 40, 64 << 10), "the kernels need compute capability 8.0, and cuda:0 has 7.5"),
        ("lora_linear: cudaErrorNoKernelImageForDevice\nand more", "cudaErrorNoKernelImageForDevice$"),
        ((80, 108, 163 << 10), None),
    ],
)
def test_a_gpu_that_the_kernels_do_not_know_is_found_before_the_first_launch(monkeypatch, answer, problem):
    monkeypatch.setattr(paths, "BINARY", binary.Binary(OldGPU(answer), {"cuda": "yes"}, None))
    monkeypatch.setattr(paths, "_warned", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    paths._gpu_obstacle.cache_clear()
    try:
        if problem is None:
            assert paths.choose("cuda", 0) == "auto"
            return
        with pytest.warns(fused_lora.FusedLoRAWarning, match=problem):
            assert paths.choose("cuda", 0) == "reference"
        for path in ("fused", "composed"):
            with fused_lora.use_path(path), pytest.raises(RuntimeError, match=problem):
                paths.choose("cuda", 0)
    finally:
        paths._gpu_obstacle.cache_clear()


def test_a_build_without_cuda_says_so_of_a_gpu(monkeypatch):
    monkeypatch.setattr(
        paths, "BINARY", binary.Binary(OldGPU(""), {"cuda": "no", "reason": "no toolkit"}, None)
    )
    assert paths.obstacle("fused", "cuda").endswith("no kernels for 'cuda' tensors in this build: no toolkit")


def test_fused_from_the_environment():
    code = "import torch, fused_lora; t = torch.ones(2, 2, dtype={}); "
    code += "print(fused_lora.lora_linear(t, t, t, t)[0])"
    assert run(code.format("torch.float32"), FUSED_LORA_PATH="fused").stdout == "tensor([6., 6.])\n"
    done = run(code.format("torch.float64"), FUSED_LORA_PATH="fused")
    assert "path 'fused' was asked for, but" in done.stderr


WITHOUT_BINARY = """
import sys, warnings
sys.modules["fused_lora._C"] = None  # an import of it fails
import torch, fused_lora
x, w, a, b = torch.randn(3, 8), torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ys = [fused_lora.lora_linear(x, w, a, b) for _ in range(3)]
assert [type(c.message).__name__ for c in caught] == ["FusedLoRAWarning"], caught
assert "rebuild it" in str(caught[0].message)
assert all(torch.allclose(y, x @ w.t() + x @ a.t() @ b.t(), atol=1e-5) for y in ys)
assert fused_lora.dropout_mask(1, 2, 3, 0.5).shape == (2, 3)
fused_lora.clear_cast_cache()
layer = fused_lora.LoRALinear(8, 4, r=2, dropout=0.5)
torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
try:
    with fused_lora.use_path("composed"):
        fused_lora.lora_linear(x, w, a, b)
except RuntimeError as error:
    assert "'composed' was asked for, but fused_lora._C does not load" in str(error), error
else:
    raise AssertionError("composed was served without a binary")
print("served")
"""


def test_without_a_binary_plain_torch_serves_with_one_warning():
    done = run(WITHOUT_BINARY)
    assert done.stdout == "served\n", done.stderr


def facts(**changes: str) -> dict[str, str]:
    return {"torch": "2.13.0+cpu", "torch_cuda": "none"} | changes


@pytest.mark.parametrize(
    ("built", "problem"),
    [
        (facts(), None),
        (facts(torch="2.12.1+cpu"), "built for torch 2.12.1+cpu and torch 2.13.0+cpu is running"),
        (facts(torch_cuda="12.8"), "built for torch's CUDA 12.8 and torch has none"),
        ({}, "built for torch None"),
    ],
)
def test_facts_are_compared_with_the_torch_that_runs(built, problem):
    found = binary.mismatch(built, "2.13.0+cpu", None)
    if problem is None:
        assert found is None
    else:
        assert problem in found
        assert "--no-build-isolation" in found  # how to mend it


def test_a_binary_of_another_torch_is_not_touched(tmp_path, monkeypatch):
    (tmp_path / "_build.json").write_text(json.dumps(facts(torch="1.0")))
    monkeypatch.setattr(binary.importlib, "import_module", lambda name: pytest.fail("it was loaded"))
    loaded = binary.load(tmp_path)
    assert loaded.module is None
    assert "built for torch 1.0" in loaded.problem


def test_missing_and_damaged_facts_are_explained(tmp_path):
    assert "is not built" in binary.load(tmp_path).problem
    (tmp_path / "_build.json").write_text("{")
    assert "cannot be read" in binary.load(tmp_path).problem


def test_the_facts_in_the_binary_are_those_beside_it():
    beside = json.loads((binary.Path(binary.__file__).parent / "_build.json").read_text())
    assert binary.BINARY.module.build_facts() == beside
    assert beside["torch"] == torch.__version__


def gradients(leaves, given):
    return torch.autograd.grad(lora_linear(*leaves, **given.options).sum(), leaves)


@pytest.mark.parametrize("path", ["fused", "composed"])
def test_many_threads_may_call_at_once(path):
    given = operands((64,), 64, 64, 8, dropout_p=0.3)
    leaves = [t.requires_grad_() for t in given.tensors]
    failures = []

    def work():
        for _ in range(20):
            got = gradients(leaves, given)
            if not all(torch.equal(g, e) for g, e in zip(got, expected, strict=True)):
                failures.append("a gradient differs")

    with fused_lora.use_path(path):
        expected = gradients(leaves, given)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    """A data set that computes with a layer, as a tokeniser's or an encoder's would."""

    def __init__(self, given):
        self.given = given

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return lora_linear(*self.given.tensors)


def test_forked_workers_compute():
    """Behind a parent that has used its threads already."""
    given = operands((256,), 256, 256, 8)
    with fused_lora.use_path("fused"):
        expected = lora_linear(*given.tensors)
        loader = torch.utils.data.DataLoader(
            Rows(given), num_workers=2, multiprocessing_context="fork", timeout=60
        )
        for y in loader:
            torch.testing.assert_close(y[0], expected, rtol=0, atol=0)


def test_the_number_of_threads_is_torchs_and_changes_no_bit():
    given = operands((300,), 256, 512, 16, dropout_p=0.1)
    before = torch.get_num_threads()
    try:
        with fused_lora.use_path("fused"):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(bits_of(given))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
