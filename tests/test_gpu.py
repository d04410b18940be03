"""Tests that need a CUDA device; skipped, with the reason, if there is none."""

import pytest
import torch
from tiny_models import batch, build, examples
from training_runs import StepWatch, config

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, FeatureReuseTrainer, StepKind, find_residual_blocks
from hf_featreuse.trainer.step_log import StepLog

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
