"""The recipe by itself: mixed batches and their loss, and the weight average, with a plain Trainer or none."""

import pytest
import torch
from tiny_models import batch, build, examples
from torch.nn.functional import cross_entropy
from training_runs import options
from transformers import Trainer, TrainingArguments

from hf_featreuse import CheckpointError, ConfigurationError
from hf_featreuse.trainer.recipe import FollowWeights, Recipe
from hf_featreuse.trainer.recipe_arguments import RecipeArguments


def soft_loss(logits: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
    """Cross-entropy against soft labels: a share of the own label, the rest of the image before."""
    hard = torch.nn.functional.one_hot(labels, logits.shape[-1]).float()
    return cross_entropy(logits, share * hard + (1 - share) * hard.roll(1, 0))


def test_each_micro_batch_of_a_step_has_a_share_of_its_own_and_the_loss_follows():
    recipe, inputs = Recipe(RecipeArguments(mixup_alpha=0.8), seed=3), batch(8)
    loss = recipe.loss_function(None)
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    shares = []
    for position in range(3):
        with recipe.mixed(inputs, "pixel_values", step=5, position=position) as mixed:
            share = recipe._share
            expected = torch.lerp(inputs["pixel_values"].roll(1, 0), inputs["pixel_values"], share)
            assert torch.equal(mixed["pixel_values"], expected)
            torch.testing.assert_close(loss((logits,), inputs["labels"]), soft_loss(logits, inputs["labels"], share))
        shares.append(share)
    assert len(set(shares)) == 3
    # Outside, as in evaluation, the loss is that of the labels.
    assert torch.equal(loss((logits,), inputs["labels"]), cross_entropy(logits, inputs["labels"]))


def test_without_mixing_the_users_loss_is_left_alone():
    def own(outputs, labels, num_items_in_batch=None):
        return outputs[0].sum()

    recipe = Recipe(RecipeArguments())
    assert recipe.loss_function(own) is own
    assert recipe.loss_function(None) is None
    assert Recipe(RecipeArguments(cutmix_alpha=1.0)).loss_function(own) is not own


def test_a_loss_that_was_not_mixed_is_noticed():
    recipe = Recipe(RecipeArguments(mixup_alpha=0.8))
    with pytest.raises(ConfigurationError, match=r"`MyTrainer\.compute_loss` does not call it"):
        with recipe.expecting_mixed("MyTrainer"):
            pass
    with recipe.expecting_mixed("MyTrainer"), recipe.mixed(batch(4), "pixel_values", step=0, position=0):
        pass
    with Recipe(RecipeArguments()).expecting_mixed("MyTrainer"):
        pass


@pytest.mark.parametrize(
    "labels",
    [
        torch.eye(3)[[0, 1, 2, 0]],
        torch.eye(3)[[0, 1, 2, 0]].long(),
        torch.tensor([0.0, 1.0, 2.0, 0.5]),
        torch.tensor([True, False, True, True]),
        torch.tensor([[0], [1], [2], [0]]),
        torch.tensor([0, 1, 2]),
        [0, 1, 2, 0],
    ],
    ids=["soft", "multi-hot", "regression", "booleans", "columns", "too few", "a list"],
)
def test_labels_that_are_not_one_integer_per_image_are_refused(labels):
    recipe = Recipe(RecipeArguments(cutmix_alpha=1.0))
    with pytest.raises(ConfigurationError, match="one integer per image"):
        with recipe.mixed({**batch(4), "labels": labels}, "pixel_values", step=0, position=0):
            pass


def test_a_batch_without_labels_is_refused_before_anything_is_mixed():
    recipe = Recipe(RecipeArguments(mixup_alpha=0.8))
    with pytest.raises(ConfigurationError, match=r"but the batch has \['pixel_values'\]"):
        with recipe.mixed({"pixel_values": torch.zeros(2, 3, 4, 4)}, "pixel_values", step=0, position=0):
            pass
    assert recipe._share == 1.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"in_shards": True}, "but this backend shards them"),
        (
            {"save_only_model": True, "load_best_model_at_end": True},
            "checkpoints with `save_only_model` do not contain",
        ),
    ],
)
def test_an_average_that_could_not_be_kept_is_refused(changed, message):
    usual = {"in_shards": False, "save_only_model": False, "load_best_model_at_end": False}
    Recipe(RecipeArguments()).check(build("vit"), **{**usual, **changed})
    recipe = Recipe(RecipeArguments(ema_decay=0.9))
    recipe.check(build("vit"), **usual)
    with pytest.raises(ConfigurationError, match=message):
        recipe.check(build("vit"), **{**usual, **changed})


def test_mixing_is_refused_for_models_with_several_labels_per_image():
    model = build("vit")
    model.config.problem_type = "multi_label_classification"
    usual = {"in_shards": False, "save_only_model": False, "load_best_model_at_end": False}
    with pytest.raises(ConfigurationError, match="multi_label_classification"):
        Recipe(RecipeArguments(mixup_alpha=0.2)).check(model, **usual)


def test_the_average_is_saved_resumed_and_given_to_the_model(tmp_path):
    model = build("vit")
    recipe = Recipe(RecipeArguments(ema_decay=0.5))
    recipe.start_average(model, None)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    recipe.average.update()
    recipe.save_average(tmp_path / "checkpoint-1")
    with recipe.averaged():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), first[name] + 0.5)
    resumed = Recipe(RecipeArguments(ema_decay=0.5))
    resumed.start_average(model, str(tmp_path / "checkpoint-1"))
    saved, again = recipe.average.state_dict(), resumed.average.state_dict()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    other = Recipe(RecipeArguments(ema_decay=0.5))
    with pytest.raises(CheckpointError, match="of another model"):
        other.start_average(build("convnext"), str(tmp_path / "checkpoint-1"))


def test_a_plain_trainer_can_follow_the_weights(tmp_path):
    model, recipe = build("vit"), Recipe(RecipeArguments(ema_decay=0.5))
    recipe.start_average(model, None)
    args = TrainingArguments(**options(tmp_path, max_steps=2))
    trainer = Trainer(model, args, train_dataset=examples(8), callbacks=[FollowWeights(lambda: recipe)])
    trainer.train()
    average = recipe.average.state_dict()
    assert all(torch.equal(parameter, average[name]) for name, parameter in model.named_parameters())
