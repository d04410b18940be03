"""Analyze a trained model, batch by batch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from hf_featreuse.analysis.dropping import AccuracyCounter, Dropped, DropSets
from hf_featreuse.analysis.features import FeatureMeter
from hf_featreuse.analysis.results import BlockAnalysis, ModelAnalysis
from hf_featreuse.analysis.similarity import SMALLEST_BATCH
from hf_featreuse.errors import BlockError, ConfigurationError, DataError
from hf_featreuse.method.blocks import ResidualBlock, find_residual_blocks
from hf_featreuse.method.dummy_forward import model_inputs, undisturbed
from hf_featreuse.method.skipping import skip_blocks
from hf_featreuse.text import printable

Batch = Mapping[str, Any]


def analyze_model(
    model: nn.Module,
    batches: Iterable[Batch],
    blocks: Sequence[ResidualBlock] | None = None,
    *,
    random_draws: int = 10,
    seed: int = 0,
    allow_inexact_skip: bool = False,
    name: str | None = None,
    disable_tqdm: bool | None = None,
) -> ModelAnalysis:
    """Measure what each residual block of a trained model does, and the accuracy without some of them.

    The batches are read once, and only Gram matrices of the samples of a batch are kept, so memory does not grow with
    the number of batches. Each batch runs once per set of dropped blocks. The model stays on its device and is in eval
    mode meanwhile; afterwards modes, buffers, hooks and torch's random state are as before.

    Args:
        model (`torch.nn.Module`): an image classifier, bare or with PEFT adapters.
        batches (`Iterable[dict[str, torch.Tensor]]`): inputs of the model's forward, such as `pixel_values` of shape
            (batch, 3, height, width), and `labels`, int64 of shape (batch,), where -100 means no label. The images
            should be in random order and the batches of one size, at least 4: CKA compares the images of a batch.
        blocks (`list[ResidualBlock]`, *optional*): the blocks to analyze, from [`find_residual_blocks`]. By default
            all, found with the first images.
        random_draws (`int`, defaults to 10): sets of random blocks to draw for each number of blocks; all sets if
            there are fewer; 0 for none. Above 13 blocks, twelve numbers of blocks are measured.
        seed (`int`, defaults to 0): seed of these sets.
        allow_inexact_skip (`bool`, defaults to `False`): whether to drop blocks whose shortcut is not an identity
            too, such as blocks with GELU after the addition. By default their accuracies are `None`.
        name (`str`, *optional*): name of the model in the result; by default its class.
        disable_tqdm (`bool`, *optional*): whether to hide the progress bar; by default it is shown unless
            transformers' log level is above warnings.

    Returns:
        `ModelAnalysis`: print it for a table; `analysis.to_dict()` for JSON.

    Raises:
        ConfigurationError: an option is out of range.
        BlockError: the model has no residual block, or `blocks` is empty.
        DataError: there is no batch or no label, or a label is not a class of the model.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse.analysis import analyze_model
        >>> config = ViTConfig(
        ...     hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=32
        ... )
        >>> batches = [
        ...     {"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.randint(2, (8,))} for _ in range(2)
        ... ]
        >>> analysis = analyze_model(ViTForImageClassification(config), batches)
        >>> analysis.num_samples, len(analysis.blocks), len(analysis.early_exit)
        (16, 2, 3)
    """
    check_options(random_draws, seed)
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise DataError("`batches` is empty. Pass at least one batch, as a data loader yields them.")
    labels_of(first)
    found = find_residual_blocks(model, _few(first)) if blocks is None else list(blocks)
    if not found:
        raise BlockError("`blocks` is empty. Pass blocks from `find_residual_blocks`, or leave it out to use all.")
    sets = DropSets.of(found, random_draws, seed, allow_inexact_skip)
    meter, counter = FeatureMeter(found), AccuracyCounter(sets)
    num_sets = len(sets.distinct())
    quiet = transformers.logging.get_verbosity() > logging.WARNING if disable_tqdm is None else disable_tqdm
    total = len(batches) * num_sets if isinstance(batches, Sized) else None
    title = name or type(model).__name__
    with (
        tqdm(total=total, desc=f"Analyzing {printable(title)}", unit="forward", disable=quiet) as progress,
        undisturbed(model),
        torch.no_grad(),
    ):
        for batch in itertools.chain([first], remaining):
            for dropped, logits in _forwards(model, batch, found, sets, meter):
                counter.add(dropped, logits, labels_of(batch))
                progress.update()
    accuracy = counter.accuracy(())
    if accuracy is None:
        raise DataError("No sample has a label (-100 means none), so accuracy is undefined. Pass labeled images.")
    return ModelAnalysis(
        model=title,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_samples=accuracy.total,
        accuracy=accuracy,
        blocks=[
            BlockAnalysis(
                index=index,
                name=block.name,
                class_name=type(block.module).__name__,
                exact=block.exact,
                residual_ratio=meter.residual_ratio(index),
                cosine_similarity=meter.cosine_similarity(index),
                accuracy_without=counter.accuracy((index,)),
            )
            for index, block in enumerate(found)
        ],
        cka=meter.cka(),
        early_exit=counter.early_exit(len(found)),
        random_drops=counter.random(),
        options={"random_draws": random_draws, "seed": seed, "allow_inexact_skip": allow_inexact_skip},
        notes=_notes(found, meter, allow_inexact_skip),
    )


def _forwards(
    model: nn.Module, batch: Batch, blocks: Sequence[ResidualBlock], sets: DropSets, meter: FeatureMeter
) -> Iterator[tuple[Dropped, torch.Tensor]]:
    """Yield the logits of a batch without each set of blocks; the features are measured with all blocks."""
    args, kwargs = model_inputs(model, batch)
    with meter.measuring(len(batch["labels"])):
        logits = _logits(model(*args, **kwargs))
    _check_classes(labels_of(batch), logits.shape[-1])
    for dropped in sets.distinct():
        if dropped:
            with skip_blocks([blocks[index] for index in dropped], allow_inexact=True):
                logits = _logits(model(*args, **kwargs))
        yield dropped, logits


def _logits(output: Any) -> torch.Tensor:
    """Return the logits in the output of a model."""
    if isinstance(output, torch.Tensor):
        return output
    return output["logits"] if isinstance(output, Mapping) else output[0]


def _check_classes(labels: torch.Tensor, classes: int) -> None:
    lowest, highest = int(labels.min()), int(labels.max())
    if highest >= classes or bool(((labels < 0) & (labels != -100)).any()):
        raise DataError(
            f"The labels of a batch range from {lowest} to {highest}, but the model has {classes} classes. Pass "
            "labels from 0 to the number of classes minus one, in the order of the model's classes."
        )


def labels_of(batch: Batch) -> torch.Tensor:
    """Return the labels of a batch, on the CPU."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), torch.Tensor):
        found = f"a dictionary of {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise DataError(
            f"A batch is {found}, without a tensor `labels`. Pass dictionaries of tensors with `labels`, as a data "
            "loader for Trainer yields them."
        )
    labels = batch["labels"]
    if labels.ndim != 1 or labels.is_floating_point() or not len(labels):
        raise DataError(
            f"The `labels` of a batch are {labels.dtype} of shape {tuple(labels.shape)}. Pass one integer per image, "
            "and no empty batch."
        )
    return labels.cpu()


