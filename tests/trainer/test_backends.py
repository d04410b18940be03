"""The functions for backends and compilation, with accelerate's own objects in one process."""

import contextlib

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    TorchDynamoPlugin,
)
from tiny_models import build
from torch.distributed.fsdp import StateDictType

from hf_featreuse import BlockError, FeatureReuse, FeatureReuseSchedule, find_residual_blocks
from hf_featreuse.trainer import backends


def bound(name: str = "vit") -> FeatureReuse:
    model = build(name)
    blocks = find_residual_blocks(model)
    return FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks)))


def test_compilation_is_removed_from_accelerate_which_would_compile_the_whole_model():
    arguments = {"dynamo_plugin": TorchDynamoPlugin(backend=DynamoBackend.AOT_EAGER)}
    plugin = backends.take_dynamo_plugin(arguments)
    assert plugin.backend == DynamoBackend.AOT_EAGER
    assert arguments["dynamo_plugin"].backend == DynamoBackend.NO
    assert backends.take_dynamo_plugin(arguments) is None


def test_ddp_searches_for_unused_parameters():
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=False)]
    backends.search_unused_parameters({"kwargs_handlers": handlers})
    assert handlers[0].find_unused_parameters


def test_one_process_is_accepted_with_either_granularity():
    for granularity in ("batch", "sample"):
        backends.check_accelerator(Accelerator(cpu=True), granularity)


def test_requested_sharding_that_does_not_happen_warns(monkeypatch):
    said = []
    monkeypatch.setattr(backends.logger, "warning_once", said.append)
    backends.check_sharding(build("vit"), Accelerator(cpu=True), fsdp_was_asked_for=False)
    assert said == []
    backends.check_sharding(build("vit"), Accelerator(cpu=True), fsdp_was_asked_for=True)
    assert len(said) == 1 and "every process holds the whole model" in said[0]


def test_binding_returns_the_result_or_raises_its_error():
    reuse = bound()
    assert backends.bind_on_every_rank(lambda: reuse, 1) is reuse

    def fail() -> FeatureReuse:
        raise BlockError("no block")

    with pytest.raises(BlockError, match="no block"):
        backends.bind_on_every_rank(fail, 1)


def test_fsdp_wraps_the_classes_of_the_blocks_and_forgets_them(monkeypatch):
    accelerator, reuse = Accelerator(cpu=True), bound()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    # As FSDP's configuration would set it, which needs a GPU.
    monkeypatch.setitem(accelerator.state._shared_state, "fsdp_plugin", plugin)
    with backends.sharded_by_block(accelerator, reuse.model, reuse):
        assert plugin.transformer_cls_names_to_wrap == ["ViTLayer"]
    assert plugin.transformer_cls_names_to_wrap is None
    plugin.transformer_cls_names_to_wrap = ["Mine"]
    with backends.sharded_by_block(accelerator, reuse.model, reuse):
        assert plugin.transformer_cls_names_to_wrap == ["Mine"]
    plugin.state_dict_type = StateDictType.SHARDED_STATE_DICT
    with contextlib.suppress(ZeroDivisionError), backends.whole_state_dict(accelerator):
        assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
        raise ZeroDivisionError
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT


def test_a_model_that_is_not_wrapped_sends_no_gradients():
    reuse = bound()
    backends.send_active_gradients(reuse.model, reuse)
    assert not hasattr(reuse.model, "_comm_hooks")


def test_the_optimizer_inside_accelerates_is_found():
    optimizer = torch.optim.SGD(build("vit").parameters(), lr=0.1)
    prepared = Accelerator(cpu=True).prepare(optimizer)
    assert backends.plain_optimizer(prepared) is optimizer
    assert backends.plain_optimizer(optimizer) is optimizer
