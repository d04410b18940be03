"""Streams resume in the right pass, and examining the training data does not change the run."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from test_trainer_probe import Renamed, renamed_examples
from tiny_models import build, examples
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, default_collate
from training_runs import config, options, same_bits, state_of, with_dropout
from transformers import TrainingArguments

from hf_featreuse import BlockError, CheckpointError, FeatureReuseTrainer, ResumableTrainer, find_residual_blocks
from hf_featreuse.trainer.train_loader import TrainLoader, kept_random_states, resumed_pass, small_batch

ROWS = examples(5)


def rows_of(order: Any) -> Iterator[dict]:
    for i in order:
        yield {"pixel_values": ROWS[i]["pixel_values"], "labels": i % 3, "row": i}


class Fixed(IterableDataset):
    """The same order in each pass."""

    def __iter__(self) -> Iterator[dict]:
        return rows_of(range(5))


class ByEpoch(Fixed):
    """Another order in each pass, which follows from its number."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict]:
        return rows_of(random.Random(self.epoch).sample(range(5), 5))


class ByHistory(Fixed):
    """Another order in each pass, which follows from the passes before."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def __iter__(self) -> Iterator[dict]:
        return rows_of(self.random.sample(range(5), 5))


def of_datasets(shuffled: bool = False, **shuffle: Any) -> Any:
    def generate() -> Iterator[dict]:
        for row in rows_of(range(5)):
            yield {**row, "pixel_values": row["pixel_values"].tolist()}

    stream = datasets.IterableDataset.from_generator(generate).with_format("torch")
    return stream.shuffle(buffer_size=5, **shuffle) if shuffled else stream


STREAMS = {
    "fixed": Fixed,
    "by epoch": ByEpoch,
    "datasets": of_datasets,
    "datasets, shuffled": lambda: of_datasets(True, seed=3),
}


class Seeing(ResumableTrainer):
    """Notes the rows of each micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[int]] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(inputs.pop("row").tolist())
        return super().training_step(model, inputs, *args, **kwargs)


class SeeingReuse(Seeing, FeatureReuseTrainer):
    pass


def run(kind: type, folder: Path, stream: Any, resume: Any = None, **changed: Any) -> Seeing:
    defaults = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 7}
    changed = {**defaults, "remove_unused_columns": False, "report_to": "none", **changed}
    args = config(folder, **changed) if kind is SeeingReuse else TrainingArguments(**options(folder, **changed))
    trainer = kind(build("vit"), args, train_dataset=stream)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("stream", "kind"), [*((name, Seeing) for name in STREAMS), ("datasets, shuffled", SeeingReuse)]
)
def test_a_stream_is_resumed_in_the_pass_it_was_in(stream: str, kind: type, tmp_path: Path) -> None:
    # Passes of three batches: in the middle of the first, at its end, and in the second.
    steps = (1, 3, 5) if stream == "by epoch" else (5,)
    whole = run(kind, tmp_path, STREAMS[stream](), save_steps=1 if len(steps) > 1 else 5)
    assert len(whole.seen) == 7
    for step in steps:
        resumed = run(kind, tmp_path, STREAMS[stream](), f"{tmp_path}/checkpoint-{step}", save_strategy="no")
        assert resumed.seen == whole.seen[step:]
        assert same_bits(state_of(resumed.model), state_of(whole.model))


