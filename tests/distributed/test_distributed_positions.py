"""Positions of samples, from which each draws its own set, with every way in which accelerate deals out batches."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import arguments, run_on_ranks
from tiny_models import build, examples
from torch.utils.data import IterableDataset, SequentialSampler

from hf_featreuse import FeatureReuseTrainer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROWS, BATCH = 14, 4


class Recording(FeatureReuseTrainer):
    """Notes step, position and rows of each micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noted: list[tuple[int, int, list[int]]] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.rows = inputs.pop("row").tolist()
        return super().training_step(model, inputs, *args, **kwargs)

    def _samples(self, inputs: Any) -> dict[str, int]:
        samples = super()._samples(inputs)
        assert samples["batch_size"] == len(self.rows)
        self.noted.append((self.state.global_step, samples["position"], self.rows))
        return samples


class Stream(IterableDataset):
    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def positions(folder: Path, *, stream: bool = False, accumulation: int = 1, **how: bool) -> Any:
    rows = [{**example, "row": i} for i, example in enumerate(examples(ROWS))]
    args = arguments(
        folder,
        drop_granularity="sample",
        train_trunk="all",  # So that the only sample of a rank trains something, even with an empty set.
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulation,
        remove_unused_columns=False,
        accelerator_config={"even_batches": True, **how},
        max_steps=4 if how.get("split_batches") else 2,
        eval_strategy="no",
    )
    trainer = Recording(build("vit"), args, train_dataset=Stream(rows) if stream else rows)
    trainer.train()
    return trainer.noted


SPLIT, DISPATCH = {"split_batches": True}, {"dispatch_batches": True}
SCENARIOS = {
    "plain": partial(positions, dispatch_batches=False),
    "split": partial(positions, **SPLIT, dispatch_batches=False),
    "dispatched": partial(positions, **DISPATCH),
    "dispatched and split": partial(positions, **DISPATCH, **SPLIT),
    "stream": partial(positions, stream=True),
    "stream, not dispatched": partial(positions, stream=True, dispatch_batches=False),
    "split, accumulation": partial(positions, **SPLIT, dispatch_batches=False, accumulation=2),
    "dispatched, accumulation": partial(positions, **DISPATCH, accumulation=2),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_on_ranks(SCENARIOS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_position_of_a_sample_is_its_place_in_the_global_batch(name: str, results: dict[str, list[Any]]) -> None:
    in_a_micro_batch = BATCH if "split" in name else 2 * BATCH
    of_a_step = in_a_micro_batch * (2 if "accumulation" in name else 1)
    assert all(isinstance(noted, list) and noted for noted in results[name]), results[name]
    places: dict[int, list[int]] = {}
    for noted in results[name]:
        for step, position, rows in noted:
            for index, row in enumerate(rows):
                places.setdefault(step, []).append(position + index)
                # A last batch that is not whole is filled up with rows from the start.
                if step * of_a_step < ROWS and row >= step * of_a_step:
                    assert row == step * of_a_step + position + index
    assert all(len(set(found)) == len(found) for found in places.values()), "each place once"
    assert sorted(row for noted in results[name] for step, _, rows in noted for row in rows if step == 0) == list(
        range(min(of_a_step, ROWS))
    )
