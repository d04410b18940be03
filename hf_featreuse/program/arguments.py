"""The options of the training program, and the defaults that depend on what is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_featreuse.trainer.arguments import FeatureReuseConfig

DEFAULT_CHECKPOINT = "google/vit-base-patch16-224-in21k"
# Defaults of training from scratch; options that are passed override them.
FROM_SCRATCH: dict[str, Any] = {
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
# Defaults for the handwritten digits: small and few images; a mirrored or tightly cropped one is another digit.
DIGITS: dict[str, Any] = {
    **FROM_SCRATCH,
    "output_dir": "outputs/digits",
    "per_device_train_batch_size": 32,
    "num_train_epochs": 20,
    "image_scale_min": 0.9,
    "horizontal_flip": 0.0,
}
# Of training a checkpoint further; what is not here is as in TrainingArguments. The rate is that of docs/results.md.
FINE_TUNING: dict[str, Any] = {
    "drop_rate": 0.1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
}


@dataclass
class DataArguments:
    """Options of the data. Without dataset_name, train_dir and validation_dir: scikit-learn's handwritten digits."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Name of a data set on the Hub, or a local folder of Parquet or Arrow files or of images."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_dir: str | None = field(default=None, metadata={"help": "A folder with one folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, for validation."})
    train_val_split: float | None = field(
        default=0.15, metadata={"help": "Fraction of train to use for validation if the data has no such split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many images."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: image, or the only column of images."}
    )
    label_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column of the labels: classes, lists of them, or numbers to predict. Default: label, labels, "
            "or the only column of classes."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Stream --dataset_name instead of storing it; training then needs --max_steps."},
    )
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Decode all images first, skip those that fail, and report their number."}
    )
    image_scale_min: float | None = field(
        default=None,
        metadata={
            "help": "Smallest area of a random crop, as a fraction of the image. Default: 0.08 for 128 pixels or "
            "more, else 0.6."
        },
    )
    horizontal_flip: float = field(
        default=0.5, metadata={"help": "Probability of flipping a training image horizontally."}
    )
    rand_augment_ops: int = field(
        default=0, metadata={"help": "RandAugment with this many operations per image, such as 2; 0 is off."}
    )
    rand_augment_magnitude: int = field(default=9, metadata={"help": "Strength of RandAugment, from 0 to 30."})
    augmentation: str | None = field(
        default=None,
        metadata={"help": "auto_augment, rand_augment or trivial_augment of torchvision, if it is installed."},
    )
    random_erasing: float = field(
        default=0.0, metadata={"help": "Probability of erasing a rectangle of a training image; needs torchvision."}
    )


@dataclass
class ModelArguments:
    """Options of the model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"Checkpoint to fine-tune. Default: {DEFAULT_CHECKPOINT} if data but no model is given."},
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Train a model of this type from scratch, sized for the images, such as convnext."},
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'With --model_type: options to change, as "hidden_size=192,depths=[2,2,6,2]".'}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "With --model_type: image size in pixels. Default: that of the data, at most 224."},
    )
    config_name: str | None = field(default=None, metadata={"help": "Name or path of another config."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    image_processor_name: str | None = field(default=None, metadata={"help": "Name or path of another processor."})
    token: str | None = field(default=None, metadata={"help": "Hub token. Default: the stored one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code that comes with a checkpoint."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a head with another number of classes by a new one."}
    )


@dataclass
class RunArguments:
    """Options of the run: file of options, output folder, early stopping, number of processes."""

    config: str | None = field(
        default=None,
        metadata={"help": "A YAML or JSON file of options, such as the run.yaml of a run. Flags override it."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start a new run in an output folder that contains one; deletes its checkpoints."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many evaluations without an improvement of --metric_for_best_model (default: "
            "loss), and keep the best model."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0,
        metadata={"help": "With --early_stopping_patience: how much an improvement must exceed."},
    )
    license: str | None = field(default=None, metadata={"help": "License for the model card, such as apache-2.0."})
    launch: int | None = field(
        default=None,
        metadata={
            "help": "Only for `featreuse train`: number of processes, one per GPU, or with --use_cpu on the CPU."
        },
    )


@dataclass
class Options:
    """All options of a run, from [`parse_arguments`].

    Args:
        data (`DataArguments`): what to train on.
        model (`ModelArguments`): which model.
        run (`RunArguments`): how the run starts and ends.
        training (`FeatureReuseConfig`): the method, the recipe and all `TrainingArguments`.
        resolved (`dict[str, Any]`): the content of `run.yaml`: options by name, as they were passed or by default.
    """

    data: DataArguments
    model: ModelArguments
    run: RunArguments
    training: FeatureReuseConfig
    resolved: dict[str, Any]
