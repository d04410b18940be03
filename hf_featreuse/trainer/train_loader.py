"""A training loader whose first batch can be examined, and which resumes a stream in the right pass."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.utils import find_batch_size, recursively_apply
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from hf_featreuse.errors import BlockError, CheckpointError
from hf_featreuse.method.dummy_forward import model_inputs, undisturbed

logger = logging.get_logger(__name__)


class TrainLoader(DataLoader):
    """A wrapper around any training loader, for one run.

    Args:
        loader: any iterable of batches, one pass per iteration, prepared by accelerate or not.
        first_pass (`int`, defaults to 0): number of the pass that is iterated first.
    """

    def __init__(self, loader: Any, first_pass: int = 0) -> None:
        self.batches = _Batches(loader, first_pass)
        # Its own generator: a loader draws a seed for its workers at each iteration, and this one has no workers.
        super().__init__(self.batches, batch_size=None, collate_fn=_unchanged, generator=torch.Generator())

    def first_batch(self) -> Any:
        """Return the first batch of the first pass, which the next iteration repeats; keep the random states."""
        return self.batches.look()

    def for_training(self, prepared: Any, *, resumes: bool) -> Any:
        """Return the loader to train with: the prepared one, or this wrapper if it is needed.

        Args:
            prepared: the loader to train with if the wrapper is not needed.
            resumes (`bool`): whether the first pass is resumed.
        """
        loader = self.batches.loader
        by_row = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if by_row and (resumes or not self.batches.was_looked_at):
            # This way rows before the checkpoint are not read again.
            self.batches.forget()
            return prepared
        return self

    def position(self, batch_size: int) -> dict[str, int]:
        """Return the position for a checkpoint: the pass, its batches so far, their size and a digest of labels."""
        batches = self.batches
        taken = {"pass": batches.epoch, "batches": batches.taken, "batch_size": batch_size}
        return {**taken, "labels": int(batches.labels)}

    def expect(self, position: Mapping[str, int], batch_size: int) -> None:
        """Raise `CheckpointError` after the batches before the checkpoint if their labels are not those recorded."""
        batches = self.batches
        if position["pass"] == batches.epoch and position["batches"] and position["batch_size"] == batch_size:
            batches.expected = position


class _Batches(IterableDataset):
    """The batches of a loader, pass by pass."""

    def __init__(self, loader: Any, epoch: int) -> None:
        self.loader, self.epoch = loader, epoch
        self.taken, self.labels = 0, torch.tensor(0)
        self.was_looked_at = False
        self.expected: Mapping[str, int] | None = None
        self._begun: tuple[Any, Iterator[Any]] | None = None
        self._random_states: tuple[Any, Any] | None = None
        self._generators: list[tuple[torch.Generator, torch.Tensor]] = []

    def set_epoch(self, epoch: int) -> None:
        """Pass the number of the pass to the loader, its sampler and its data set, as Trainer does."""
        if self._begun is not None and epoch == self.epoch:  # This pass has begun.
            return
        self.epoch = epoch
        sampler = getattr(getattr(self.loader, "batch_sampler", None), "batch_sampler", None)
        for part in (self.loader, sampler, getattr(self.loader, "dataset", None)):
            if callable(tell := getattr(part, "set_epoch", None)):
                tell(epoch)

    def look(self) -> Any:
        if self._begun is None:
            self.set_epoch(self.epoch)
            before = _random_states()
            self._generators = [(generator, generator.get_state()) for generator in _generators(self.loader)]
            try:
                iterator = iter(self.loader)
                try:
                    first = next(iterator)
                except StopIteration:
                    raise BlockError("The training loader has no batch. Pass data to train on.") from None
                self._random_states = before, _random_states()
            finally:
                _set_random_states(before)
            self._begun, self.was_looked_at = (first, iterator), True
        return self._begun[0]

    def forget(self) -> None:
        """Discard the pass that was begun for its first batch, and restore the generators of its order."""
        if self._begun is not None:
            self._begun = None
            for generator, state in self._generators:
                generator.set_state(state)
            if isinstance(self.loader, DataLoaderStateMixin):
                self.loader.end()

    def __iter__(self) -> Iterator[Any]:
        begun, self._begun = self._begun, None
        if begun is None:
            batches = iter(self.loader)
        else:
            batches = itertools.chain([begun[0]], begun[1])
            assert self._random_states is not None
            # Training draws what it would have drawn if the pass had begun here.
            if (states := self._random_states)[0] == _random_states():
                _set_random_states(states[1])
        self.taken, self.labels = 0, torch.tensor(0)
        for batch in batches:
            self.taken, self.labels = self.taken + 1, _with_labels(self.labels, batch)
            self._compare()
            yield batch
        if self.expected is not None:
            self._refuse()

    def _compare(self) -> None:
        expected = self.expected
        if expected is not None and self.taken >= expected["batches"]:
            self.expected = None
            if int(self.labels) != expected["labels"]:
                self._refuse()

    def _refuse(self) -> None:
        raise CheckpointError(
            "The labels of the training data up to the step of the checkpoint differ from those when it was written, "
            "so resuming would train on other data than the uninterrupted run. A stream, or your own loader, must "
            "return the same data in each pass or take the number of the pass from `set_epoch`: pass a `seed` to "
            "`shuffle()`, or a data set with rows. `ignore_data_skip=True` resumes at the start of the data instead."
        )


def small_batch(model: nn.Module, batch: Any) -> Any:
    """Return the first sample of a batch, or the whole batch if the model does not run on one sample."""
    size = find_batch_size(batch) if isinstance(batch, Mapping) else None
    if size is None:
        return batch
    one = recursively_apply(lambda tensor: tensor[:1] if tensor.ndim and len(tensor) == size else tensor, batch)
    try:
        args, kwargs = model_inputs(model, one)
        with undisturbed(model), torch.no_grad():
            model(*args, **kwargs)
    except Exception:
        return batch
    return one


def resumed_pass(checkpoint: str, record: Mapping[str, Any] | None, accumulation: int) -> tuple[int, int]:
    """Return the pass of a stream in which training resumes, and the number of batches to skip in it.

    Args:
        checkpoint (`str`): the folder.
        record (`dict`, *optional*): what [`ResumableTrainer`] recorded there.
        accumulation (`int`): micro-batches per optimizer step.
    """
    if record is not None and (position := record.get("stream")) is not None:
        passes, batches = position["pass"], position["batches"]
        if record["at_epoch_end"]:
            if batches % accumulation:
                logger.warning(
                    f"The last {batches % accumulation} batches of a pass were not followed by an optimizer step "
                    "before the checkpoint, which does not hold their gradients, so the next step lacks them."
                )
            return passes + 1, 0
    else:  # For a stream, Trainer's `epoch` is the pass plus the share of all steps of the run taken in it.
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        passes = int(state.epoch or 0)
        batches = round(((state.epoch or 0) - passes) * state.max_steps * accumulation)
    return passes, batches - batches % accumulation


@contextlib.contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch at the end."""
    states = _random_states()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            _set_random_states(states)


