"""Flags of both image classification examples, and where their results may go."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_featreuse import ConfigurationError, FeatureReuseConfig, FeatureReuseError
from hf_featreuse.checkpoints.output_lock import LOCK_NAME
from hf_featreuse.folders import new_folder
from hf_featreuse.text import did_you_mean, flat, joined, one_line

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


class Parser(HfArgumentParser):
    """Complains in one line; argparse prints the usage of all flags first."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"The options cannot be read: {flat(message)}. `--help` lists them.")


def parse_arguments(argv: list[str]) -> Arguments:
    """Read flags or one JSON file. What is trained decides the defaults of training."""
    parser = Parser((ModelArguments, DataArguments, FeatureReuseConfig), allow_abbrev=False)
    argv, given = read_json(argv[0]) if len(argv) == 1 and argv[0].endswith(".json") else (argv, {})
    # A first look at the few flags that decide; what argparse makes of the rest follows below.
    flags = {word.lstrip("-").split("=")[0].replace("-", "_") for word in argv if word[:2] == "--"} | set(given)
    has_data = bool({"dataset_name", "train_dir", "validation_dir"} & flags)
    has_checkpoint = "model_name_or_path" in flags or (has_data and not {"model_type", "config_name"} & flags)
    parser.set_defaults(**({} if has_checkpoint else FROM_SCRATCH if has_data else DIGITS), **given)
    try:
        *arguments, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        model_args, data_args, training_args = arguments
    except FeatureReuseError:
        raise
    except Exception as error:  # Of TrainingArguments, which raises what it likes.
        raise ConfigurationError(f"The options cannot be used: {one_line(error)} `--help` lists them.") from error
    if rest:
        options = [option for action in parser._actions for option in action.option_strings]
        hint = did_you_mean(rest[0], options) or " `--help` lists the flags."
        raise ConfigurationError(f"`{flat(' '.join(rest))}` is not a flag of this example.{hint}")
    check_values(model_args, data_args, training_args)
    if has_checkpoint and model_args.model_name_or_path is None:
        model_args.model_name_or_path = DEFAULT_CHECKPOINT
    if model_args.model_name_or_path and model_args.model_type:
        raise ConfigurationError(
            f"`--model_name_or_path {model_args.model_name_or_path}` fine-tunes and `--model_type "
            f"{model_args.model_type}` trains from scratch. Pass one of them."
        )
    # An evaluation strategy sets do_eval by itself, so the flags are asked.
    if not {"do_train", "do_eval", "do_predict"} & flags:
        training_args.do_train = training_args.do_eval = True
    return model_args, data_args, training_args


def read_json(name: str) -> tuple[list[str], dict[str, Any]]:
    """The options of a file as flags, which argparse checks, and those that no flag can express: null and lists."""
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"`{flat(name)}` cannot be read as JSON: {one_line(error)} Fix the file.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"`{flat(name)}` holds a {type(content).__name__}. Pass a file with one JSON object of options."
        )
    hints = {
        name: get_args(hint) or (hint,)
        for options in (ModelArguments, DataArguments, FeatureReuseConfig)
        for name, hint in get_type_hints(options).items()
    }
    argv, given = [], {}
    for option, value in content.items():
        kinds = {get_origin(hint) or hint for hint in hints.get(option, (type(value),))}
        if isinstance(value, (list, dict, type(None))) and type(value) not in kinds:
            raise ConfigurationError(
                f"`{flat(option)}` is {json.dumps(value)[:80]} in `{flat(name)}`. Pass a value of another kind, or "
                "leave it out."
            )
        if option in hints and (value is None or isinstance(value, list)):
            given[option] = value
        else:
            argv.append(f"--{option}={json.dumps(value) if isinstance(value, (dict, bool)) else value}")
    return argv, given


# Numbers that Trainer takes and then fails on, divides by or silently ignores: the least value, and the most.
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), (1, 1e9)
    ),
    **dict.fromkeys(("max_train_samples", "max_eval_samples", "image_size", "save_total_limit"), (1, 1e18)),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon"), (0, 1e18)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "horizontal_flip", "label_smoothing_factor"), (0, 1)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    **dict.fromkeys(("dataloader_num_workers", "rand_augment_ops"), (0, 1e4)),
    "rand_augment_magnitude": (0, 30),
    "image_scale_min": (1e-9, 1),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "num_train_epochs"), (1e-9, 1e18)),
}


def check_values(*arguments: Any) -> None:
    """Refuse numbers out of range, and trackers that are not there, before anything is loaded."""
    values = {name: value for each in arguments for name, value in vars(each).items()}
    for name, value in values.items():
        least, most = LIMITS.get(name, (-math.inf, math.inf))
        if isinstance(value, (int, float)) and not (math.isfinite(value) and least <= value <= most):
            raise ConfigurationError(
                f"`--{name} {value}` is out of range. Pass a number of at least {least:g}"
                f"{'' if math.isinf(most) else f' and at most {most:g}'}."
            )
        if isinstance(value, str) and not value.strip():
            raise ConfigurationError(f"`--{name}` is empty. Pass a value, or leave it out.")
    if not isinstance(values["lr_scheduler_kwargs"] or {}, dict):
        raise ConfigurationError(
            f"`--lr_scheduler_kwargs {flat(values['lr_scheduler_kwargs'])}` is not a JSON object. Pass one such as "
            "'{\"num_cycles\": 1}'."
        )
    if values["max_steps"] == 0:
        raise ConfigurationError("`--max_steps 0` trains nothing. Pass at least 1, or `--do_eval` to evaluate only.")
    for tracker in values["report_to"]:
        if tracker not in INTEGRATION_TO_CALLBACK:
            known = (
                did_you_mean(tracker, list(INTEGRATION_TO_CALLBACK))
                or f" Pass {joined(list(INTEGRATION_TO_CALLBACK), 'or')}."
            )
            raise ConfigurationError(f"`--report_to {flat(tracker)}` is not a tracker that transformers knows.{known}")
        if tracker not in get_available_reporting_integrations():
            raise ConfigurationError(
                f"`--report_to {tracker}`: its library is not installed. Install it, or pass none."
            )


def check_output_dir(model_args: ModelArguments, args: FeatureReuseConfig) -> str | bool | None:
    """Find the checkpoint to resume from; refuse a folder that cannot be written or holds a finished run."""
    folder = Path(str(args.output_dir))
    try:
        # What fails later must leave no empty folder.
        with new_folder(folder, keep=False), tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # The second for a null character.
        raise ConfigurationError(
            f"`--output_dir {flat(folder)}` cannot be written: {one_line(error)} Pass another folder."
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
    if folder.is_dir() and get_last_checkpoint(str(folder)) is not None:
        logger.info(
            f"Found checkpoints in {folder} and resumes from the last one; --overwrite_output_dir starts a new run."
        )
        return True
    if folder.is_dir() and any(path.name != LOCK_NAME for path in folder.iterdir()):
        raise ConfigurationError(
            f"`--output_dir {folder}` is not empty and holds no checkpoint. Pass another folder, or "
            "`--overwrite_output_dir` to write into this one."
        )
    return None
