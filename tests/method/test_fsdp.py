"""Queries of a sharded model, in a process group of one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny_models import build, examples
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_runs import config

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, FeatureReuseTrainer, find_residual_blocks
from hf_featreuse.method.fsdp import unsharded_class
from hf_featreuse.trainer.console import opening_summary


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[FeatureReuseTrainer]:
    """A trainer created before the process group of one, so that accelerate does not see it."""
    made = FeatureReuseTrainer(build("vit"), config(tmp_path), train_dataset=examples(8))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield made
    dist.destroy_process_group()


def test_a_sharded_model_is_called_by_its_own_class(trainer: FeatureReuseTrainer, tmp_path: Path) -> None:
    model = trainer.model
    assert model is not None
    plain = type(model)
    assert unsharded_class(model) is plain
    reuse = FeatureReuse(model, find_residual_blocks(model), FeatureReuseSchedule(4))
    trainer.state.max_steps = 4
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert type(model).__name__ == "FSDPViTForImageClassification"
    assert unsharded_class(model) is plain
    assert opening_summary(reuse, None, max_steps=4).startswith("Feature reuse with ViTForImageClassification (")
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "ViTForImageClassification" in card
    assert "FSDPViT" not in card
