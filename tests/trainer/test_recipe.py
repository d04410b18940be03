"""Mixup, CutMix, label smoothing and the average of the weights inside the Trainer: right losses, exact resume."""

import pytest
import safetensors.torch
import torch
from tiny_models import build, examples
from torch.nn.functional import cross_entropy, one_hot
from training_runs import PlainNet, RecordingTrainer, config, losses, options, same_bits, state_of, train, with_dropout
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_featreuse import BatchMixer, ConfigurationError, FeatureReuseTrainer
from hf_featreuse.data.metrics import build_compute_metrics
from hf_featreuse.recipe.weight_average import AVERAGE_FILE

MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
PLAIN = {"stochastic_depth_steps": 0, "masked_freeze_steps": 0}


class SeesBatches(FeatureReuseTrainer):
    """Keeps, for each micro-batch, labels, what the model was given and its logits."""

    seen: list

    def compute_loss(self, model, inputs, *args, **kwargs):
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        given = {}
        handle = self.model.register_forward_hook(
            lambda _, __, named, outputs: given.update(named, outputs=outputs), with_kwargs=True
        )
        result = super().compute_loss(model, inputs, *args, **kwargs)
        handle.remove()
        self.seen.append((model.training, before, given, result[0] if isinstance(result, tuple) else result))
        return result


