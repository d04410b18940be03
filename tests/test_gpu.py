"""Tests that need a CUDA device; skipped, with the reason, if there is none."""

import time
from types import SimpleNamespace

import pytest
import torch
from tiny_models import batch, build, examples
from training_runs import StepWatch, config

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, FeatureReuseTrainer, StepKind, find_residual_blocks
from hf_featreuse.trainer.step_log import StepLog
from hf_featreuse.trainer.step_timer import FIRST_LOG, StepTimer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["vit", "convnext", "resnet", "swin"])
def test_frozen_parts_stay_bit_identical(architecture, precision, tmp_path):
    watch = StepWatch()
    arguments = config(tmp_path, use_cpu=False, **precision)
    trainer = FeatureReuseTrainer(build(architecture), arguments, train_dataset=examples(), callbacks=[watch])
    watch.trainer = trainer
    trainer.train()
    assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= watch.kinds


def test_a_step_of_ours_waits_for_nothing_on_the_device():
    model = build("vit").cuda()
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks), drop_rate=0.5))
    log = StepLog(torch.device("cuda"), skip_non_finite=True)
    inputs = {name: tensor.cuda() for name, tensor in batch().items()}
    loss = model(**inputs).loss.detach()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4):
            with reuse.step(step) as plan:
                pass
            log.add(step, plan, 0.5, loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert log.drain(lambda values: values)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("architecture", ["vit", "convnext", "swin"])
def test_forward_and_backward_per_sample_wait_for_nothing_on_the_device(architecture, step):
    model = build(architecture).cuda()
    blocks = find_residual_blocks(model)
    schedule = FeatureReuseSchedule(len(blocks), drop_rate=0.5, drop_granularity="sample")
    reuse = FeatureReuse(model, blocks, schedule)
    inputs = {name: tensor.cuda() for name, tensor in batch(16).items()}
    for attempt in range(2):
        # In the first step of each kind it is seen that blocks do not mix samples, and which buffers change.
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            with reuse.step(step, batch_size=16):
                model(**inputs).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        model.zero_grad(set_to_none=True)


def test_the_time_of_a_step_is_that_of_the_device():
    done = []
    timer = StepTimer(lambda: StepKind.VANILLA)
    timer.on_train_begin(SimpleNamespace(device=torch.device("cuda")), None, None)
    x = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(FIRST_LOG):
            timer.on_step_begin(None, None, None)
            done.append(x @ x)
            timer.on_step_end(None, None, None)
        timer.drain()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(FIRST_LOG):
        timer.on_step_begin(None, None, None)
        done.append(x @ x)
        timer.on_step_end(None, None, None)
    torch.cuda.synchronize()
    seconds = timer.drain()["step_time/vanilla"]
    assert 0 < seconds < (time.perf_counter() - started) / FIRST_LOG


@pytest.mark.parametrize(("architecture", "last"), [("vit", False), ("convnext", True)])
def test_convolutional_models_train_channels_last(architecture, last, tmp_path):
    trainer = FeatureReuseTrainer(
        build(architecture), config(tmp_path, use_cpu=False, max_steps=2), train_dataset=examples()
    )
    trainer.train()
    kernels = [module.weight for module in trainer.model.modules() if isinstance(module, torch.nn.Conv2d)]
    kernels = [kernel for kernel in kernels if kernel.shape[-1] > 1 and kernel.shape[1] > 1]
    assert kernels and all(kernel.is_contiguous(memory_format=torch.channels_last) == last for kernel in kernels)
