"""DDP and FSDP2: the gradients of a job are one process's."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_lora
from tests import models
from tests.distributed.models import (
    OWNERS,
    adapted_model,
    assert_same,
    gradients,
    loss_of,
    of_one_process,
    peft_model,
    plain_model,
    settle,
    whole,
)

BOTH = pytest.mark.parametrize("owner", OWNERS)
DROPOUT = pytest.mark.parametrize("dropout", [0.0, 0.3])


class Calls:
    """Of the op, by the layers; and the memory of the weights that they passed."""

    def __init__(self):
        self.weights, self.dtypes = [], []

    def __enter__(self):
        self.before = fused_lora.lora_linear
        for module in models.CALLERS:
            module.lora_linear = self
        return self

    def __exit__(self, *_):
        for module in models.CALLERS:
            module.lora_linear = self.before

    def __call__(self, x, weight, *args, **options):
        self.weights.append(weight.untyped_storage())
        self.dtypes.append(weight.dtype)
        return self.before(x, weight, *args, **options)


def rank():
    return torch.distributed.get_rank()


def ranks():
    return torch.distributed.get_world_size()


def shard(model, **options):
    """As users do: a group for each block, one for the rest."""
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for block in blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def step_ddp(owner, dropout):
    right = of_one_process(adapted_model(owner, dropout), ranks())
    model = DistributedDataParallel(adapted_model(owner, dropout))
    with Calls() as calls:
        loss_of(model, rank()).backward()
    assert len(calls.weights) == 14  # 2 blocks of 7 projections
    assert_same(gradients(model), right[1])


@BOTH
@DROPOUT
def test_ddp_gradients_are_one_process_s(pair, owner, dropout):
    pair.run(step_ddp, owner, dropout)


def step_fsdp(owner, dropout, offload):
    right = of_one_process(adapted_model(owner, dropout), ranks())
    policy = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
    model = shard(adapted_model(owner, dropout), offload_policy=policy)
    for _ in range(2):  # the second step gathers into memory that the first gave back
        model.zero_grad()
        with Calls() as calls:
            loss = loss_of(model, rank())
        blocks = calls.weights
        assert len(blocks) == 14
        # Between forward and backward nothing holds the gathered weights of the first block.
        assert all(storage.size() == 0 for storage in blocks[:7])
        loss.backward()
        assert_same(gradients(model), right[1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    stepped = adapted_model(owner, dropout)
    for parameter, gradient in zip(trained(stepped), right[1].values(), strict=True):
        parameter.grad = gradient
    torch.optim.AdamW(trained(stepped), lr=0.1).step()
    assert loss_of(model.eval(), 0).sub(loss_of(stepped.eval(), 0)).abs() < 1e-4


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@BOTH
@DROPOUT
def test_fsdp_gradients_are_one_process_s(pair, owner, dropout):
    pair.run(step_fsdp, owner, dropout, False)


@BOTH
def test_fsdp_may_keep_its_shards_in_the_hosts_memory(pair, owner):
    pair.run(step_fsdp, owner, 0.3, True)


def step_mixed(owner):
    """In bfloat16 each process computes the very numbers that one process does on its batch."""
    right: dict[str, torch.Tensor] = {}
    for r in range(ranks()):
        model = adapted_model(owner, 0.3)
        for parameter in model.parameters():  # and no buffer
            parameter.data = parameter.data.to(torch.bfloat16)
        loss_of(model, r).backward()
        for name, gradient in gradients(model).items():
            right[name] = right.get(name, 0) + gradient.float() / ranks()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(adapted_model(owner, 0.3), mp_policy=policy)
    loss_of(model, rank()).backward()
    for parameter in trained(model):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    assert_same(gradients(model), right)


@BOTH
def test_fsdp_mixes_precision(pair, owner):
    pair.run(step_mixed, owner)


def fuse_sharded():
    right = of_one_process(adapted_model("fuse", 0.3), ranks())
    model = peft_model(plain_model(), 0.3)
    settle(model)
    shard(model)
    report = fused_lora.fuse(model)
    assert len(report.swapped) == 14
    assert not report.skipped
    with Calls() as calls:
        loss_of(model, rank()).backward()
    assert len(calls.weights) == 14
    assert_same(gradients(model), right[1])


def test_a_model_that_fsdp_has_sharded_is_fused(pair):
    pair.run(fuse_sharded)


def add_to_sharded():
    model = shard(plain_model())
    with pytest.raises(ValueError, match="fully_shard has it already"):
        fused_lora.add_lora(model, "o_proj")
    model = shard(adapted_model("add_lora", targets="o_proj"))
    with pytest.raises(RuntimeError, match="before fully_shard"):
        fused_lora.add_lora(model, "o_proj", adapter_name="second")


def test_adapters_do_not_come_after_fsdp(pair):
    """It would neither shard them nor reduce their gradients."""
    pair.run(add_to_sharded)


def autocast_sharded(owner):
    one = adapted_model(owner)
    model = shard(adapted_model(owner))
    for _ in range(2):
        one.zero_grad()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(one, rank()).backward()
            with Calls() as calls:
                loss_of(model, rank()).backward()
        assert calls.dtypes == [torch.bfloat16] * 14  # cast for the call, past the copies that are kept
        of_all = {name: torch.zeros_like(g) for name, g in gradients(one).items()}
        for name, gradient in gradients(one).items():
            torch.distributed.all_reduce(gradient)
            of_all[name] = gradient / ranks()
        assert_same(gradients(model), of_all)
        # Frozen weights that change between steps, as by loading others.
        with torch.no_grad():
            for each in (one, model):
                for parameter in each.parameters():
                    parameter.mul_(1.25)


@BOTH
def test_autocast_sees_what_fsdp_gathers(pair, owner):
    """Whose memory and version are those of the weights that were gathered before."""
    pair.run(autocast_sharded, owner)


def save_sharded(directory):
    model = shard(adapted_model("add_lora"))
    fused_lora.save_adapter(model, directory)
    torch.distributed.barrier()
    other = plain_model()
    fused_lora.load_adapter(other, directory)
    loaded = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), loaded[name]), name


def test_a_sharded_adapter_is_saved_whole(pair, tmp_path):
    pair.run(save_sharded, tmp_path)