@pytest.mark.parametrize("changed", [{"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 1}], ids=str)
def test_a_stream_is_resumed_with(changed: dict[str, Any], tmp_path: Path) -> None:
    # Five rows one by one in steps of two: no optimizer step follows the last micro-batch of a pass.
    changed = {**changed, "per_device_train_batch_size": 1, "max_steps": 5, "save_steps": 3}
    whole = run(Seeing, tmp_path, ByEpoch(), **changed)
    resumed = run(Seeing, tmp_path, ByEpoch(), f"{tmp_path}/checkpoint-3", **{**changed, "save_strategy": "no"})
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert same_bits(state_of(resumed.model), state_of(whole.model))


def test_a_stream_is_resumed_at_the_end_of_a_pass(tmp_path: Path) -> None:
    changed = {"eval_strategy": "no", "save_strategy": "epoch"}
    whole = run(Seeing, tmp_path, ByEpoch(), **changed)
    resumed = run(Seeing, tmp_path, ByEpoch(), f"{tmp_path}/checkpoint-3", **{**changed, "save_strategy": "no"})
    assert resumed.seen == whole.seen[3:]
    assert same_bits(state_of(resumed.model), state_of(whole.model))


@pytest.mark.parametrize("stream", [ByHistory, lambda: of_datasets(True)], ids=["by history", "shuffled unseeded"])
def test_a_stream_that_does_not_repeat_itself_is_refused(stream: Any, tmp_path: Path) -> None:
    data = stream()
    seen = run(Seeing, tmp_path, data, max_steps=6, save_steps=5).seen
    other = stream()
    if not isinstance(other, ByHistory):
        while [row["row"] for row in other][:4] == seen[3] + seen[4]:  # By chance.
            other = stream()
    changed = {"save_strategy": "no", "max_steps": 8}
    with pytest.raises(CheckpointError, match=r"labels of the training data.*differ.*`seed` to `shuffle\(\)`"):
        run(Seeing, tmp_path, other, f"{tmp_path}/checkpoint-5", **changed)
    run(Seeing, tmp_path, stream(), f"{tmp_path}/checkpoint-5", ignore_data_skip=True, **changed)


def test_a_stream_that_became_shorter_is_refused(tmp_path: Path) -> None:
    run(Seeing, tmp_path, Fixed(), max_steps=3, save_steps=3)
    short = [row for row, _ in zip(rows_of(range(5)), range(2), strict=False)]

    class Short(IterableDataset):
        def __iter__(self) -> Iterator[dict]:
            return iter(short)

    with pytest.raises(CheckpointError, match="labels of the training data"):
        run(Seeing, tmp_path, Short(), f"{tmp_path}/checkpoint-3", save_strategy="no")


def test_the_pass_of_an_older_checkpoint_follows_from_its_epoch(tmp_path: Path) -> None:
    run(Seeing, tmp_path, Fixed(), max_steps=7, save_steps=5)
    assert resumed_pass(f"{tmp_path}/checkpoint-5", None, accumulation=1) == (1, 2)


class Renaming(FeatureReuseTrainer):
    """Records what it trains on."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen = [*getattr(self, "seen", []), inputs["images"].clone()]
        return super().training_step(model, inputs, *args, **kwargs)


class Given(Renaming):
    """Does not examine the data."""

    def get_residual_blocks(self, model: Any) -> Any:
        return find_residual_blocks(model, {"images": torch.zeros(1, 3, 32, 32)})

    def _probe_inputs(self, model: Any) -> Any:
        return {"images": torch.zeros(1, 3, 32, 32)}


class Augmented(list):
    """Rows with noise of every kind of random number."""

    def __getitem__(self, index: Any) -> Any:
        row = super().__getitem__(index)
        noise = random.random() + np.random.rand() + torch.rand(1).item()
        return {**row, "images": row["images"] + noise}

    __getitems__ = None


def drawing() -> Any:
    model = Renamed()
    with_dropout(model)
    return model


def test_examining_the_data_does_not_change_a_run(tmp_path: Path) -> None:
    runs = []
    for kind in (Renaming, Given):
        args = config(tmp_path, data_seed=3, max_steps=6, per_device_train_batch_size=16)
        trainer = kind(drawing(), args, train_dataset=Augmented(renamed_examples()))
        trainer.train()
        runs.append((torch.stack(trainer.seen), state_of(trainer.model), random.random(), np.random.rand()))
    assert same_bits(runs[0], runs[1])


def test_a_run_that_examines_the_data_resumes_exactly(tmp_path: Path) -> None:
    changed = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4, "per_device_train_batch_size": 32}

    def trainer() -> Renaming:
        return Renaming(drawing(), config(tmp_path, **changed), train_dataset=renamed_examples())

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert same_bits(resumed.seen, whole.seen[3:])
    assert same_bits(state_of(resumed.model), state_of(whole.model))


def test_a_stream_that_can_be_read_once_is_used_completely(tmp_path: Path) -> None:
    class Once(IterableDataset):
        def __init__(self) -> None:
            self.rows = iter(renamed_examples()[:12])

        def __iter__(self) -> Iterator[dict]:
            return self.rows

    trainer = Renaming(Renamed(), config(tmp_path, max_steps=3), train_dataset=Once())
    trainer.train()
    expected = torch.stack([row["images"] for row in renamed_examples()[:12]])
    assert torch.equal(torch.cat(trainer.seen), expected)


def test_the_collator_gets_whole_batches(tmp_path: Path) -> None:
    def collate(rows: list) -> Any:
        assert len(rows) == 4
        return default_collate(rows)

    trainer = FeatureReuseTrainer(
        Renamed(), config(tmp_path, max_steps=2), train_dataset=renamed_examples(), data_collator=collate
    )
    assert trainer.train().global_step == 2


def test_the_users_own_loader_is_examined(tmp_path: Path) -> None:
    class Own(FeatureReuseTrainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(renamed_examples(), batch_size=4)

    trainer = Own(Renamed(), config(tmp_path, max_steps=2))
    assert trainer.train().global_step == 2
    assert len(trainer.get_residual_blocks(trainer.model)) == 4


class Twice:
    """A loader with a length and nothing else."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return 2 * len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain(self.loader, self.loader)


@pytest.mark.parametrize("kind", [ResumableTrainer, FeatureReuseTrainer])
def test_a_loader_needs_no_data_set(kind: type, tmp_path: Path) -> None:
    class Mine(kind):
        shuffles = False

        def get_train_dataloader(self) -> Any:
            rows = DataLoader(self.train_dataset, 4)
            return Twice(super().get_train_dataloader() if self.shuffles else rows)

    changed = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 5}

    def trainer() -> Any:
        args = TrainingArguments(**options(tmp_path, **changed))
        return Mine(build("vit"), args, train_dataset=examples(8))

    whole = trainer()
    assert whole.train().global_step == 8
    resumed = trainer()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-5")
    assert same_bits(state_of(resumed.model), state_of(whole.model))
    # The loader inside cannot get the number of the pass.
    Mine.shuffles = True
    trainer().train()
    with pytest.raises(CheckpointError, match="labels of the training data"):
        trainer().train(resume_from_checkpoint=f"{tmp_path}/checkpoint-5")


def test_an_empty_loader_is_named() -> None:
    with pytest.raises(BlockError, match="has no batch"):
        TrainLoader([]).first_batch()


@pytest.mark.parametrize("resumes", [False, True])
def test_examining_the_data_does_not_change_the_order_of_a_sampler(resumes: bool) -> None:
    def loader() -> DataLoader:
        rows = [{"n": i} for i in range(32)]
        return DataLoader(rows, 4, sampler=RandomSampler(rows, generator=torch.Generator().manual_seed(3)))

    expected = [batch["n"].tolist() for batch in loader()]
    own = loader()
    wrapped = TrainLoader(own)
    assert wrapped.first_batch()["n"].tolist() == expected[0]
    assert wrapped.first_batch()["n"].tolist() == expected[0]
    used = wrapped.for_training(own, resumes=resumes)
    assert (used is own) == resumes
    assert [batch["n"].tolist() for batch in used] == expected


def test_random_states_are_kept() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draws()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with kept_random_states(torch.device("cpu")):
        draws()
    assert draws() == expected


def test_a_model_that_takes_no_single_sample_gets_the_whole_batch() -> None:
    class Pairs(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(0, (-1, 2))

    batch = {"x": torch.rand(4, 3)}
    assert small_batch(Pairs(), batch) is batch
    assert small_batch(torch.nn.Identity(), {"input": torch.rand(4, 3)})["input"].shape == (1, 3)
    assert small_batch(Pairs(), torch.rand(4, 3)).shape == (4, 3)
