"""Adapters that are loaded, replaced, dropped and switched in a process that computes with them."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora import (
    AdapterFileError,
    LoRALinear,
    add_lora,
    delete_adapter,
    held,
    load_adapter,
    pack,
    save_adapter,
    set_adapter,
    swapping,
    use_adapters,
)
from fused_lora.packed import packed_weight
from fused_lora.peft_files import TENSORS
from fused_lora.swap import lora_layers
from tests import models
from tests.models import example, output, shake, tiny

steady = pytest.fixture(models.steady, autouse=True)
F32, BF16 = torch.float32, torch.bfloat16
BATCH = example("llama")
# Files that differ in all that one adapter's may: rank, scaling, dropout, layers.
VERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("o_proj+fc2", {"r": 4, "alpha": 6.0}),
    "two": ("o_proj+fc2", {"r": 4, "alpha": 6.0}),
    "small": ("o_proj+fc2", {"r": 1, "alpha": 5.0, "dropout": 0.5}),
    "attention": ("o_proj", {"r": 7, "alpha": 3.0, "rslora": True}),
}


def base(dtype: torch.dtype = F32) -> Any:
    return tiny("llama", dtype, num_hidden_layers=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("adapters")
    for key, (name, (targets, settings)) in enumerate(VERSIONS.items()):
        model = base()
        add_lora(model, targets, **settings)
        shake(model, key)
        save_adapter(model, directory / name)
    return directory


def own(files: Path, version: str, weights: torch.dtype = F32, **options: Any) -> Tensor:
    """What a model computes that never held another adapter."""
    model = base(weights)
    load_adapter(model, files / version, **options)
    with torch.no_grad():
        return output(model, BATCH)


def computed(model: Any) -> Tensor:
    with torch.no_grad():
        return output(model, BATCH)


def frozen(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Where the frozen weights lie, and how often they were written to."""
    parameters = model.named_parameters()
    return {name: (p.data_ptr(), p._version) for name, p in parameters if ".lora_" not in name}


# In place of another


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rank", [None, 8])
def test_a_model_computes_by_the_adapter_that_took_the_others_place(rank, dtype, files):
    model = base(dtype)
    for version in (*VERSIONS, "one"):
        load_adapter(model, files / version, "served", replace=True, rank=rank)
        fresh = base(dtype)
        if rank is not None:
            load_adapter(fresh, files / "one", rank=rank)  # the layers that hold zeros then
        load_adapter(fresh, files / version, rank=rank, replace=True)
        assert torch.equal(computed(model), computed(fresh))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [F32, torch.float64], ids=str)
def test_at_a_fixed_rank_an_adapter_adds_what_it_adds_at_its_own(version, dtype, files):
    torch.testing.assert_close(own(files, version, dtype, rank=8), own(files, version, dtype))


def test_a_fixed_rank_costs_a_16_bit_adapter_one_rounding(files):
    """The scaling goes into B: in masters nothing is lost, in 16 bits as much as any B rounds."""
    exact = own(files, "one", torch.float64)

    def error(y: Tensor) -> Tensor:
        return (y.double() - exact).norm()

    own_rank, padded = (error(own(files, "one", BF16, dtype=BF16, rank=rank)) for rank in (None, 8))
    assert padded < 2 * own_rank


def test_where_nothing_but_numbers_differs_the_parameters_stay(files):
    model = base()
    load_adapter(model, files / "one")
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    load_adapter(model, files / "two", replace=True)
    now = dict(model.named_parameters())
    assert all(now[name] is p and p.data_ptr() == place for name, (p, place) in before.items())


def test_a_layer_that_the_files_leave_out_loses_the_adapter_or_holds_zeros(files):
    for rank, has in ((None, False), (8, True)):
        model = base()
        load_adapter(model, files / "one", "served", rank=rank)
        load_adapter(model, files / "attention", "served", rank=rank, replace=True)
        down = model.model.layers[0].mlp.down_proj
        assert ("served" in down.settings) is has
        assert not has or not down.lora_B["served"].any()


def test_without_replace_a_name_that_is_taken_is_refused(files):
    model = base()
    load_adapter(model, files / "one")
    with pytest.raises(ValueError, match=r"has an adapter 'default' already \(replace=True puts"):
        load_adapter(model, files / "two")
    assert torch.equal(computed(model), own(files, "one"))


