"""Choose which residual blocks to remove from a trained model: greedily, by measured quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_featreuse.errors import BlockError, ConfigurationError
from hf_featreuse.method.blocks import ResidualBlock, find_residual_blocks
from hf_featreuse.method.dummy_forward import model_inputs, undisturbed
from hf_featreuse.method.skipping import skip_blocks
from hf_featreuse.pruning.expressing import Depth


@dataclass(frozen=True)
class Removal:
    """One round of the greedy removal.

    Args:
        blocks (`tuple[str, ...]`): names of the blocks removed in this round: one, or two if the configuration can
            express only pairs.
        score (`float`): what `evaluate` returns without these blocks and those of all earlier rounds.
        blocks_left (`int`): number of residual blocks that remain.
        forward_share (`float`): arithmetic of a forward that remains, as a share of that of the whole model.

    Example:
        >>> from hf_featreuse import Removal
        >>> Removal(("vit.layers.3",), score=0.91, blocks_left=11, forward_share=0.92).blocks_left
        11
    """

    blocks: tuple[str, ...]
    score: float
    blocks_left: int
    forward_share: float


def rank_removals(
    model: PreTrainedModel,
    evaluate: Callable[[nn.Module], float],
    *,
    budget: int | float = 1,
    inputs: Mapping[str, Any] | torch.Tensor | None = None,
) -> list[Removal]:
    """Rank removals: in each round the residual block whose removal costs least, until a budget is met.

    Each round measures the model without each remaining block, by skipping it, so a budget that removes k of L blocks
    evaluates about k * L times. Of equal scores the one that saves most arithmetic wins, then the deepest. Only
    removals that the configuration can express are tried: single blocks, and pairs of the same list if neither block
    can be removed by itself. The model does not change.

    Args:
        model (`PreTrainedModel`): a trained image classifier.
        evaluate (`Callable`): takes the model, in eval mode, and returns how good it is, higher is better.
        budget (`int` or `float`, defaults to 1): how much may remain at most: a whole number of residual blocks, at
            least 1, or a share of the forward's arithmetic, above 0 and below 1.
        inputs (`dict[str, torch.Tensor]` or `torch.Tensor`, *optional*): a small batch for the model's forward. By
            default one is made from `model.config`.

    Returns:
        `list[Removal]`: in order; empty if the model already meets the budget.

    Raises:
        ConfigurationError: `budget` is out of range, or `evaluate` does not return a number.
        BlockError: the budget cannot be met: the rest of the model costs more, or the configuration cannot express
            such a model.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import rank_removals
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=8, patch_size=4)
        >>> model = ViTForImageClassification(config)
        >>> [removal.blocks for removal in rank_removals(model, lambda model: 1.0, budget=2)]
        [('vit.layers.2',)]
    """
    check_budget(budget)
    blocks = find_residual_blocks(model, inputs)
    depth, shares = Depth(model, blocks), _forward_shares(model, blocks, inputs)
    left = {block.name: block for block in blocks}
    removals: list[Removal] = []
    while not _is_met(budget, len(left), _share_left(shares, left)):
        gone = [block.name for block in blocks if block.name not in left]
        moves = _moves(depth, list(left), gone)
        if not moves:
            raise BlockError(
                f"`budget={budget!r}` cannot be met: {len(left)} of {len(blocks)} residual blocks of "
                f"{type(model).__name__} and {_share_left(shares, left):.0%} of the arithmetic are left, and its "
                "configuration cannot express a model with fewer. Pass a larger budget."
            )
        scores = {
            move: _score(model, evaluate, [block for block in blocks if block.name in {*gone, *move}])
            for move in moves
        }
        best = max(moves, key=lambda move: (scores[move], sum(shares[name] for name in move), moves.index(move)))
        for name in best:
            del left[name]
        removals.append(Removal(best, scores[best], len(left), _share_left(shares, left)))
    return removals


def check_budget(budget: int | float) -> None:
    """Raise `ConfigurationError` unless a budget is a number of blocks or a share of the arithmetic."""
    whole = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
    share = isinstance(budget, float) and 0 < budget < 1
    if not whole and not share:
        raise ConfigurationError(
            f"`budget={budget!r}` is neither a whole number of blocks of at least 1 nor a share of the arithmetic "
            "between 0 and 1. Pass how much may remain, such as 8 blocks or 0.6."
        )


def _is_met(budget: int | float, blocks_left: int, share_left: float) -> bool:
    return blocks_left <= budget if isinstance(budget, int) else share_left <= budget


def _share_left(shares: Mapping[str, float], left: Mapping[str, ResidualBlock]) -> float:
    return 1 - sum(share for name, share in shares.items() if name not in left)


def _moves(depth: Depth, left: Sequence[str], gone: Sequence[str]) -> list[tuple[str, ...]]:
    """Return what can be removed next: single blocks, and pairs of one list of which neither can be removed singly."""
    if len(left) == 1:
        return []
    moves: list[tuple[str, ...]] = [(name,) for name in left if depth.can_express([*gone, name])]
    for index, first in enumerate(left):
        if (first,) in moves or len(left) == 2:
            continue
        for second in left[index + 1 :]:
            same_list = first.rpartition(".")[0] == second.rpartition(".")[0]
            if same_list and (second,) not in moves and depth.can_express([*gone, first, second]):
                moves.append((first, second))
    return moves


def _score(model: nn.Module, evaluate: Callable[[nn.Module], float], dropped: Sequence[ResidualBlock]) -> float:
    with undisturbed(model), torch.no_grad(), skip_blocks(dropped, allow_inexact=True):
        score = evaluate(model)
    if not isinstance(score, float | int) or math.isnan(score):
        raise ConfigurationError(
            f"`evaluate` returned {score!r} without {dropped[-1].name}, which is not a number. Return a number; "
            "higher is better."
        )
    return float(score)


def _forward_shares(
    model: nn.Module, blocks: Sequence[ResidualBlock], inputs: Mapping[str, Any] | torch.Tensor | None
) -> dict[str, float]:
    """Return the share of the forward's arithmetic that skipping each block saves."""

    def count(dropped: Sequence[ResidualBlock]) -> int:
        args, kwargs = model_inputs(model, inputs)
        with undisturbed(model), torch.no_grad(), skip_blocks(dropped, allow_inexact=True):
            with FlopCounterMode(display=False) as counter:
                model(*args, **kwargs)
        return counter.get_total_flops()

    whole = count([])
    return {block.name: 1 - count([block]) / whole for block in blocks}
