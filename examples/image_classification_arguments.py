"""Flags of both image classification examples, and where their results may go."""

from __future__ import annotations

import difflib
import json
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from hf_featreuse import ConfigurationError, FeatureReuseConfig

logger = logging.getLogger("run_image_classification")

# Of `--resume_from_checkpoint`: the newest.
LAST = ("last", "True", "true")
DEFAULT_CHECKPOINT = "google/vit-base-patch16-224-in21k"
# Defaults of training from scratch; a flag on the command line wins. Fine-tuning keeps those of TrainingArguments.
FROM_SCRATCH = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "num_train_epochs": 30,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 20,
}
# The handwritten digits: small, few, and mirrored or tightly cropped ones are other digits.
DIGITS = {
    **FROM_SCRATCH,
    "output_dir": "outputs/digits",
    "per_device_train_batch_size": 32,
    "num_train_epochs": 20,
    "image_scale_min": 0.9,
    "horizontal_flip": 0.0,
}


@dataclass
class DataArguments:
    """What to train on. With none of dataset_name, train_dir and validation_dir: scikit-learn's handwritten digits."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Name of a data set on the Hub, or a local folder of parquet, arrow or images."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_dir: str | None = field(default=None, metadata={"help": "A folder with one folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, to validate on."})
    train_val_split: float | None = field(
        default=0.15, metadata={"help": "Fraction of train to validate on, where the data has no validation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many images at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many images at most."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: image, else the only one of images."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the labels. Default: label, labels, else the only one of classes."}
    )
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Decode all images first, leave out those that fail, and count them."}
    )
    image_scale_min: float | None = field(
        default=None,
        metadata={
            "help": "Smallest share of an image a random crop keeps. Default: 0.08 from 128 pixels on, else 0.6."
        },
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of mirroring a training image."})
    rand_augment_ops: int = field(
        default=0, metadata={"help": "RandAugment with this many operations an image, such as 2; 0 is off."}
    )
    rand_augment_magnitude: int = field(default=9, metadata={"help": "Strength of RandAugment, from 0 to 30."})


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"Checkpoint to fine-tune. Default: {DEFAULT_CHECKPOINT} if data but no model is named."},
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Train from scratch a model of this type, sized to the images, such as convnext."},
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'With --model_type: options to change, as "hidden_size=192,depths=[2,2,6,2]".'}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "With --model_type: side of the images in pixels. Default: as the data's, to 224."},
    )
    config_name: str | None = field(default=None, metadata={"help": "Name or path of another config."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    image_processor_name: str | None = field(default=None, metadata={"help": "Name or path of another processor."})
    token: str | None = field(default=None, metadata={"help": "Hub token. Default: the stored one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow a checkpoint to bring its own code."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a head of another number of classes by a new one."}
    )
    license: str | None = field(default=None, metadata={"help": "Licence to state on the model card: apache-2.0, ..."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start a new run in an output folder that holds one; deletes its checkpoints."},
    )


Arguments = tuple[ModelArguments, DataArguments, FeatureReuseConfig]


def parse_arguments(argv: list[str]) -> Arguments:
    """Read flags or one JSON file. What is trained decides the defaults of training."""
    parser = HfArgumentParser((ModelArguments, DataArguments, FeatureReuseConfig), allow_abbrev=False)
    is_json = len(argv) == 1 and argv[0].endswith(".json")
    given: dict[str, Any] = json.loads(Path(argv[0]).read_text(encoding="utf-8")) if is_json else {}
    # A first look at the few flags that decide; what argparse makes of the rest follows below.
    flags = (
        given if is_json else {word.lstrip("-").split("=")[0].replace("-", "_") for word in argv if word[:2] == "--"}
    )
    has_data = bool({"dataset_name", "train_dir", "validation_dir"} & set(flags))
    has_checkpoint = "model_name_or_path" in flags or (has_data and not {"model_type", "config_name"} & set(flags))
    recipe = {} if has_checkpoint else FROM_SCRATCH if has_data else DIGITS
    if is_json:
        model_args, data_args, training_args = parser.parse_dict({**recipe, **given})
    else:
        parser.set_defaults(**recipe)
        model_args, data_args, training_args, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True
        )
        if rest:
            options = [option for action in parser._actions for option in action.option_strings]
            close = difflib.get_close_matches(rest[0], options, n=3)
            hint = f"Did you mean {' or '.join(close)}?" if close else "`--help` lists the flags."
            raise ConfigurationError(f"`{' '.join(rest)}` is not a flag of this example. {hint}")
    if has_checkpoint and model_args.model_name_or_path is None:
        model_args.model_name_or_path = DEFAULT_CHECKPOINT
    if model_args.model_name_or_path and model_args.model_type:
        raise ConfigurationError(
            f"`--model_name_or_path {model_args.model_name_or_path}` fine-tunes and `--model_type "
            f"{model_args.model_type}` trains from scratch. Pass one of them."
        )
    # An evaluation strategy sets do_eval by itself, so the flags are asked.
    if not {"do_train", "do_eval", "do_predict"} & set(flags):
        training_args.do_train = training_args.do_eval = True
    return model_args, data_args, training_args


def check_output_dir(model_args: ModelArguments, args: FeatureReuseConfig) -> str | bool | None:
    """Find the checkpoint to resume from; refuse a folder that cannot be written or holds a finished run."""
    folder = Path(str(args.output_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"`--output_dir {folder}` cannot be written: {error.strerror}. Pass another folder."
        ) from None
    asked = args.resume_from_checkpoint
    if args.do_train and model_args.overwrite_output_dir:
        if asked and (asked in LAST or Path(asked).resolve().parent == folder.resolve()):
            raise ConfigurationError(
                f"`--resume_from_checkpoint {asked}` resumes the run in {folder}, whose checkpoints "
                "`--overwrite_output_dir` deletes. Pass one of them."
            )
        return asked
    if not args.do_train:
        return asked
    state_file = folder / "trainer_state.json"
    if state_file.is_file():
        state = json.loads(state_file.read_text(encoding="utf-8"))
        goes_on = args.max_steps > state["global_step"] or (
            args.max_steps <= 0 and args.num_train_epochs > state["num_train_epochs"]
        )
        if state["global_step"] >= state["max_steps"] and not goes_on:
            raise ConfigurationError(
                f"`--output_dir {folder}` holds a finished run of {state['global_step']} steps. Pass another folder, "
                "`--overwrite_output_dir` to train again, more epochs to continue, or `--do_eval` to evaluate it with "
                f"`--model_name_or_path {folder}`."
            )
    if asked:
        return True if asked in LAST else asked
    if get_last_checkpoint(str(folder)) is not None:
        logger.info(
            f"Found checkpoints in {folder} and resumes from the last one; --overwrite_output_dir starts a new run."
        )
        return True
    if any(folder.iterdir()):
        raise ConfigurationError(
            f"`--output_dir {folder}` is not empty and holds no checkpoint. Pass another folder, or "
            "`--overwrite_output_dir` to write into this one."
        )
    return None
