"""FeatureReuseTrainer as a drop-in: what it binds to, with every way of handing Trainer a model."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, build, examples
from torch import nn
from training_runs import (
    PlainNet,
    RecordingTrainer,
    StepWatch,
    config,
    losses,
    options,
    plain_net,
    same_bits,
    state_of,
    traces,
    train,
    with_dropout,
)
from transformers import ConvNextConfig, ConvNextForImageClassification, Trainer, TrainerCallback, TrainingArguments

from hf_featreuse import (
    BlockError,
    FeatureReuseSchedule,
    FeatureReuseTrainer,
    ResidualBlock,
    StepError,
    StepKind,
    StepPlan,
    find_residual_blocks,
)


def bound_to(trainer: FeatureReuseTrainer, model: nn.Module) -> bool:
    """Whether every block is a part of this model."""
    modules = {id(module) for module in model.modules()}
    return all(id(block.module) in modules for block in trainer.feature_reuse.blocks)


def names(trainer: FeatureReuseTrainer) -> list[str]:
    return [block.name for block in trainer.feature_reuse.blocks]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class ResidualNet(nn.Module):
    """A residual network that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3 * 32 * 32, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(Residual(8) for _ in range(4))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        stream = self.stem(pixel_values.flatten(1))
        for layer in self.layers:
            stream = layer(stream)
        logits = self.head(stream)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_training_arguments_train_with_the_defaults(architecture: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(**options(tmp_path))
    trainer = train(RecordingTrainer(build(architecture), arguments, train_dataset=examples()))
    blocks = len(trainer.feature_reuse.blocks)
    schedule = FeatureReuseSchedule(blocks, drop_rate=0.5, drop_rate_schedule="linear", seed=42)
    assert [plan for _, plan in trainer.plans] == [schedule.plan(step) for step in range(6)]


def test_model_init_binds_the_blocks_of_the_new_model(tmp_path: Path) -> None:
    made: list[nn.Module] = []

    def model_init() -> nn.Module:
        made.append(build("vit"))
        return made[-1]

    watch = StepWatch()
    watch.trainer = RecordingTrainer(
        model_init=model_init, args=config(tmp_path, max_steps=8), train_dataset=examples(), callbacks=[watch]
    )
    for _ in range(2):
        watch.trainer.train()
        assert watch.trainer.model is made[-1]
        assert bound_to(watch.trainer, made[-1])
        assert not bound_to(watch.trainer, made[-2])
    assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= watch.kinds
    assert watch.trainer.plans[:8] == watch.trainer.plans[8:]
    assert watch.trainer.computed[:8] == watch.trainer.computed[8:]


def test_hyperparameter_search_tries_drop_rates(tmp_path: Path) -> None:
    rates: list[float] = []
    models: list[nn.Module] = []

    class Noting(RecordingTrainer):
        def get_schedule(self, num_blocks: int, max_steps: int) -> FeatureReuseSchedule:
            schedule = super().get_schedule(num_blocks, max_steps)
            rates.append(schedule.drop_rate)
            models.append(self.model)
            return schedule

    trainer = Noting(
        model_init=lambda: build("vit"),
        args=config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2),
        train_dataset=examples(8),
        eval_dataset=examples(8),
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"drop_rate": trial.suggest_float("drop_rate", 0.1, 0.9)},
        n_trials=2,
        backend="optuna",
        direction="minimize",
    )
    assert len(set(rates)) == 2
    assert best.hyperparameters["drop_rate"] in rates
    assert bound_to(trainer, models[1])
    assert not bound_to(trainer, models[0])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_find_batch_size_starts_again_after_running_out_of_memory(architecture: str, tmp_path: Path) -> None:
    class Small(RecordingTrainer):
        failures = 0

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.state.global_step == 1 and not self.failures:
                self.failures += 1
                (loss if isinstance(loss, torch.Tensor) else loss[0]).backward()
                raise RuntimeError("CUDA out of memory.")
            return loss

    model = build(architecture)
    before = traces(model)
    trainer = Small(
        model,
        config(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8),
        train_dataset=examples(),
    )
    assert trainer.train().global_step == 6
    assert trainer.failures == 1
    assert trainer._train_batch_size == 7
    assert [step for step, _ in trainer.plans] == [0, 1, *range(6)]
    assert all(plan == trainer.feature_reuse.schedule.plan(step) for step, plan in trainer.plans)
    assert traces(model) == before


