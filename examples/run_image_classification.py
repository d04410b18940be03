"""Train or fine-tune an image classifier with feature reuse.

    accelerate launch examples/run_image_classification.py

trains a small ViT from scratch on scikit-learn's handwritten digits. Takes every flag of the transformers example of
the same name, every TrainingArguments, and the options of feature reuse; or one .json file with any of these.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    HfArgumentParser,
    PreTrainedModel,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_featreuse import ConfigurationError, FeatureReuseConfig, FeatureReuseError, FeatureReuseTrainer
from hf_featreuse.data import (
    EvalTransform,
    ImageCollator,
    ImageData,
    ImageSplit,
    TrainTransform,
    default_crop_scale,
    image_size,
    load_image_data,
)
from hf_featreuse.metrics import build_compute_metrics, rank_top_k
from hf_featreuse.small_models import parse_overrides, small_config, small_image_processor

logger = logging.getLogger("run_image_classification")

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
    train_dir: str | None = field(default=None, metadata={"help": "A folder with one folder of images a class."})
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


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"Checkpoint to fine-tune. Default: {DEFAULT_CHECKPOINT} where data but no model is named."},
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
        default=False, metadata={"help": "Start anew in an output folder that holds a run already."}
    )


Arguments = tuple[ModelArguments, DataArguments, FeatureReuseConfig]


def parse_arguments(argv: list[str]) -> Arguments:
    """Read flags or one JSON file. What is trained decides the defaults of training."""
    parser = HfArgumentParser((ModelArguments, DataArguments, FeatureReuseConfig))
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
            raise ConfigurationError(f"`{' '.join(rest)}` is no flag of this example. {hint}")
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
    if not args.do_train or model_args.overwrite_output_dir:
        return args.resume_from_checkpoint
    state_file = folder / "trainer_state.json"
    if state_file.is_file():
        state = json.loads(state_file.read_text(encoding="utf-8"))
        goes_on = args.max_steps > state["global_step"] or (
            args.max_steps <= 0 and args.num_train_epochs > state["num_train_epochs"]
        )
        if state["global_step"] >= state["max_steps"] and not goes_on:
            raise ConfigurationError(
                f"`--output_dir {folder}` holds a finished run of {state['global_step']} steps. Pass another folder, "
                "`--overwrite_output_dir` to train anew, more epochs to train on, or `--do_eval` to evaluate it with "
                f"`--model_name_or_path {folder}`."
            )
    if args.resume_from_checkpoint:
        return True if args.resume_from_checkpoint in ("last", "True", "true") else args.resume_from_checkpoint
    if get_last_checkpoint(str(folder)) is not None:
        logger.info(
            f"Found checkpoints in {folder} and resumes from the last one; --overwrite_output_dir starts anew."
        )
        return True
    if any(folder.iterdir()):
        raise ConfigurationError(
            f"`--output_dir {folder}` is not empty and holds no checkpoint. Pass another folder, or "
            "`--overwrite_output_dir` to write into this one."
        )
    return None


def load_data(model_args: ModelArguments, data_args: DataArguments, args: FeatureReuseConfig) -> ImageData:
    """Load the splits that will be used."""
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    data = load_image_data(
        data_args.dataset_name,
        data_args.dataset_config_name,
        train_dir=data_args.train_dir,
        validation_dir=data_args.validation_dir,
        train_val_split=data_args.train_val_split,
        max_train_samples=data_args.max_train_samples,
        max_eval_samples=data_args.max_eval_samples,
        image_column_name=data_args.image_column_name,
        label_column_name=data_args.label_column_name,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
        seed=args.seed,
        skip_bad_images=data_args.skip_bad_images,
        splits=[name for name, used in wanted.items() if used],
    )
    for name, flag in (("validation", "do_eval"), ("test", "do_predict")):
        if wanted[name] and name not in data.splits:
            raise ConfigurationError(f"`--{flag}` needs a {name} split, and the data has only {sorted(data.splits)}.")
    return data


def load_model(model_args: ModelArguments, data: ImageData) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a checkpoint with a head for the labels, or make a model from scratch, and its image processor."""
    labels = data.label_names
    if model_args.model_name_or_path is None and model_args.config_name is None:
        model_type = model_args.model_type or "vit"
        first = next(iter(data.splits.values()))[0]["pixel_values"]
        size = model_args.image_size or min(max(first.shape[-2:]), 224)
        config = small_config(model_type, size, len(labels), labels, model_args.config_overrides)
        return AutoModelForImageClassification.from_config(config), small_image_processor(config, size)
    common = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    source = model_args.model_name_or_path or model_args.config_name
    try:
        return load_pretrained(model_args, labels, str(source), common)
    except OSError as error:
        raise ConfigurationError(f"`{source}` cannot be loaded: {str(error).splitlines()[0]}") from error


