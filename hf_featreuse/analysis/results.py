"""The results of an analysis, as dataclasses and as a table."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from typing import Any

from hf_featreuse.analysis.statistics import Accuracy
from hf_featreuse.text import aligned, common_prefix

_TABLE_WIDTH = 100


@dataclass(frozen=True)
class BlockAnalysis:
    """One residual block in a [`ModelAnalysis`].

    Args:
        index (`int`): place in forward order, from 0.
        name (`str`): qualified name in the model.
        class_name (`str`): class of the module.
        exact (`bool`): whether skipping the block is bit-identical to a residual branch of zero.
        residual_ratio (`float`, *optional*): mean over samples of |f(x)| / |x|, where f(x) is the block's output minus
            its input x. `None` if the first dimension of the features is not the batch.
        cosine_similarity (`float`, *optional*): mean over samples of the cosine of the angle between the block's input
            and its output, from -1 to 1. `None` as above.
        accuracy_without (`Accuracy`, *optional*): accuracy of the model with only this block dropped. `None` if the
            block cannot be skipped exactly.

    Example:
        >>> from hf_featreuse.analysis import Accuracy, BlockAnalysis
        >>> BlockAnalysis(0, "vit.layers.0", "ViTLayer", True, 0.5, 0.9, Accuracy.of(9, 10)).accuracy_without.value
        0.9
    """

    index: int
    name: str
    class_name: str
    exact: bool
    residual_ratio: float | None
    cosine_similarity: float | None
    accuracy_without: Accuracy | None


@dataclass(frozen=True)
class RandomDrop:
    """Accuracy with a number of random blocks dropped, over the sets that were drawn.

    Args:
        num_dropped (`int`): number of blocks in each set.
        mean (`float`): mean accuracy over the sets, from 0 to 1.
        low (`float`, *optional*): lower end of the 95 % t interval of the mean over all sets of this size, on the same
            images. `None` if only one of several sets was drawn.
        high (`float`, *optional*): upper end.
        accuracies (`list[float]`): accuracy without each set.
        sets (`list[list[int]]`): indices of the blocks of each set.

    Example:
        >>> from hf_featreuse.analysis import RandomDrop
        >>> RandomDrop(1, 0.5, 0.0, 1.0, [0.25, 0.75], [[0], [2]]).mean
        0.5
    """

    num_dropped: int
    mean: float
    low: float | None
    high: float | None
    accuracies: list[float]
    sets: list[list[int]]


@dataclass(frozen=True)
class ModelAnalysis:
    """What the residual blocks of a trained model do, from [`analyze_model`]. `str(analysis)` is a table.

    Args:
        model (`str`): the name given, or the class of the model.
        architecture (`str`): class of the model.
        parameters (`int`): number of parameters.
        num_samples (`int`): images with a label that were classified.
        accuracy (`Accuracy`): of the whole model.
        blocks (`list[BlockAnalysis]`): the residual blocks in forward order.
        cka (`list[list[float | None]]`): linear CKA between the outputs of all pairs of blocks, of shape (blocks,
            blocks), from the unbiased estimator averaged over batches; an estimate over few images can lie outside
            [0, 1]. `None` where it is not defined.
        early_exit (`list[Accuracy | None]`): entry `d` is the accuracy after the first `d` blocks, with all later ones
            skipped and the model's own norm and head; of length blocks + 1. `None` if a later block cannot be skipped
            exactly.
        random_drops (`list[RandomDrop]`): accuracy with 1, 2, ... random blocks dropped.
        options (`dict[str, Any]`): the options of the measurement.
        notes (`list[str]`): notes for reading the figures.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse.analysis import analyze_model
        >>> config = ViTConfig(
        ...     hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=32
        ... )
        >>> batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 0, 1])}
        >>> analysis = analyze_model(ViTForImageClassification(config), [batch])
        >>> analysis.drop_last[0] == analysis.early_exit[2] == analysis.accuracy
        True
    """

    model: str
    architecture: str
    parameters: int
    num_samples: int
    accuracy: Accuracy
    blocks: list[BlockAnalysis]
    cka: list[list[float | None]]
    early_exit: list[Accuracy | None]
    random_drops: list[RandomDrop]
    options: dict[str, Any]
    notes: list[str]

    @property
    def drop_last(self) -> list[Accuracy | None]:
        """Accuracy with the last 0, 1, ... and all blocks dropped: `early_exit` reversed."""
        return self.early_exit[::-1]

    def to_dict(self) -> dict[str, Any]:
        """Return the analysis as dicts, lists, strings and numbers, for JSON, `drop_last` included.

        Example:
            >>> from hf_featreuse.analysis import Accuracy, ModelAnalysis
            >>> whole = Accuracy.of(1, 2)
            >>> analysis = ModelAnalysis("m", "ViT", 9, 2, whole, [], [], [whole], [], {}, [])
            >>> analysis.to_dict()["drop_last"][0]["value"]
            0.5
        """
        return {**dataclasses.asdict(self), "drop_last": [a and dataclasses.asdict(a) for a in self.drop_last]}

    def __str__(self) -> str:
        prefix = common_prefix([block.name for block in self.blocks])
        rows = [["#", f"block of {prefix[:-1]}" if prefix else "block", *BLOCK_COLUMNS]]
        rows += [
            [str(block.index), block.name.removeprefix(prefix), *block_cells(self, block)] for block in self.blocks
        ]
        name = self.architecture if self.model == self.architecture else f"{self.model}: {self.architecture}"
        heading = f"{name}, {self.parameters:,} parameters\naccuracy {described(self.accuracy)}"
        notes = [textwrap.fill(f"Note: {note}", _TABLE_WIDTH) for note in self.notes]
        return "\n\n".join([heading, "\n".join(aligned(rows)), *notes])


BLOCK_COLUMNS = ("|f(x)|/|x|", "cosine", "accuracy without", "exit after it")


def block_cells(analysis: ModelAnalysis, block: BlockAnalysis) -> list[str]:
    """Return the cells of a block in a table, in the order of `BLOCK_COLUMNS`."""
    leaving = analysis.early_exit[block.index + 1]
    return [
        number(block.residual_ratio),
        number(block.cosine_similarity),
        percent(block.accuracy_without),
        percent(leaving),
    ]


def number(value: float | None) -> str:
    """Return a number with three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def percent(accuracy: Accuracy | None) -> str:
    """Return a percentage, or a dash."""
    return "-" if accuracy is None else f"{accuracy.value:.1%}"


def described(accuracy: Accuracy) -> str:
    """Return an accuracy with its interval and its number of samples."""
    return f"{accuracy.value:.1%} (95 % interval {accuracy.low:.1%} to {accuracy.high:.1%}, {accuracy.total:,} images)"