def seen(tmp_path, **changed):
    trainer = SeesBatches(
        build("vit"), config(tmp_path, **changed), train_dataset=examples(), eval_dataset=examples(8)
    )
    trainer.seen = []
    trainer.train()
    return trainer


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_each_step_trains_on_a_mixture_against_soft_labels(tmp_path, smoothing):
    trainer = seen(tmp_path, **MIXED, label_smoothing_factor=smoothing, gradient_accumulation_steps=2, max_steps=3)
    mixer, shares = BatchMixer(0.8, 1.0, trainer.args.seed), set()
    for index, (training, inputs, given, loss) in enumerate(trainer.seen):
        mixed, share = mixer(inputs["pixel_values"], index // 2, index % 2)
        shares.add(share)
        assert training
        assert torch.equal(given["pixel_values"], mixed)
        assert "labels" not in given, "the model would take soft labels for several labels per image"
        labels = inputs["labels"]
        soft = share * one_hot(labels, 3) + (1 - share) * one_hot(labels.roll(1), 3)
        logits = given["outputs"].logits
        # Trainer sums over the images of the whole optimizer step.
        torch.testing.assert_close(loss, cross_entropy(logits, soft.float(), label_smoothing=smoothing) / 2)
    assert len(shares) == 6


def test_evaluation_is_neither_mixed_nor_changed(tmp_path):
    trainer = seen(tmp_path, **MIXED)
    trainer.seen.clear()
    metrics = trainer.evaluate()
    for training, inputs, given, _ in trainer.seen:
        assert not training
        assert torch.equal(given["pixel_values"], inputs["pixel_values"])
    plain = Trainer(trainer.model, TrainingArguments(**options(tmp_path)), eval_dataset=examples(8)).evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


def test_label_smoothing_without_mixing_is_torchs(tmp_path):
    trainer = seen(tmp_path, label_smoothing_factor=0.1)
    for _, inputs, given, loss in trainer.seen:
        torch.testing.assert_close(loss, cross_entropy(given["outputs"].logits, inputs["labels"], label_smoothing=0.1))


def test_a_loss_function_of_the_user_is_called_with_both_labels(tmp_path):
    called = []

    def loss(outputs, labels, num_items_in_batch=None):
        called.append(labels)
        return cross_entropy(outputs.logits, labels)

    trainer = FeatureReuseTrainer(
        build("vit"), config(tmp_path, **MIXED, max_steps=1), train_dataset=examples(), compute_loss_func=loss
    )
    trainer.train()
    first, second = called
    assert torch.equal(first.roll(1), second)


def test_a_compute_loss_that_would_not_mix_is_refused(tmp_path):
    class Own(FeatureReuseTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    with pytest.raises(ConfigurationError, match=r"Own\.compute_loss.*compute_loss_func"):
        Own(build("vit"), config(tmp_path, **MIXED), train_dataset=examples()).train()
    Own(build("vit"), config(tmp_path, max_steps=1), train_dataset=examples()).train()


def test_a_model_of_several_labels_an_image_is_refused(tmp_path):
    model = build("vit")
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ConfigurationError, match="multi_label_classification"):
        FeatureReuseTrainer(model, config(tmp_path, mixup_alpha=0.2), train_dataset=examples())


def test_sets_by_sample_and_plain_arguments_go_with_it(tmp_path):
    trainer = seen(tmp_path, **MIXED, drop_granularity="sample", max_steps=4)
    assert len(losses(trainer)) == 4
    plain = FeatureReuseTrainer(build("vit"), TrainingArguments(**options(tmp_path)), train_dataset=examples())
    assert len(losses(train(plain))) == 6


class OtherNames(PlainNet):
    """Takes its images under another name than the models of transformers."""

    def forward(self, image=None, labels=None, pixel_values=None):
        return super().forward(image if pixel_values is None else pixel_values, labels)


def test_batches_whose_images_or_labels_go_by_other_names_are_refused(tmp_path):
    renamed = [{"image": example["pixel_values"], "labels": example["labels"]} for example in examples()]
    options = config(tmp_path, **PLAIN, mixup_alpha=0.5, remove_unused_columns=False, max_steps=1)
    model = OtherNames()
    with pytest.raises(ConfigurationError, match=r"`pixel_values`.*`main_input_name`.*\['image', 'labels'\]"):
        FeatureReuseTrainer(model, options, train_dataset=renamed).train()
    model.main_input_name = "image"
    train(FeatureReuseTrainer(model, options, train_dataset=renamed))
    unlabeled = [{"image": example["image"], "target": example["labels"]} for example in renamed]
    with pytest.raises(ConfigurationError, match=r"`labels`.*\['image', 'target'\]"):
        FeatureReuseTrainer(model, options, train_dataset=unlabeled).train()


@pytest.mark.slow
def test_options_that_a_search_changes_between_runs_are_taken_up(tmp_path):
    pytest.importorskip("optuna")
    seen = []

    class Sees(FeatureReuseTrainer):
        def evaluate(self, *args, **kwargs):
            expected = watches[-1].expected if self.recipe.options.ema_decay else None
            found = None if self.weight_average is None else self.weight_average.state_dict()
            if expected is not None:
                for name, tensor in found.items():
                    torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
            alpha = self.recipe.mixer and self.recipe.mixer.mixup_alpha
            seen.append((found is None, alpha, self.compute_loss_func is own))
            return super().evaluate(*args, **kwargs)

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            watches.append(Averages(model, args.ema_decay or 0.5))

        def on_step_end(self, *args, **kwargs):
            watches[-1].on_step_end(*args, **kwargs)

    def own(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs.logits, labels)

    watches, trials = [], iter([(None, 0.0), (0.5, 0.7), (0.6, 0.0)])
    trainer = Sees(
        model_init=lambda: build("vit"), args=config(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=2),
        train_dataset=examples(8), eval_dataset=examples(8), compute_loss_func=own, callbacks=[Watch()],
    )  # fmt: skip

    def space(trial):
        return dict(zip(("ema_decay", "mixup_alpha"), next(trials), strict=True))

    trainer.hyperparameter_search(space, n_trials=3, direction="minimize", backend="optuna")
    assert seen == [(True, None, True), (False, 0.7, False), (False, None, True)]
    several = build("vit")
    several.config.problem_type = "multi_label_classification"
    trainer.model_init, trainer.args.mixup_alpha = lambda: several, 0.2
    with pytest.raises(ConfigurationError, match="multi_label_classification"):
        trainer.train()


# The average of the weights


class Averages(TrainerCallback):
    """What the average must be, step by step, by an independent formula."""

    def __init__(self, model, decay):
        self.decay, self.expected = decay, {name: p.detach().double() for name, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model, **kwargs):
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, parameter in model.named_parameters():
            self.expected[name] = decay * self.expected[name] + (1 - decay) * parameter.detach().double()


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_training_is_unchanged_and_the_average_is_evaluated_and_kept(tmp_path, architecture):
    changed = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    raw = train(
        FeatureReuseTrainer(build(architecture), config(tmp_path / "raw", **changed, max_steps=6),
                            train_dataset=examples(), eval_dataset=examples(8))
    )  # fmt: skip
    model = build(architecture)
    watch = Averages(model, 0.3)  # Reached by the warm-up after two of the six steps.
    args = config(tmp_path / "ema", **changed, ema_decay=0.3)
    trainer = FeatureReuseTrainer(model, args, train_dataset=examples(), eval_dataset=examples(8), callbacks=[watch])
    trainer.train()
    assert losses(trainer) == losses(raw)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), watch.expected[name], rtol=1e-5, atol=1e-6)
    # The last evaluation, in training, was that of the model that is left now.
    in_training = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == in_training[-1]
    assert in_training != [entry["eval_loss"] for entry in raw.state.log_history if "eval_loss" in entry]
    for step in (3, 6):
        checkpoints = [tmp_path / run / f"checkpoint-{step}" for run in ("raw", "ema")]
        first, second = (safetensors.torch.load_file(folder / "model.safetensors") for folder in checkpoints)
        assert same_bits(first, second), "checkpoints hold the weights that train"
    average = safetensors.torch.load_file(tmp_path / "ema" / "checkpoint-6" / AVERAGE_FILE)
    assert same_bits(average, {name: tensor for name, tensor in state_of(trainer.model).items() if name in average})
    trainer.save_model(str(tmp_path / "final"))
    loaded = type(model).from_pretrained(tmp_path / "final")
    assert same_bits(state_of(loaded), state_of(trainer.model))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_resume_is_exact_with_everything_on(tmp_path, architecture):
    def run(folder, checkpoint=None):
        args = config(
            folder, **MIXED, ema_decay=0.7, label_smoothing_factor=0.1, gradient_accumulation_steps=2, max_steps=10,
            eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=1,
        )  # fmt: skip
        trainer = FeatureReuseTrainer(
            with_dropout(build(architecture)), args, train_dataset=examples(), eval_dataset=examples(8)
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        history = [
            {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}
            for entry in trainer.state.log_history
        ]
        return state_of(trainer.model), trainer.weight_average.state_dict(), history

    whole = run(tmp_path / "whole")
    for step in (3, 8, 10):  # In the first epoch, at its end, and at the end of the run.
        assert same_bits(run(tmp_path / str(step), str(tmp_path / "whole" / f"checkpoint-{step}")), whole), step


def test_the_best_model_has_the_average_that_was_best(tmp_path):
    args = config(
        tmp_path, ema_decay=0.5, learning_rate=1.0, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", max_steps=3,
    )  # fmt: skip
    trainer = train(FeatureReuseTrainer(build("vit"), args, train_dataset=examples(), eval_dataset=examples(8)))
    assert trainer.state.best_model_checkpoint.endswith("-1"), "at this learning rate it only gets worse"
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_the_best_model_of_a_checkpoint_without_an_average_is_kept(tmp_path, caplog):
    best = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    data = {"train_dataset": examples(8), "eval_dataset": examples(8)}
    train(FeatureReuseTrainer(build("vit"), config(tmp_path, max_steps=2, **best), **data))
    # With wrong labels it only gets worse.
    data["train_dataset"] = [{**example, "labels": (example["labels"] + 1) % 3} for example in examples(8)]
    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path, max_steps=12, ema_decay=0.5, **best), **data)
    with caplog.at_level("WARNING", logger="hf_featreuse"):
        trainer.train(resume_from_checkpoint=True)
    assert f"has no {AVERAGE_FILE}: it was written without" in caplog.text
    assert trainer.state.best_model_checkpoint.endswith("-2")
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_after_an_interruption_what_is_evaluated_is_what_is_saved(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = FeatureReuseTrainer(
        build("vit"), config(tmp_path, ema_decay=0.9), train_dataset=examples(), eval_dataset=examples(8),
        callbacks=[Stop()],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.save_model()
    saved = type(trainer.model).from_pretrained(tmp_path)
    plain = Trainer(saved, TrainingArguments(**options(tmp_path)), eval_dataset=examples(8)).evaluate()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


def test_a_checkpoint_without_an_average_starts_it_there(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 3}
    train(FeatureReuseTrainer(build("vit"), config(tmp_path, **saved), train_dataset=examples()))
    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path, ema_decay=0.5, max_steps=6), train_dataset=examples())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    start = FeatureReuseTrainer(build("vit"), config(tmp_path), train_dataset=examples())
    start._load_from_checkpoint(str(tmp_path / "checkpoint-6"))
    assert same_bits(state_of(trainer.model), state_of(start.model))