def load_pretrained(
    model_args: ModelArguments, labels: list[str], source: str, common: dict[str, Any]
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a checkpoint, or new weights for its config, with a head for the labels."""
    config = AutoConfig.from_pretrained(
        model_args.config_name or source,
        num_labels=len(labels),
        label2id={label: index for index, label in enumerate(labels)},
        id2label=dict(enumerate(labels)),
        **parse_overrides(model_args.config_overrides),
        **common,
    )
    processor = AutoImageProcessor.from_pretrained(model_args.image_processor_name or source, **common)
    if model_args.model_name_or_path is None:
        return AutoModelForImageClassification.from_config(config), processor
    try:
        model = AutoModelForImageClassification.from_pretrained(
            source, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes, **common
        )
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ConfigurationError(
            f"The head of `{source}` is not for the {len(labels)} classes of the data. Pass "
            "`--ignore_mismatched_sizes` to replace it by a new one."
        ) from None
    return model, processor


def add_transforms(
    data: ImageData, processor: BaseImageProcessor, data_args: DataArguments, seed: int
) -> dict[str, ImageSplit]:
    """Random crops and flips for training; the processor's own resizing for evaluation."""
    size = image_size(processor)
    scale = default_crop_scale(size) if data_args.image_scale_min is None else (data_args.image_scale_min, 1.0)
    train_transform = TrainTransform(size, scale=scale, flip=data_args.horizontal_flip, seed=seed)
    return {
        name: split.with_transform(train_transform if name == "train" else EvalTransform(processor))
        for name, split in data.splits.items()
    }


def make_trainer(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    splits: dict[str, ImageSplit],
    args: FeatureReuseConfig,
) -> FeatureReuseTrainer:
    """Put model, data and metrics together."""
    return FeatureReuseTrainer(
        model,
        args,
        data_collator=ImageCollator.from_processor(processor),
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        processing_class=processor,
        compute_metrics=build_compute_metrics(),
        preprocess_logits_for_metrics=rank_top_k,
    )


def report(trainer: FeatureReuseTrainer, prefix: str, metrics: dict[str, float], split: ImageSplit) -> None:
    """Print and save metrics as the transformers example does, with the images that were left out."""
    metrics[f"{prefix}_samples"] = len(split)
    if split.num_skipped:
        metrics[f"{prefix}_skipped_images"] = split.num_skipped
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)


def run(argv: list[str]) -> None:
    model_args, data_args, args = parse_arguments(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    level = args.get_process_log_level()
    logger.setLevel(logging.INFO if args.should_log else level)
    transformers.utils.logging.set_verbosity(level)
    checkpoint = check_output_dir(model_args, args)
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
    set_seed(args.seed)
    with args.main_process_first(desc="loading the data"):
        data = load_data(model_args, data_args, args)
    model, processor = load_model(model_args, data)
    if args.device.type == "cpu" and max(image_size(processor)) <= 16 and "OMP_NUM_THREADS" not in os.environ:
        # Operations on images this small are over before a second thread wakes up; on a busy machine waiting for it
        # made the run ten times longer.
        torch.set_num_threads(1)
    splits = add_transforms(data, processor, data_args, args.seed)
    trainer = make_trainer(model, processor, splits, args)
    trainer.card_details = {
        "finetuned_from": model_args.model_name_or_path,
        # Of a local folder the card says only that it is one.
        "dataset": data.name or data_args.dataset_name or data_args.train_dir or data_args.validation_dir,
        "license": model_args.license,
    }
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        report(trainer, "train", result.metrics, splits["train"])
        trainer.save_state()
    if args.do_eval:
        report(trainer, "eval", trainer.evaluate(), splits["validation"])
    if args.do_predict:
        metrics = trainer.predict(splits["test"], metric_key_prefix="predict").metrics
        report(trainer, "predict", metrics, splits["test"])
    if args.do_train:
        publish(trainer)


def publish(trainer: FeatureReuseTrainer) -> None:
    """Write the model card with the plot of the run; push all of it where asked to."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    logger.info(f"Model, results, card and plot are in {trainer.args.output_dir}")


def main() -> None:
    try:
        run(sys.argv[1:])
    except FeatureReuseError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
