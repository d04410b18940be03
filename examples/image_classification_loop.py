"""Parts of the loop in run_image_classification_no_trainer.py: its optimizer, its data loaders and its progress."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names

from hf_featreuse import ConfigurationError, FeatureReuseArguments, FeatureReuseConfig
from hf_featreuse.data import ImageCollator
from hf_featreuse.program import Setup
from hf_featreuse.trainer.step_log import StepLog

# Options of FeatureReuseConfig, other than those of the method and of Trainer, that the loop supports.
FOLLOWED = {"mixup_alpha", "cutmix_alpha", "ema_decay"}


def check_followed(setup: Setup) -> None:
    """Raise for options of this package that only FeatureReuseTrainer supports."""
    elsewhere = {
        field.name for kind in (TrainingArguments, FeatureReuseArguments) for field in dataclasses.fields(kind)
    }
    others = [field for field in dataclasses.fields(FeatureReuseConfig) if field.name not in elsewhere | FOLLOWED]
    given = [field.name for field in others if getattr(setup.args, field.name) != field.default]
    if setup.options.run.early_stopping_patience is not None:
        given.append("early_stopping_patience")
    if given:
        raise ConfigurationError(
            f"`--{given[0]} {getattr(setup.args, given[0], '')}` has no effect in this loop. Leave it out, or use "
            "run_image_classification.py."
        )


def make_optimizer(model: PreTrainedModel, args: FeatureReuseConfig) -> torch.optim.Optimizer:
    """Return the optimizer that Trainer would create: `--optim`, without weight decay on biases and norms."""
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
    """Return a loader for a loop without a Trainer; that of the training split shuffles as Trainer's does."""
    args, train = setup.args, split == "train"
    loader = DataLoader(
        setup.splits[split],
        batch_size=args.per_device_train_batch_size if train else args.per_device_eval_batch_size,
        shuffle=train,
        collate_fn=ImageCollator.from_processor(setup.processor),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
    )
    # `accelerator.prepare` would save the sampler, and with it the data set, in every checkpoint.
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
    """The position of training and the log, for accelerate's `save_state`."""

    def __init__(self, device: torch.device) -> None:
        self.step, self.history = 0, []
        self.loss, self.logged, self.by_kind = torch.zeros((), device=device), 0, StepLog(device)

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "by_kind": self.by_kind.state(), "loss": self.loss.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.history, self.logged = state["step"], state["history"], state["logged"]
        self.loss.fill_(state["loss"])
        self.by_kind.restore(state["by_kind"])