def _few(batch: Batch) -> dict[str, Any]:
    """Return the first images of a batch."""
    size = len(batch["labels"])
    return {
        key: value[:2] if isinstance(value, torch.Tensor) and value.shape[:1] == (size,) else value
        for key, value in batch.items()
    }


def check_options(random_draws: int, seed: int) -> None:
    for option, value in (("random_draws", random_draws), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigurationError(f"`{option}={value!r}` is not a whole number of at least 0. Pass such a number.")


def _notes(blocks: Sequence[ResidualBlock], meter: FeatureMeter, allow_inexact: bool) -> list[str]:
    """Return notes for reading the figures."""
    notes = []
    activations = sorted({block.activation for block in blocks if block.activation})
    if activations:
        notes.append(
            f"{' and '.join(activations)} follows the addition of some blocks: for them |f(x)| is the length of "
            "output minus input, not of the residual branch."
        )
    inexact = [block for block in blocks if not block.exact]
    if inexact:
        what = (
            "were dropped nevertheless, and returned their input unchanged"
            if allow_inexact
            else "were not dropped, but the other figures include them; `allow_inexact_skip` drops them too"
        )
        notes.append(
            f"{len(inexact)} of {len(blocks)} blocks ({inexact[0].name}{', ...' if inexact[1:] else ''}) cannot be "
            f"skipped exactly: {inexact[0].inexact}. They {what}."
        )
    if meter.not_batch_first:
        names = [blocks[index].name for index in sorted(meter.not_batch_first)]
        notes.append(
            f"The features of {', '.join(names[:3])}{', ...' if names[3:] else ''} are not ordered by sample: their "
            "ratio, cosine and CKA are left out."
        )
    if not meter.num_cka_samples:
        notes.append(f"CKA needs batches of at least {SMALLEST_BATCH} images, and these are smaller.")
    if any(block.num_calls > 1 for block in blocks):
        notes.append(
            "Some blocks run several times per forward: CKA is of their last run, the other figures are means of all."
        )
    return notes