def _random_states() -> tuple[Any, bytes, bytes]:
    """Return the random states of Python, NumPy and torch in a form that can be compared."""
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().numpy().tobytes()


def _set_random_states(states: tuple[Any, bytes, bytes]) -> None:
    random.setstate(states[0])
    np.random.set_state(pickle.loads(states[1]))
    torch.set_rng_state(torch.frombuffer(bytearray(states[2]), dtype=torch.uint8))


def _generators(part: Any) -> list[torch.Generator]:
    """Return the generators that draw the order of a loader or sampler."""
    held = getattr(part, "__dict__", {})
    inside = [held[name] for name in ("base_dataloader", "sampler", "batch_sampler") if name in held]
    own = [value for value in held.values() if isinstance(value, torch.Generator)]
    return own + [generator for part in inside for generator in _generators(part)]


def _with_labels(digest: torch.Tensor, batch: Any) -> torch.Tensor:
    """Update a digest with the integers of a batch, one per sample, without waiting for the device."""
    for tensor in batch.values() if isinstance(batch, Mapping) else ():
        if isinstance(tensor, torch.Tensor) and tensor.ndim == 1 and not tensor.is_floating_point():
            weights = torch.arange(1, len(tensor) + 1, device=tensor.device)
            digest = digest.to(tensor.device) * 1_000_003 + (tensor.long() * weights).sum()
    return digest


def _unchanged(batch: Any) -> Any:
    return batch
