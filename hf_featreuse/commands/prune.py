"""The verb `featreuse prune`: from a checkpoint to a shallower one."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

# Under its short name transformers 5.17 asks for torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_featreuse.method.blocks import find_residual_blocks
from hf_featreuse.data import EvalTransform, ImageCollator, load_image_data
from hf_featreuse.errors import ConfigurationError, DataError
from hf_featreuse.pruning.measuring import accuracy_on
from hf_featreuse.pruning.removing import BlockChoice, prune_blocks
from hf_featreuse.pruning.saving import check_folder, save_whole
from hf_featreuse.pruning.selecting import Removal, check_budget, rank_removals


def add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a local checkpoint folder of an image classifier, or a Hub id")
    choice = parser.add_mutually_exclusive_group(required=True)
    which = "a comma-separated list of indices, names or endings of names, or one regular expression"
    choice.add_argument("--drop", metavar="BLOCKS", default=argparse.SUPPRESS, help=f"blocks to remove: {which}")
    choice.add_argument("--keep", metavar="BLOCKS", default=argparse.SUPPRESS, help=f"blocks to keep: {which}")
    choice.add_argument(
        "--budget",
        metavar="N",
        default=argparse.SUPPRESS,
        help="what may remain at most: a whole number of blocks, such as 8, or a share of the forward's arithmetic, "
        "such as 0.6; the blocks that the accuracy on --data misses least go",
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        default=argparse.SUPPRESS,
        help="for --budget: a data set on the Hub, a local folder, or `digits`; its validation images are used, or "
        "15%% of the training images where it has none",
    )
    parser.add_argument("--max_eval_samples", type=int, default=1000, help="for --budget: images to measure on")
    parser.add_argument("--batch_size", type=int, default=64, help="for --budget: images in a batch")
    parser.add_argument("--seed", type=int, default=42, help="for --budget: of the draw of these images")
    parser.add_argument(
        "--output_dir", metavar="DIR", required=True, help="a new or empty folder for the shallower model"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def prune(options: argparse.Namespace) -> str:
    """Prune, save and report."""
    budget = _budget(options.budget) if "budget" in options else None
    if budget is not None and "data" not in options:
        raise ConfigurationError(
            "`--budget` needs `--data`: the blocks that accuracy misses least go. Pass a data set."
        )
    check_folder(options.output_dir)
    model, processor = _load(options.model)
    removals: list[Removal] = []
    if budget is None:
        drop, keep = (_choice(getattr(options, name, None)) for name in ("drop", "keep"))
    else:
        removals = _rank(model, processor, budget, options)
        drop, keep = [name for removal in removals for name in removal.blocks], None
    pruned = prune_blocks(model, drop=drop, keep=keep)
    save_whole(pruned, processor, options.output_dir)
    return _report(model, pruned, removals, processor, options)


def _budget(text: str) -> int | float:
    try:
        budget = int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ConfigurationError(
            f"`--budget {text}` is no number. Pass a number of blocks, or a share of the arithmetic such as 0.6."
        ) from None
    check_budget(budget)
    return budget


def _choice(text: str | None) -> BlockChoice | None:
    """`1,4` as indices, `layers.1,layers.4` as names, `.*layers.[14]` as an expression."""
    if text is None:
        return None
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if len(entries) == 1 and not entries[0].lstrip("-").isdigit():
        return entries[0]
    return [int(entry) if entry.lstrip("-").isdigit() else entry for entry in entries]


def _load(name: str) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
    """The classifier with all of its weights, and its image processor if it has one."""
    try:
        loaded: Any = AutoModelForImageClassification.from_pretrained(
            name, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"`{name}` cannot be loaded as an image classifier: {error} Pass a folder that `save_pretrained` wrote, "
            "or a Hub id."
        ) from error
    model, report = loaded
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise ConfigurationError(
            f"`{name}` lacks weights of {type(model).__name__}: {missing[:4]} ({len(missing)}). Pass a checkpoint "
            "that was trained as an image classifier."
        )
    try:
        return model.eval(), AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return model.eval(), None


def _rank(
    model: PreTrainedModel, processor: BaseImageProcessor | None, budget: int | float, options: argparse.Namespace
) -> list[Removal]:
    if processor is None:
        raise ConfigurationError(
            f"`{options.model}` has no image processor, so its images cannot be prepared. Save one beside it, or name "
            "the blocks with `--drop`."
        )
    data = load_image_data(
        None if options.data == "digits" else options.data,
        max_eval_samples=options.max_eval_samples,
        seed=options.seed,
        splits=("validation",),
    )
    _check_labels(model, data.label_names, options.data)
    split = data.splits["validation"].with_transform(EvalTransform(processor))
    # Decoded once: the images are gone through for every block.
    batches = list(DataLoader(split, options.batch_size, collate_fn=ImageCollator.from_processor(processor)))
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    removals = rank_removals(model, accuracy_on(batches), budget=budget)
    nn.Module.to(model, "cpu")
    return removals


def _check_labels(model: PreTrainedModel, names: list[str], data: str) -> None:
    """Refuse data whose class ids are not those of the model."""
    own = [str(label) for _, label in sorted((model.config.id2label or {}).items())]
    if len(own) != len(names) or (own != names and sorted(own) == sorted(names)):
        raise DataError(
            f"`--data {data}` has {len(names)} classes ({', '.join(names[:3])}, ...) and the model {len(own)} "
            f"({', '.join(own[:3])}, ...). Pass data with the model's classes in the same order."
        )


def _report(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    removals: list[Removal],
    processor: BaseImageProcessor | None,
    options: argparse.Namespace,
) -> str:
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