def test_an_adapter_may_be_loaded_beside_the_active_one(files):
    model = base()
    load_adapter(model, files / "one", "first", trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    load_adapter(model, files / "small", "second", activate=False)
    assert torch.equal(computed(model), own(files, "one"))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    set_adapter(model, "second", trainable=False)
    assert torch.equal(computed(model), own(files, "small"))
    assert not any(p.requires_grad for p in model.parameters())


def test_loading_draws_no_random_numbers(files):
    """Who samples tokens meanwhile samples what it would have."""
    model, state = base(), torch.get_rng_state()
    load_adapter(model, files / "one")
    load_adapter(model, files / "small", "second")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be a whole number ≥ 1, got 0"),
        ({"rank": 4.0}, ValueError, "rank must be a whole number ≥ 1, got 4.0"),
        ({"rank": 8, "trainable": True}, ValueError, "trainable: .* does not train"),
        ({"rank": 3}, AdapterFileError, "_proj has r=4, which is more than rank=3"),
    ],
)
def test_a_rank_that_cannot_be_held_is_refused(arguments, kind, message, files):
    model = base()
    with pytest.raises(kind, match=message):
        load_adapter(model, files / "one", **arguments)
    assert not lora_layers(model)


# Dropped


def test_a_dropped_adapter_is_nowhere_and_the_others_stay(files):
    model = base()
    plain = computed(model)
    load_adapter(model, files / "attention", "second")
    load_adapter(model, files / "one", "first")
    delete_adapter(model, "second")
    assert torch.equal(computed(model), own(files, "one"))
    assert not [name for name, _ in model.named_parameters() if "second" in name]
    delete_adapter(model, "first")
    assert torch.equal(computed(model), plain)
    assert {layer.active_adapters for layer in lora_layers(model).values()} == {()}
    with pytest.raises(KeyError, match="no adapter 'first' in this model"):
        delete_adapter(model, "first")


def test_a_merged_model_drops_nothing(files):
    model = base()
    load_adapter(model, files / "one")
    fused_lora.merge(model)
    expected = computed(model)
    with pytest.raises(RuntimeError, match="merged; unmerge it before you delete an adapter"):
        delete_adapter(model, "default")
    assert torch.equal(computed(model), expected)


# Frozen weights


def swaps(model: nn.Module, files: Path) -> Iterator[str]:
    """Every kind of swap; after each, the version that the model computes by."""
    load_adapter(model, files / "two", "served", replace=True)
    yield "two"
    load_adapter(model, files / "one", "other", activate=False)
    yield "two"
    set_adapter(model, "other", trainable=False)
    yield "one"
    load_adapter(model, files / "attention", "served", replace=True, activate=False)
    yield "one"
    delete_adapter(model, "served")
    yield "one"
    load_adapter(model, files / "small", "served")
    yield "small"


def test_swaps_leave_the_frozen_weights_where_they_are(files):
    model = base()
    load_adapter(model, files / "one", "served")
    before = frozen(model)
    for version in swaps(model, files):
        assert torch.equal(computed(model), own(files, version))
    assert frozen(model) == before


def test_swaps_leave_packed_weights_packed(files):
    model = base(BF16)
    load_adapter(model, files / "one", "served")
    layers = lora_layers(model).values()
    pack(model)
    for _ in swaps(model, files):
        computed(model)
        with use_adapters(
            model, ["served" if "served" in model.model.layers[0].mlp.down_proj.settings else None] * 2
        ):
            computed(model)
    assert all(packed_weight(layer) is not None for layer in layers)


# Compiled