@pytest.mark.parametrize("first", ["train", "evaluate"])
@pytest.mark.parametrize("architecture", ["convnext", "resnet", "swin"])
def test_mixed_precision_finds_the_same_blocks_once_the_model_was_used(
    architecture: str, first: str, tmp_path: Path
) -> None:
    arguments = config(tmp_path, bf16=True, max_steps=2)
    trainer = FeatureReuseTrainer(build(architecture), arguments, train_dataset=examples(8), eval_dataset=examples(4))
    getattr(trainer, first)()
    trainer.train()
    assert names(trainer) == [block.name for block in find_residual_blocks(build(architecture))]


def test_training_again_starts_from_step_zero_on_the_trained_weights(tmp_path: Path) -> None:
    trainer = RecordingTrainer(build("vit"), config(tmp_path), train_dataset=examples())
    trainer.train()
    after_first = state_of(trainer.model)
    trainer.train()
    assert trainer.plans[:6] == trainer.plans[6:]
    assert not same_bits(after_first, state_of(trainer.model))


def lora(**changed: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(build("vit"), LoraConfig(target_modules=["q_proj", "v_proj"], **changed))


def test_only_adapters_of_dropped_blocks_move_in_freeze_steps(tmp_path: Path) -> None:
    model = lora(modules_to_save=["classifier"])
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = traces(model)
    kinds: set[StepKind] = set()

    class Watch(StepWatch):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reuse = self.trainer.feature_reuse
            plan = reuse.schedule.plan(state.global_step - 1)
            dropped = tuple(f"{reuse.blocks[index].name}." for index in plan.dropped)
            after = self.take(**kwargs)
            moved = {name for name in after if not same_bits(self.before[name], after[name])}
            kinds.add(plan.kind)
            assert all("lora_" in name or "modules_to_save" in name for name in moved)
            if plan.kind is StepKind.MASKED_FREEZE:
                assert moved
                assert all(name.startswith(dropped) for name in moved)
            elif plan.kind is StepKind.STOCHASTIC_DEPTH:
                assert moved
                assert not any(name.startswith(dropped) for name in moved)

    watch = Watch()
    arguments = config(tmp_path, max_steps=8, weight_decay=0.1)
    watch.trainer = FeatureReuseTrainer(model, arguments, train_dataset=examples(), callbacks=[watch])
    watch.trainer.train()
    assert len(watch.trainer.feature_reuse.blocks) == 4
    assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= kinds
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert traces(model) == before


def test_blocks_without_an_adapter_belong_to_the_trunk(tmp_path: Path) -> None:
    model = lora(layers_to_transform=[1, 3], modules_to_save=["classifier"])
    trainer = train(FeatureReuseTrainer(model, config(tmp_path), train_dataset=examples()))
    assert [name[-8:] for name in names(trainer)] == ["layers.1", "layers.3"]


def test_dropping_every_block_above_a_frozen_trunk_does_not_end_the_run(tmp_path: Path) -> None:
    trainer = FeatureReuseTrainer(lora(), config(tmp_path, drop_rate=0.99), train_dataset=examples())
    assert trainer.train().global_step == 6


@pytest.mark.parametrize(
    "given",
    [
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": True},
        {"dataloader_num_workers": 1},
    ],
    ids=["label-smoothing", "compute-loss-func", "workers"],
)
def test_an_option_of_trainer_does_what_it_does_in_the_stock_trainer(given: dict[str, Any], tmp_path: Path) -> None:
    def loss_of(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs["logits"], labels, weight=torch.tensor([1.0, 2.0, 3.0]))

    extra = {"compute_loss_func": loss_of} if "compute_loss_func" in given else {}
    changed = {} if extra else given

    def run(cls: type[Trainer], **more: Any) -> Trainer:
        # Every step of a stochastic-depth run whose window is over at once is vanilla.
        arguments = (
            TrainingArguments(**options(tmp_path, **changed))
            if cls is Trainer
            else config(tmp_path, **changed, **more)
        )
        return train(cls(with_dropout(build("vit")), arguments, train_dataset=examples(), **extra))

    stock, never = run(Trainer), run(RecordingTrainer, reuse_start=0.99)
    assert losses(stock) == losses(never)
    assert same_bits(state_of(stock.model), state_of(never.model))
    active = run(RecordingTrainer)
    assert {plan.kind for _, plan in active.plans} >= {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE}
    assert not same_bits(state_of(active.model), state_of(never.model))


def test_callbacks_are_called_as_in_the_stock_trainer(tmp_path: Path) -> None:
    def events(cls: type[Trainer], arguments: TrainingArguments) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []

        class Noting(TrainerCallback):
            def __getattribute__(self, name: str) -> Any:
                if not name.startswith("on_"):
                    return super().__getattribute__(name)
                return lambda args, state, control, **kwargs: seen.append((name, state.global_step))

        train(cls(build("vit"), arguments, train_dataset=examples(), callbacks=[Noting()]))
        return seen

    stock = events(Trainer, TrainingArguments(**options(tmp_path, gradient_accumulation_steps=2)))
    assert events(FeatureReuseTrainer, config(tmp_path, gradient_accumulation_steps=2)) == stock
    assert ("on_step_end", 6) in stock


def test_a_model_that_is_not_of_transformers_is_probed_with_its_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ResidualNet()
    before = traces(model)

    class Watch(StepWatch):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reuse = self.trainer.feature_reuse
            plan = reuse.schedule.plan(state.global_step - 1)
            after = self.take(**kwargs)
            moved = {name for name in after if not same_bits(self.before[name], after[name])}
            dropped = tuple(f"layers.{index}." for index in plan.dropped)
            self.kinds.add(plan.kind)
            if plan.kind is StepKind.MASKED_FREEZE:
                assert moved and all(name.startswith(dropped) for name in moved)

    watch = Watch()
    watch.trainer = FeatureReuseTrainer(
        model, config(tmp_path, max_steps=8), train_dataset=examples(), callbacks=[watch]
    )
    watch.trainer.train()
    assert names(watch.trainer) == [f"layers.{index}" for index in range(4)]
    assert StepKind.MASKED_FREEZE in watch.kinds
    assert traces(model) == before


def test_a_model_that_is_not_of_transformers_trains_on_a_stream(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            yield from examples()

    assert FeatureReuseTrainer(ResidualNet(), config(tmp_path), train_dataset=Stream()).train().global_step == 6


class SteppingTrainer(FeatureReuseTrainer):
    """Counts the micro-batches that were begun."""

    begun = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.begun += 1
        return super().compute_loss(*args, **kwargs)


def assert_refused(trainer: SteppingTrainer, match: str) -> None:
    before, weights = traces(trainer.model), state_of(trainer.model)
    with pytest.raises(BlockError, match=match):
        trainer.train()
    assert trainer.begun == 0
    assert traces(trainer.model) == before
    assert same_bits(state_of(trainer.model), weights)


def test_blocks_of_another_model_are_refused_before_any_step(tmp_path: Path) -> None:
    class Stale(SteppingTrainer):
        def get_residual_blocks(self, model: nn.Module) -> list[ResidualBlock]:
            return find_residual_blocks(build("vit"))

    assert_refused(Stale(build("vit"), config(tmp_path), train_dataset=examples()), "not a part of this ViT")


def test_a_model_without_residual_blocks_is_refused_and_told_the_way_out(tmp_path: Path) -> None:
    trainer = SteppingTrainer(plain_net(), config(tmp_path), train_dataset=examples())
    assert isinstance(trainer.model, PlainNet)
    assert_refused(trainer, r"no residual block.*`stochastic_depth_steps=0` and `masked_freeze_steps=0`")


def test_a_target_that_matches_nothing_is_refused_with_the_candidates(tmp_path: Path) -> None:
    arguments = config(tmp_path, target_blocks=["layers.9"])
    trainer = SteppingTrainer(build("vit"), arguments, train_dataset=examples())
    assert_refused(trainer, r"layers\.9.*Candidates: vit\.layers\.0")


def test_a_model_whose_blocks_were_all_frozen_is_refused(tmp_path: Path) -> None:
    model = build("vit")
    model.vit.layers.requires_grad_(False)
    trainer = SteppingTrainer(model, config(tmp_path), train_dataset=examples())
    assert_refused(trainer, "None of the 4 residual blocks .* requires gradients")


def test_a_block_that_was_frozen_never_thaws(tmp_path: Path) -> None:
    model = build("vit")
    model.vit.layers[1].requires_grad_(False)
    model.vit.embeddings.requires_grad_(False)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = train(FeatureReuseTrainer(model, config(tmp_path, max_steps=8), train_dataset=examples()))
    assert names(trainer) == ["vit.layers.0", "vit.layers.2", "vit.layers.3"]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(frozen)


@pytest.mark.parametrize("target", [r"vit\.layers\.[02]", ["layers.0", "vit.layers.2"]])
def test_target_blocks_choose_the_blocks(target: str | list[str], tmp_path: Path) -> None:
    arguments = config(tmp_path, target_blocks=target)
    trainer = train(RecordingTrainer(build("vit"), arguments, train_dataset=examples()))
    assert names(trainer) == ["vit.layers.0", "vit.layers.2"]


def test_the_schedule_can_be_overridden(tmp_path: Path) -> None:
    class Own(RecordingTrainer):
        def get_schedule(self, num_blocks: int, max_steps: int) -> FeatureReuseSchedule:
            assert (num_blocks, max_steps) == (4, 6)
            return FeatureReuseSchedule(
                num_blocks, drop_rate=0.9, seed=3, first_step=max_steps // 2, stochastic_depth_steps=1
            )

    trainer = train(Own(build("vit"), config(tmp_path), train_dataset=examples()))
    expected = FeatureReuseSchedule(4, drop_rate=0.9, seed=3, first_step=3, stochastic_depth_steps=1)
    assert [plan for _, plan in trainer.plans] == [expected.plan(step) for step in range(6)]
    assert {plan.kind for _, plan in trainer.plans[:3]} == {StepKind.VANILLA}
    assert {plan.kind for _, plan in trainer.plans[3:]} >= {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE}


def test_the_schedule_must_be_for_the_blocks_there_are(tmp_path: Path) -> None:
    class Own(SteppingTrainer):
        def get_schedule(self, num_blocks: int, max_steps: int) -> FeatureReuseSchedule:
            return FeatureReuseSchedule(num_blocks + 1)

    assert_refused(Own(build("vit"), config(tmp_path), train_dataset=examples()), "The schedule is for 5 blocks")


@pytest.mark.parametrize(("rate", "said"), [(0.3, True), (0.0, False)])
def test_drop_path_of_the_architecture_is_reported_once(tmp_path: Path, caplog: Any, rate: float, said: bool) -> None:
    from hf_featreuse.trainer import trainer as module

    settings = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[2, 2], drop_path_rate=rate, num_labels=3)
    module.logger.warning_once.cache_clear()
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    module.logger.addHandler(handler)
    try:
        for _ in range(2):
            model = ConvNextForImageClassification(settings)
            FeatureReuseTrainer(model, config(tmp_path, max_steps=1), train_dataset=examples()).train()
    finally:
        module.logger.removeHandler(handler)
    warnings = [text for text in records if "has its own drop path" in text]
    assert len(warnings) == said
    assert all("drop_path_rate=0" in text and "0.3" in text for text in warnings)


@pytest.mark.parametrize("steps", ["stochastic_depth_steps", "masked_freeze_steps"])
def test_a_callback_that_freezes_what_a_step_trains_ends_in_our_message(steps: str, tmp_path: Path) -> None:
    class Freezes(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                model.requires_grad_(False)

    args = config(tmp_path, **{steps: 0}, max_steps=8)
    trainer = FeatureReuseTrainer(build("vit"), args, train_dataset=examples(), callbacks=[Freezes()])
    with pytest.raises(StepError, match=r"Nothing is left to train in this .* step.*a callback"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("survival", [None, (0.5,) * 4])
def test_the_card_of_your_own_schedule_says_whether_kept_blocks_were_scaled(survival: Any, tmp_path: Path) -> None:
    class Own(FeatureReuseSchedule):
        def plan(self, global_step: int, **_: Any) -> StepPlan:
            return StepPlan(StepKind.STOCHASTIC_DEPTH, (1,), None, survival)

    class Owns(FeatureReuseTrainer):
        def get_schedule(self, num_blocks: int, max_steps: int) -> FeatureReuseSchedule:
            return Own(num_blocks)

    trainer = Owns(build("vit"), config(tmp_path, max_steps=1), train_dataset=examples(8))
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert ("is not scaled" in card) == (survival is None)
    assert ("is divided by the probability" in card) == (survival is not None)
