"""What both image classification examples share: data, model, transforms and optimizer."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from image_classification_arguments import DataArguments, ModelArguments, logger
from image_classification_checkpoints import start_anew
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    Trainer,
    set_seed,
)

# Under its short name transformers 5.17 asks for torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.trainer_pt_utils import get_parameter_names

from hf_featreuse import ConfigurationError, FeatureReuseConfig, FeatureReuseError
from hf_featreuse.data import (
    EvalTransform,
    ImageCollator,
    ImageData,
    ImageSplit,
    RandAugment,
    TrainTransform,
    class_names,
    class_notes,
    default_crop_scale,
    image_size,
    in_order_of,
    load_image_data,
    open_classifier,
    relabelled,
)
from hf_featreuse.small_models import parse_overrides, small_config, small_image_processor
from hf_featreuse.text import flat, one_line
from hf_featreuse.trainer.step_log import StepLog


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


def load_model(
    model_args: ModelArguments, data: ImageData, trains: bool
) -> tuple[ImageData, PreTrainedModel, BaseImageProcessor]:
    """Load a checkpoint, or make a model from scratch, with its image processor, and the data with its class ids."""
    labels = data.label_names
    if model_args.model_name_or_path is None and model_args.config_name is None:
        model_type = model_args.model_type or "vit"
        first = next(iter(data.splits.values()))[0]["pixel_values"]
        size = model_args.image_size or min(max(first.shape[-2:]), 224)
        config = small_config(model_type, size, len(labels), labels, model_args.config_overrides)
        return data, AutoModelForImageClassification.from_config(config), small_image_processor(config, size)
    common = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    source = str(model_args.model_name_or_path or model_args.config_name)
    try:
        if model_args.model_name_or_path is not None and not trains:
            return load_trained(model_args, data, source, common)
        return load_pretrained(model_args, data, source, common)
    except FeatureReuseError:
        raise
    except Exception as error:  # Of transformers, safetensors and PEFT, about what the files hold.
        raise ConfigurationError(
            f"`{flat(source)}` cannot be loaded: {one_line(error)} Pass a checkpoint folder or a Hub id."
        ) from error


def load_trained(
    model_args: ModelArguments, data: ImageData, source: str, common: dict[str, Any]
) -> tuple[ImageData, PreTrainedModel, BaseImageProcessor]:
    """Load a trained classifier to evaluate it as it is: the data takes its class ids, matched by name."""
    opened = open_classifier(source, needs_processor=model_args.image_processor_name is None, **common)
    processor: Any = opened.processor
    if model_args.image_processor_name is not None:
        processor = AutoImageProcessor.from_pretrained(model_args.image_processor_name, **common)
    for note in class_notes(opened, data.label_names):
        logger.warning(note)
    return relabelled(data, opened), opened.model, processor


def load_pretrained(
    model_args: ModelArguments, data: ImageData, source: str, common: dict[str, Any]
) -> tuple[ImageData, PreTrainedModel, BaseImageProcessor]:
    """Load a checkpoint, or new weights for its config, to train it with a head for the labels."""
    name, overrides = model_args.config_name or source, parse_overrides(model_args.config_overrides)
    if model_args.model_name_or_path is not None:
        # A head for these very classes keeps their order.
        data = in_order_of(data, class_names(AutoConfig.from_pretrained(name, **common)))
    labels = data.label_names
    config = AutoConfig.from_pretrained(
        name,
        num_labels=len(labels),
        label2id={label: index for index, label in enumerate(labels)},
        id2label=dict(enumerate(labels)),
        **overrides,
        **common,
    )
    processor = AutoImageProcessor.from_pretrained(model_args.image_processor_name or source, **common)
    if model_args.model_name_or_path is None:
        return data, AutoModelForImageClassification.from_config(config), processor
    try:
        model = AutoModelForImageClassification.from_pretrained(
            source, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes, **common
        )
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ConfigurationError(
            f"The head of `{source}` is not for the {len(labels)} classes of the data. Pass "
            "`--ignore_mismatched_sizes` to train a new one in its place."
        ) from None
    return data, model, processor


def add_transforms(
    data: ImageData, processor: BaseImageProcessor, data_args: DataArguments, seed: int
) -> dict[str, ImageSplit]:
    """Random crops and flips for training; the processor's own resizing for evaluation."""
    size = image_size(processor)
    scale = default_crop_scale(size) if data_args.image_scale_min is None else (data_args.image_scale_min, 1.0)
    augment = None
    if data_args.rand_augment_ops:
        augment = RandAugment(data_args.rand_augment_ops, data_args.rand_augment_magnitude, seed=seed)
    train_transform = TrainTransform(size, scale=scale, flip=data_args.horizontal_flip, seed=seed, augment=augment)
    return {
        name: split.with_transform(train_transform if name == "train" else EvalTransform(processor))
        for name, split in data.splits.items()
    }


