"""The options of the training program, and the defaults that depend on what is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_featreuse.trainer.arguments import FeatureReuseConfig

DEFAULT_CHECKPOINT = "google/vit-base-patch16-224-in21k"
# Defaults of training from scratch; an option that is given wins.
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
# The handwritten digits: small, few, and mirrored or tightly cropped ones are other digits.
DIGITS: dict[str, Any] = {
    **FROM_SCRATCH,
    "output_dir": "outputs/digits",
    "per_device_train_batch_size": 32,
    "num_train_epochs": 20,
    "image_scale_min": 0.9,
    "horizontal_flip": 0.0,
}
# Of training a checkpoint further: without an entry, those of TrainingArguments hold.
FINE_TUNING: dict[str, Any] = {}


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
        default=0.15, metadata={"help": "Fraction of train to validate on if the data has no validation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many images at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many images at most."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: image, else the only one of images."}
    )
    label_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column of the labels: classes, lists of them, or numbers to predict. Default: label, labels, "
            "else the only one of classes."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read --dataset_name while training instead of keeping it; needs --max_steps to train."},
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
        default=0, metadata={"help": "RandAugment with this many operations per image, such as 2; 0 is off."}
    )
    rand_augment_magnitude: int = field(default=9, metadata={"help": "Strength of RandAugment, from 0 to 30."})
    augmentation: str | None = field(
        default=None,
        metadata={"help": "Of torchvision, if it is installed: auto_augment, rand_augment or trivial_augment."},
    )
    random_erasing: float = field(
        default=0.0, metadata={"help": "Probability of erasing a rectangle of a training image; needs torchvision."}
    )


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


@dataclass
class RunArguments:
    """Where the options come from, how the run begins and when it may end early."""

    config: str | None = field(
        default=None,
        metadata={"help": "A YAML or JSON file of options, such as the run.yaml of a run. Flags override it."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start a new run in an output folder that holds one; deletes its checkpoints."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many evaluations without a better --metric_for_best_model (default: loss), and "
            "keep the best model."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "With --early_stopping_patience: what counts as better must exceed this."}
    )
    license: str | None = field(default=None, metadata={"help": "Licence to state on the model card: apache-2.0, ..."})
    launch: int | None = field(
        default=None,
        metadata={
            "help": "Of `featreuse train`: train in this many processes, one per GPU, or with --use_cpu on CPUs."
        },
    )


@dataclass
class Options:
    """All options of a run, from [`parse_arguments`].

    Args:
        data (`DataArguments`): what to train on.
        model (`ModelArguments`): which model.
        run (`RunArguments`): how the run begins and ends.
        training (`FeatureReuseConfig`): the method, the recipe and everything of `TrainingArguments`.
        resolved (`dict[str, Any]`): what `run.yaml` holds: options by name, as they were given or are by default.
    """

    data: DataArguments
    model: ModelArguments
    run: RunArguments
    training: FeatureReuseConfig
    resolved: dict[str, Any]
