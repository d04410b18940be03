"""The example of a user's own trainer: short, and it learns."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "subclass_trainer.py"


def load():
    spec = importlib.util.spec_from_file_location("subclass_trainer", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_under_sixty_lines():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.slow
def test_its_loss_learns_and_its_choice_of_blocks_counts(tmp_path):
    example = load()
    trained = []

    class Watched(example.FocalLossTrainer):
        def get_residual_blocks(self, model):
            trained.extend(super().get_residual_blocks(model))
            return trained

    example.FocalLossTrainer = Watched
    metrics = example.main(str(tmp_path / "out"), max_steps=60)
    assert metrics["eval_accuracy"] > 0.3
    assert [block.name for block in trained] == ["vit.layers.3", "vit.layers.4", "vit.layers.5"]