def test_swaps_at_a_fixed_rank_do_not_compile_again(files):
    model = base()
    load_adapter(model, files / "one", "served", rank=8)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    computed(compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        for version in ("two", "small", "attention", "one"):
            load_adapter(model, files / version, "served", replace=True, rank=8)
            torch.testing.assert_close(computed(compiled), own(files, version))
        load_adapter(model, files / "two", "other", activate=False, rank=8)
        torch.testing.assert_close(computed(compiled), own(files, "one"))
        with pytest.raises(AdapterFileError):
            load_adapter(model, files / "missing", "served", replace=True, rank=8)
        torch.testing.assert_close(computed(compiled), own(files, "one"))
    assert backend.frame_count == 1


def test_each_adapter_that_is_switched_to_is_compiled_once(files):
    model = base()
    for name, version in (("second", "two"), ("first", "one")):
        load_adapter(model, files / version, name, rank=8)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        for name, version in (("first", "one"), ("second", "two")):
            set_adapter(model, name, trainable=False)
            torch.testing.assert_close(computed(compiled), own(files, version))
    assert backend.frame_count == 2


def test_mixed_batches_of_a_compiled_model_take_what_was_swapped_in(files):
    model = base()
    for name in ("a", "b"):
        load_adapter(model, files / "one", name, rank=8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with use_adapters(model, ["b", "a"]):
        computed(compiled)
        first = computed(model)
    load_adapter(model, files / "two", "a", replace=True, rank=8, activate=False)
    with torch.compiler.set_stance("fail_on_recompile"), use_adapters(model, ["b", "a"]):
        now = computed(compiled)
    torch.testing.assert_close(now[:1], first[:1])
    torch.testing.assert_close(now[1:], own(files, "two")[1:], rtol=1e-4, atol=1e-4)


# Several threads


class Team:
    """Threads whose errors are raised here."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self._errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def start(self, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._errors.append(error)
                self.done.set()

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for thread in self._threads:
            thread.join(60)
        if self._errors:
            raise self._errors[0]
        assert not any(thread.is_alive() for thread in self._threads)


def generated(model: Any) -> Tensor:
    """The scores of every step of a generation, bit by bit what the adapters made them."""
    made = model.generate(
        **BATCH,
        attention_mask=torch.ones_like(BATCH["input_ids"]),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return torch.stack(made.scores)


def known(result: Tensor, versions: dict[str, Tensor]) -> str:
    same = [name for name, expected in versions.items() if torch.equal(result, expected)]
    assert len(same) == 1, "no version's own result"
    return same[0]


@pytest.mark.parametrize(
    ("packs", "rank"), [(False, None), (False, 8), (True, 8)], ids=["own rank", "fixed rank", "packed"]
)
def test_every_generation_is_by_one_version_while_another_thread_swaps(packs, rank, files):
    model = base(BF16)
    load_adapter(model, files / "one", "other", rank=rank)
    load_adapter(model, files / "one", "served", rank=rank)
    if packs:
        pack(model)
    layers, before = list(lora_layers(model).values()), None if packs else frozen(model)
    expected, mixed = {}, {}
    for version in VERSIONS:
        load_adapter(model, files / version, "served", replace=True, rank=rank)
        expected[version] = generated(model)
        with use_adapters(model, ["other", "served"]):
            mixed[version] = generated(model)
    seen: list[str] = []
    with Team() as team:

        def generate() -> None:
            while not team.done.is_set():
                with held(model):
                    seen.append(known(generated(model), expected))

        def mix() -> None:
            while not team.done.is_set():
                with use_adapters(model, ["other", "served"]):
                    seen.append(known(generated(model), mixed))

        for work in (generate, generate, mix):
            team.start(work)
        for turn in range(12):
            version = list(VERSIONS)[turn % 4]
            load_adapter(model, files / version, "served", replace=True, rank=rank)
            load_adapter(model, files / "small", "passing", activate=False)
            if turn % 3 == 0:
                with swapping(model):  # two swaps that are seen as one
                    set_adapter(model, "passing", trainable=False)
                    delete_adapter(model, "passing")
                    set_adapter(model, "served", trainable=False)
            else:
                delete_adapter(model, "passing")
            had = len(seen)
            while len(seen) < had + 2 and not team.done.is_set():
                team.done.wait(0.001)
    assert set(seen) == set(VERSIONS)
    assert all((packed_weight(layer) is not None) is packs for layer in layers)
    assert frozen(model) == before or packs


def test_pefts_hotswap_is_seen_whole(files, tmp_path):
    """A fused PEFT model, and PEFT's own function within `swapping`."""
    for key in (1, 2):
        model = peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules=["o_proj", "down_proj"]))
        shake(model, key)
        model.save_pretrained(tmp_path / str(key))
    model = peft.PeftModel.from_pretrained(base(), tmp_path / "1").eval()
    fused_lora.fuse(model)
    expected = {}
    for key in ("2", "1"):
        hotswap_adapter(model, tmp_path / key, "default")
        expected[key] = generated(model)
    seen: list[str] = []
    with Team() as team:

        def generate() -> None:
            while not team.done.is_set():
                with held(model):
                    seen.append(known(generated(model), expected))

        team.start(generate)
        team.start(generate)
        for turn in range(6):
            with swapping(model):
                hotswap_adapter(model, tmp_path / "12"[turn % 2], "default")
            had = len(seen)
            while len(seen) < had + 2 and not team.done.is_set():
                team.done.wait(0.001)
    assert set(seen) == {"1", "2"}


