"""Prepare data, model and transforms of a run from its options."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import transformers
from transformers import BaseImageProcessor, PreTrainedModel, set_seed

from hf_featreuse.data import (
    ImageData,
    ImageSplit,
    RandAugment,
    TrainTransform,
    augmentation,
    default_crop_scale,
    image_size,
    load_image_data,
    stream_image_data,
)
from hf_featreuse.data.labels import REGRESSION, SEVERAL
from hf_featreuse.errors import ConfigurationError
from hf_featreuse.folders import new_folder
from hf_featreuse.program.arguments import FINE_TUNING, DataArguments, Options
from hf_featreuse.program.launching import check_one_gpu
from hf_featreuse.program.models import load_model
from hf_featreuse.program.output_dir import check_output_dir, delete_checkpoints
from hf_featreuse.program.parsing import parse_arguments
from hf_featreuse.text import joined
from hf_featreuse.trainer.arguments import FeatureReuseConfig

logger = logging.getLogger(__name__)

# Losses that are correct with gradient accumulation, unlike those of transformers for these tasks.
LOSS_OF_TASK = {SEVERAL: "bce", REGRESSION: "mse"}


@dataclass
class Setup:
    """Everything that training needs, from [`prepare`].

    Args:
        options (`Options`): the options of the run.
        data (`ImageData`): the data set as loaded, with the class ids of the model.
        splits (`dict[str, ImageSplit]`): the splits with their transforms: `"train"`, `"validation"`, `"test"`.
        model (`PreTrainedModel`): on the CPU.
        processor (`BaseImageProcessor`): the image processor of the model.
        resume_from (`str` or `bool`, *optional*): the checkpoint to resume from; `True` for the last one.
    """

    options: Options
    data: ImageData
    splits: dict[str, ImageSplit]
    model: PreTrainedModel
    processor: BaseImageProcessor
    resume_from: str | bool | None = None

    @property
    def args(self) -> FeatureReuseConfig:
        """The training arguments."""
        return self.options.training

    @property
    def card_details(self) -> dict[str, str | None]:
        """Facts for the model card that the trainer does not know."""
        data = self.options.data
        return {
            "finetuned_from": self.options.model.model_name_or_path,
            # For a local folder the card states only that it is one.
            "dataset": self.data.name or data.dataset_name or data.train_dir or data.validation_dir,
            "license": self.options.run.license,
        }


@contextlib.contextmanager
def prepare(argv: Sequence[str]) -> Iterator[Setup]:
    """Read the options of a run, check its output folder, and load data and model.

    The output folder exists inside the `with` block. If the block fails and the folder is empty, it is removed.

    Args:
        argv (`Sequence[str]`): the command line without the name of the program, as for [`parse_arguments`].

    Yields:
        `Setup`: what training needs.

    Raises:
        ConfigurationError: an option has a value that cannot be used.
        DataError: the data cannot be used.

    Example:
        >>> from hf_featreuse.program import prepare
        >>> with prepare(["--model_type", "resnet", "--use_cpu", "--log_level", "error"]) as setup:
        ...     type(setup.model).__name__, len(setup.splits["train"])
        ('ResNetForImageClassification', 1437)
    """
    options = parse_arguments(argv)
    if options.run.launch is not None:
        raise ConfigurationError(
            f"`--launch {options.run.launch}` works only with `featreuse train`. Leave it out, and start other "
            f"programs with `accelerate launch --multi_gpu --num_processes {options.run.launch}`."
        )
    check_one_gpu(options.training)
    start_logging(options.training)
    resume_from = check_output_dir(options)
    with new_folder(str(options.training.output_dir)):
        setup = set_up(options)
        setup.resume_from = resume_from
        yield setup


def start_logging(args: FeatureReuseConfig) -> None:
    """Show messages of the program at level info, those of the libraries at `--log_level`."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    level = args.get_process_log_level()
    logging.getLogger("hf_featreuse").setLevel(level)
    logging.getLogger("hf_featreuse.program").setLevel(logging.INFO if args.should_log else level)
    transformers.utils.logging.set_verbosity(level)