def test_a_cut_average_is_no_whole_checkpoint(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "ema_decay": 0.5}
    train(FeatureReuseTrainer(build("vit"), config(tmp_path, **saved), train_dataset=examples()))
    (tmp_path / "checkpoint-6" / AVERAGE_FILE).unlink()
    trainer = RecordingTrainer(build("vit"), config(tmp_path, **saved), train_dataset=examples())
    trainer.train(resume_from_checkpoint=True)
    assert [step for step, _ in trainer.plans] == [4, 5], "the checkpoint of step 4 is the last whole one"


def test_what_checkpoints_of_weights_alone_cannot_do_is_refused(tmp_path):
    changed = {
        "save_only_model": True,
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
    }
    with pytest.raises(ConfigurationError, match="save_only_model"):
        FeatureReuseTrainer(build("vit"), config(tmp_path, ema_decay=0.9, **changed), eval_dataset=examples(8))


def test_plain_training_of_any_model_can_use_both(tmp_path):
    torch.manual_seed(0)
    args = config(tmp_path, **PLAIN, **MIXED, ema_decay=0.9, eval_strategy="epoch")
    trainer = FeatureReuseTrainer(
        PlainNet(), args, train_dataset=examples(), eval_dataset=examples(8), compute_metrics=build_compute_metrics()
    )
    assert len(losses(train(trainer))) == 6