def test_pefts_hotswap_does_not_compile_a_fused_model_again(tmp_path):
    for key, r in ((1, 4), (2, 2)):
        model = peft.get_peft_model(base(), peft.LoraConfig(r=r, target_modules=["o_proj", "down_proj"]))
        shake(model, key)
        model.save_pretrained(tmp_path / str(key))
    model = peft.PeftModel.from_pretrained(base(), tmp_path / "1").eval()
    fused_lora.fuse(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    computed(compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        for key in "21":
            hotswap_adapter(model, tmp_path / key, "default")
            torch.testing.assert_close(computed(compiled), computed(model))


def test_threads_have_names_of_their_own(files):
    model = base()
    for version in VERSIONS:
        load_adapter(model, files / version, version)
    set_adapter(model, "one", trainable=False)
    batches: list[Sequence[str | None] | None] = [
        ["one", "two"],
        ["small", None],
        ["attention", "attention"],
        None,
    ]

    def compute(names: Sequence[str | None] | None) -> Tensor:
        if names is None:
            return computed(model)
        with use_adapters(model, names):
            return computed(model)

    expected = [compute(names) for names in batches]
    all_in = threading.Barrier(len(batches))
    with Team() as team:

        def work(i: int) -> None:
            names = batches[i]
            for _ in range(5):
                with ExitStack() as stack:
                    if names is not None:
                        stack.enter_context(use_adapters(model, names))
                    all_in.wait(30)
                    assert torch.equal(computed(model), expected[i])
                    all_in.wait(30)

        for i in range(len(batches)):
            team.start(lambda i=i: work(i))
        for thread in team._threads:
            thread.join(60)


def test_a_compiled_layer_follows_the_names_of_each_thread():
    torch.manual_seed(0)
    layer, x = LoRALinear(32, 32), torch.randn(2, 3, 32)
    for name in ("a", "b"):
        layer.add_adapter(name, fused_lora.LoRASettings(4))
        nn.init.normal_(layer.lora_B[name])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with use_adapters(layer, ["a", None]):
        here = compiled(x)
        there: list[Tensor] = []
        with Team() as team:
            team.start(lambda: there.append(compiled(x)))
        torch.testing.assert_close(compiled(x), here)
    torch.testing.assert_close(there[0], layer(x))
    torch.testing.assert_close(here[0], layer.set_adapter("a") or layer(x)[0])


def test_names_reach_a_checkpoint_that_a_backwards_own_thread_computes_again():
    """So it is on a GPU, where backward has a thread for each device. Here backwards within backwards get
    one, from a depth on."""
    torch.manual_seed(0)
    layer, x = LoRALinear(8, 8), torch.randn(2, 3, 8)
    for name in ("a", "b"):
        layer.add_adapter(name, fused_lora.LoRASettings(2))
        nn.init.normal_(layer.lora_B[name])
    fused_lora.train_adapters(layer, ["a", "b"])
    computing: set[int] = set()
    layer.register_forward_pre_hook(lambda *_: computing.add(threading.get_ident()))

    def step(compute: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        layer.zero_grad()
        with use_adapters(layer, ["a", "b"]):
            compute(x.clone().requires_grad_()).square().sum().backward()
        return {
            name: p.grad.clone()
            for name, p in layer.named_parameters()
            if ".lora" not in name and p.grad is not None
        }

    def nested(depth: int) -> Callable[[Tensor], Tensor]:
        inner = layer if depth == 0 else nested(depth - 1)
        return lambda x: checkpoint(inner, x, use_reentrant=True)

    expected = step(layer)
    assert computing == {threading.get_ident()}
    found = step(nested(70))
    assert len(computing) > 1
    torch.testing.assert_close(found, expected)


def test_copies_are_in_no_context(files):
    model = base()
    load_adapter(model, files / "one")
    with use_adapters(model, ["default", None]):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for each in copies:
            assert torch.equal(computed(each), own(files, "one"))


# Holds and swaps


@contextmanager
def elsewhere(context: Any) -> Iterator[threading.Event]:
    """A context that another thread enters; the event is set when it is in."""
    entered, leave = threading.Event(), threading.Event()
    with Team() as team:

        def work() -> None:
            with context:
                entered.set()
                leave.wait(60)

        team.start(work)
        try:
            yield entered
        finally:
            leave.set()


SOON, MEANWHILE = 20.0, 0.1  # seconds: for what must happen, and for what must not


@pytest.fixture
def pair() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_lora(model, ["0", "1"], r=2)
    return model


def test_a_swap_waits_for_holds_and_holds_wait_for_it(pair):
    with elsewhere(held(pair)) as first:
        assert first.wait(SOON)
        with elsewhere(held(pair)) as second:
            assert second.wait(SOON)  # any number at once
            swap = elsewhere(swapping(pair))
            swapped = swap.__enter__()
            assert not swapped.wait(MEANWHILE)
            late = elsewhere(held(pair))
            holds = late.__enter__()
            assert not holds.wait(MEANWHILE)  # the swap's turn comes first
        assert not swapped.is_set()
    assert swapped.wait(SOON)
    assert not holds.wait(MEANWHILE)
    swap.__exit__(None, None, None)
    assert holds.wait(SOON)
    late.__exit__(None, None, None)


@pytest.mark.parametrize(
    "part", [lambda m: m[0], lambda m: nn.ModuleList([m]), torch.compile], ids=["part", "whole", "compiled"]
)
def test_who_holds_a_part_or_a_wrapper_holds_what_they_share(part, pair):
    with elsewhere(held(part(pair))) as holds:
        assert holds.wait(SOON)
        with elsewhere(swapping(copy.deepcopy(pair))) as of_a_copy:
            assert of_a_copy.wait(SOON)
        swap = elsewhere(swapping(pair))
        assert not swap.__enter__().wait(MEANWHILE)
    swap.__exit__(None, None, None)


def test_who_holds_already_does_not_wait_for_a_swap_that_waits(pair):
    swap = elsewhere(swapping(pair))
    with held(pair):
        swapped = swap.__enter__()
        assert not swapped.wait(MEANWHILE)
        with held(pair), use_adapters(pair, ["default"] * 3):
            pair(torch.zeros(3, 4))
        fused_lora.set_adapter(pair, "default")  # nobody else holds it
        assert not swapped.is_set()
    assert swapped.wait(SOON)
    swap.__exit__(None, None, None)


def test_a_swap_that_might_wait_for_ever_is_refused(pair):
    with elsewhere(held(pair)) as holds:
        assert holds.wait(SOON)
        with held(pair), pytest.raises(RuntimeError, match="another thread holds it"):
            fused_lora.set_adapter(pair, "default")
        other = copy.deepcopy(pair)
        with swapping(other), pytest.raises(RuntimeError, match="another thread holds it"):
            fused_lora.set_adapter(pair, "default")
    fused_lora.set_adapter(pair, "default")


def test_switched_off_adapters_are_off_for_no_thread_that_holds_the_model(pair):
    with fused_lora.disabled(pair):
        late = elsewhere(held(pair))
        assert not late.__enter__().wait(MEANWHILE)
        with held(pair):
            pair(torch.zeros(3, 4))
    late.__exit__(None, None, None)


def test_an_error_within_leaves_nothing_held(pair):
    for context in (held, swapping):
        with pytest.raises(ZeroDivisionError), context(pair):
            raise ZeroDivisionError
    with elsewhere(swapping(pair)) as swapped:
        assert swapped.wait(SOON)


# Files


def test_a_file_that_is_written_to_after_it_was_checked_changes_nothing(files, tmp_path):
    """The tensors are not left in a mapped file, whose writer could change them, or end this process."""
    directory = tmp_path / "files"
    shutil.copytree(files / "two", directory)
    model = base()
    load_adapter(model, files / "one", "served")
    with Team() as team, held(model):
        loading = team.start(lambda: load_adapter(model, directory, "served", replace=True))
        loading.join(MEANWHILE)  # read and checked; it waits for this hold
        (directory / TENSORS).write_bytes(b"")
    assert torch.equal(computed(model), own(files, "two"))