@dataclass
class Setup:
    """Everything that training needs."""

    model_args: ModelArguments
    data_args: DataArguments
    args: FeatureReuseConfig
    data: ImageData
    splits: dict[str, ImageSplit]
    model: PreTrainedModel
    processor: BaseImageProcessor

    @property
    def card_details(self) -> dict[str, str | None]:
        """What the model card cannot know by itself."""
        data = self.data_args
        return {
            "finetuned_from": self.model_args.model_name_or_path,
            # Of a local folder the card says only that it is one.
            "dataset": self.data.name or data.dataset_name or data.train_dir or data.validation_dir,
            "license": self.model_args.license,
        }


def start_logging(args: FeatureReuseConfig) -> None:
    """Messages of the example at level info, those of the libraries at the level asked for."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    level = args.get_process_log_level()
    logger.setLevel(logging.INFO if args.should_log else level)
    logging.getLogger("hf_featreuse").setLevel(level)
    transformers.utils.logging.set_verbosity(level)


def set_up(model_args: ModelArguments, data_args: DataArguments, args: FeatureReuseConfig) -> Setup:
    """Seed, load the data, load or make the model, and choose the transforms."""
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
    set_seed(args.seed)
    with args.main_process_first(desc="loading the data"):
        data = load_data(model_args, data_args, args)
    data, model, processor = load_model(model_args, data, bool(args.do_train))
    if args.device.type == "cpu" and max(image_size(processor)) <= 16 and "OMP_NUM_THREADS" not in os.environ:
        # Operations on images this small are over before a second thread wakes up; on a busy machine waiting for it
        # made the run ten times longer.
        torch.set_num_threads(1)
    if args.do_train and model_args.overwrite_output_dir:
        start_anew(args)  # Not before data and model are there: either may be in the folder, or missing.
    splits = add_transforms(data, processor, data_args, args.seed)
    return Setup(model_args, data_args, args, data, splits, model, processor)


def make_optimizer(model: PreTrainedModel, args: FeatureReuseConfig) -> torch.optim.Optimizer:
    """The optimizer that Trainer would make: as `--optim` says, without weight decay on biases and norms."""
    undecayed = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], undecayed))
    named = [(name in decayed, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for decays, p in named if decays], "weight_decay": args.weight_decay},
        {"params": [p for decays, p in named if not decays], "weight_decay": 0.0},
    ]
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return optimizer_class(groups, **options)


def make_loader(setup: Setup, split: str, accelerator: Accelerator) -> DataLoader:
    """A loader for a loop without a Trainer; that of the training split shuffles as Trainer's does."""
    args, train = setup.args, split == "train"
    loader = DataLoader(
        setup.splits[split],
        batch_size=args.per_device_train_batch_size if train else args.per_device_eval_batch_size,
        shuffle=train,
        collate_fn=ImageCollator.from_processor(setup.processor),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
    )
    # `accelerator.prepare` would put the sampler, and with it the data set, into every checkpoint.
    return prepare_data_loader(
        loader,
        accelerator.device,
        accelerator.num_processes,
        accelerator.process_index,
        put_on_device=True,
        rng_types=["generator"],
        use_seedable_sampler=True,
        data_seed=args.data_seed,
    )


class Progress:
    """Where training is and what was logged, for accelerate's `save_state`."""

    def __init__(self, device: torch.device) -> None:
        self.step, self.history = 0, []
        self.loss, self.logged, self.by_kind = torch.zeros((), device=device), 0, StepLog(device)

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "by_kind": self.by_kind.state(), "loss": self.loss.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.history, self.logged = state["step"], state["history"], state["logged"]
        self.loss.fill_(state["loss"])
        self.by_kind.restore(state["by_kind"])
