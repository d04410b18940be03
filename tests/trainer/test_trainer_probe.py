"""The batch with which the trainer looks at a model: from its config, or where that does not suit, from the data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, examples
from torch import nn
from training_runs import config

from hf_featreuse import BlockError, FeatureReuseTrainer

BLOCKS = [f"model.vit.layers.{index}" for index in range(4)]


class Renamed(nn.Module):
    """A classifier of transformers behind an argument of another name, so that its config's batch does not suit."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build("vit")

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return self.model(pixel_values=images, labels=labels)


def renamed_examples(**more: Any) -> list[dict]:
    return [{"images": e["pixel_values"], "labels": e["labels"], **more} for e in examples()]


def test_the_data_serves_where_the_config_does_not(tmp_path: Path) -> None:
    trainer = FeatureReuseTrainer(Renamed(), config(tmp_path), train_dataset=renamed_examples())
    assert trainer.train().global_step == 6
    assert [block.name for block in trainer.feature_reuse.blocks] == BLOCKS
    assert trainer.step_costs is not None


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    trainer = FeatureReuseTrainer(Renamed(), config(tmp_path), train_dataset=renamed_examples(row=3))
    assert [block.name for block in trainer.get_residual_blocks(trainer.model)] == BLOCKS


def test_where_the_config_serves_the_data_is_not_touched(tmp_path: Path) -> None:
    class Untouched(list):
        def __iter__(self) -> Any:
            raise AssertionError("the data was read")

        __getitem__ = __iter__

    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path), train_dataset=Untouched(examples()))
    assert len(trainer.get_residual_blocks(trainer.model)) == 4


def test_data_that_does_not_suit_either_is_an_error_that_shows_it(tmp_path: Path) -> None:
    data = [{"images": torch.zeros(3, 8, 4), "labels": 0}] * 4
    trainer = FeatureReuseTrainer(Renamed(), config(tmp_path), train_dataset=data)
    with pytest.raises(
        BlockError, match=r"Renamed failed on the batch .*\(shapes .*'images': \(4, 3, 8, 4\)\}\): RuntimeError"
    ):
        trainer.train()


def test_without_data_the_error_says_what_to_override(tmp_path: Path) -> None:
    trainer = FeatureReuseTrainer(Renamed(), config(tmp_path))
    with pytest.raises(BlockError, match=r"no `train_dataset`.*Override `get_residual_blocks`"):
        trainer.get_residual_blocks(trainer.model)
