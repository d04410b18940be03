"""The command `featreuse prune`: make a shallower checkpoint."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

    from hf_featreuse.data.evaluation import OpenModel
    from hf_featreuse.pruning.removing import BlockChoice
    from hf_featreuse.pruning.selecting import Removal

_INDEX = re.compile(r"-?[0-9]{1,9}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to the command's parser."""
    parser.add_argument("model", metavar="MODEL", help="a local checkpoint folder of an image classifier, or a Hub id")
    choice = parser.add_mutually_exclusive_group(required=True)
    which = "a comma-separated list of indices, names or endings of names, or one regular expression"
    choice.add_argument("--drop", metavar="BLOCKS", default=argparse.SUPPRESS, help=f"blocks to remove: {which}")
    choice.add_argument("--keep", metavar="BLOCKS", default=argparse.SUPPRESS, help=f"blocks to keep: {which}")
    choice.add_argument(
        "--budget",
        metavar="N",
        default=argparse.SUPPRESS,
        help="how much may remain: a whole number of blocks, such as 8, or a share of the forward's arithmetic, such "
        "as 0.6; the blocks whose removal costs least accuracy on --data are removed",
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        default=argparse.SUPPRESS,
        help="for --budget: a data set on the Hub, a local folder, or `digits`; its validation images are used, or "
        "15%% of the training images if it has none",
    )
    parser.add_argument("--max_eval_samples", type=int, default=1000, help="for --budget: images to measure on")
    parser.add_argument("--batch_size", type=int, default=64, help="for --budget: images per batch")
    parser.add_argument("--seed", type=int, default=42, help="for --budget: seed of the draw of these images")
    parser.add_argument(
        "--output_dir", metavar="DIR", required=True, help="a new or empty folder for the shallower model"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> str:
    """Prune, save and report."""
    from hf_featreuse.commands.data_options import check_least
    from hf_featreuse.data.evaluation import open_classifier
    from hf_featreuse.errors import ConfigurationError
    from hf_featreuse.pruning.removing import prune_blocks
    from hf_featreuse.pruning.saving import check_folder, save_whole

    budget = _budget(options.budget) if "budget" in options else None
    if budget is not None and "data" not in options:
        raise ConfigurationError(
            "`--budget` was passed without `--data`, on which the accuracy without each block is measured. Pass a "
            "data set."
        )
    if budget is not None:
        check_least(options, batch_size=1, max_eval_samples=1, seed=0)
    check_folder(options.output_dir)
    opened = open_classifier(options.model, needs_processor=budget is not None)
    model, processor = opened.model, opened.processor
    removals: list[Removal] = []
    if budget is None:
        drop, keep = (_choice(getattr(options, name, None)) for name in ("drop", "keep"))
    else:
        removals = _rank(opened, budget, options)
        drop, keep = [name for removal in removals for name in removal.blocks], None
    pruned = prune_blocks(model, drop=drop, keep=keep)
    save_whole(pruned, processor, options.output_dir)
    return _report(model, pruned, removals, processor, options)


def _budget(text: str) -> int | float:
    from hf_featreuse.errors import ConfigurationError
    from hf_featreuse.pruning.selecting import check_budget

    try:
        budget = int(text) if _INDEX.fullmatch(text) else float(text)
    except ValueError:
        raise ConfigurationError(
            f"`--budget {text}` is not a number. Pass a number of blocks, or a share of the arithmetic such as 0.6."
        ) from None
    check_budget(budget)
    return budget


def _choice(text: str | None) -> BlockChoice | None:
    """Read `1,4` as indices, `layers.1,layers.4` as names, `.*layers.[14]` as an expression."""
    if text is None:
        return None
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if len(entries) == 1 and not _INDEX.fullmatch(entries[0]):
        return entries[0]
    return [int(entry) if _INDEX.fullmatch(entry) else entry for entry in entries]


def _rank(opened: OpenModel, budget: int | float, options: argparse.Namespace) -> list[Removal]:
    """Rank the removals by the accuracy on validation images."""
    import torch
    from torch import nn

    from hf_featreuse.data import load_image_data
    from hf_featreuse.data.evaluation import class_notes, evaluation_loader
    from hf_featreuse.pruning.measuring import accuracy_on
    from hf_featreuse.pruning.selecting import rank_removals

    data = load_image_data(
        None if options.data == "digits" else options.data,
        max_eval_samples=options.max_eval_samples,
        seed=options.seed,
        splits=("validation",),
    )
    split = data.splits["validation"]
    for note in class_notes(opened, data.label_names):
        print(note, file=sys.stderr)
    # Decoded once: the images are read again for every block.
    batches = list(
        evaluation_loader(
            opened,
            split,
            data.label_names,
            batch_size=options.batch_size,
            max_samples=options.max_eval_samples,
            seed=options.seed,
        )
    )
    nn.Module.to(opened.model, "cuda" if torch.cuda.is_available() else "cpu")
    removals = rank_removals(opened.model, accuracy_on(batches), budget=budget)
    nn.Module.to(opened.model, "cpu")
    return removals


def _report(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    removals: list[Removal],
    processor: BaseImageProcessor | None,
    options: argparse.Namespace,
) -> str:
    from hf_featreuse.method.blocks import find_residual_blocks

    blocks, left = find_residual_blocks(model), find_residual_blocks(pruned)
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, pruned))
    if options.json:
        report = {
            "model": options.model,
            "architecture": type(model).__name__,
            "output_dir": options.output_dir,
            "blocks": {"before": len(blocks), "after": len(left)},
            "parameters": {"before": before, "after": after},
            "rounds": [vars(removal) for removal in removals],
            "image_processor": processor is not None,
        }
        return json.dumps(report, indent=2)
    lines = [
        f"{type(model).__name__}: {len(blocks)} residual blocks, {before:,} parameters",
        f"saved in {options.output_dir}: {len(left)} residual blocks, {after:,} parameters",
    ]
    if removals:
        lines += ["", "accuracy  blocks left  arithmetic  removed"]
        lines += [
            f"{r.score:>8.1%}  {r.blocks_left:>11}  {r.forward_share:>10.1%}  {', '.join(r.blocks)}" for r in removals
        ]
    if processor is None:
        lines.append(f"{options.model} has no image processor; none was saved.")
    return "\n".join(lines)