def set_up(options: Options) -> Setup:
    """Set the seed, load data and model, and choose the transforms."""
    args = options.training
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
    set_seed(args.seed)
    with args.main_process_first(desc="loading the data"):
        data = load_data(options)
    data, model, processor = load_model(options.model, data, bool(args.do_train))
    if args.loss is None:
        args.loss = LOSS_OF_TASK.get(data.problem_type)
    if args.device.type == "cpu" and max(image_size(processor)) <= 16 and "OMP_NUM_THREADS" not in os.environ:
        # Operations on images this small end before a second thread wakes up; on a busy machine waiting for it made
        # the run ten times longer.
        torch.set_num_threads(1)
    if args.do_train and options.run.overwrite_output_dir:
        delete_checkpoints(args)  # Only after data and model are loaded: they may be in the folder, or missing.
    _warn_of_high_rate(options)
    splits = add_transforms(data, processor, options.data, args.seed)
    return Setup(options, data, splits, model, processor)


def _warn_of_high_rate(options: Options) -> None:
    """Warn of a drop rate that lost accuracy in fine-tuning."""
    args, usual = options.training, FINE_TUNING["drop_rate"]
    if args.do_train and options.model.model_name_or_path and args.alternates and args.drop_rate > usual:
        logger.warning(
            f"`--drop_rate {args.drop_rate:g}` is high for fine-tuning: in the accuracy study, rates above {usual:g} "
            "lost accuracy if there were thousands of images. Compare with the default, and with `--drop_rate 0`."
        )


def load_data(options: Options) -> ImageData:
    """Load the splits that will be used."""
    data_args, args = options.data, options.training
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    if data_args.streaming:
        data = _stream(options, [name for name, used in wanted.items() if used])
    else:
        data = _load(options, [name for name, used in wanted.items() if used])
    for name, flag in (("validation", "do_eval"), ("test", "do_predict")):
        if wanted[name] and name not in data.splits:
            raise ConfigurationError(
                f"`--{flag}` needs a {name} split, but the data has only {joined(sorted(data.splits), 'and')}. Pass "
                "data with this split, or leave the flag out."
            )
    return data


def _stream(options: Options, splits: Sequence[str]) -> ImageData:
    model_args, data_args, args = options.model, options.data, options.training
    if data_args.dataset_name is None or data_args.skip_bad_images:
        raise ConfigurationError(
            "`--streaming` needs `--dataset_name`, and reads the data once. Pass `--dataset_name`, and leave out "
            "`--train_dir`, `--validation_dir` and `--skip_bad_images`."
        )
    if args.do_train and args.max_steps <= 0:
        raise ConfigurationError(
            "With `--streaming` the number of images per epoch is unknown. Pass `--max_steps`, the number of "
            "optimizer steps."
        )
    return stream_image_data(
        data_args.dataset_name,
        data_args.dataset_config_name,
        max_train_samples=data_args.max_train_samples,
        max_eval_samples=data_args.max_eval_samples,
        image_column_name=data_args.image_column_name,
        label_column_name=data_args.label_column_name,
        token=model_args.token,
        seed=args.seed,
        splits=splits,
    )


def _load(options: Options, splits: Sequence[str]) -> ImageData:
    model_args, data_args, args = options.model, options.data, options.training
    return load_image_data(
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
        splits=splits,
    )


def add_transforms(
    data: ImageData, processor: BaseImageProcessor, data_args: DataArguments, seed: int
) -> dict[str, ImageSplit]:
    """Return the splits with random crops and flips for training, and the processor's resizing for evaluation."""
    size = image_size(processor)
    scale = default_crop_scale(size) if data_args.image_scale_min is None else (data_args.image_scale_min, 1.0)
    augment = augmentation(data_args.augmentation, seed, data_args.random_erasing)
    if data_args.rand_augment_ops:
        if augment is not None:
            raise ConfigurationError(
                "`--rand_augment_ops` was passed together with `--augmentation` or `--random_erasing`. Pass only one "
                "of them; for RandAugment with erasing pass `--augmentation rand_augment --random_erasing 0.25`."
            )
        augment = RandAugment(data_args.rand_augment_ops, data_args.rand_augment_magnitude, seed=seed)
    train_transform = TrainTransform(size, scale=scale, flip=data_args.horizontal_flip, seed=seed, augment=augment)
    return data.transformed(processor, train_transform)
