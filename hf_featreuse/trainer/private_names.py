"""Check the private names of Trainer, accelerate and torch that this package relies on.

Exact resume and feature reuse override methods that Trainer calls, most of them private. A release that renames one
would no longer call our override: training would resume from half-loaded weights, without an error. The same holds for
attributes that are set here and read there. [`check_names`] runs once, when the trainer is imported, and
[`check_attributes`] when training starts.

Private names that are only imported, called or read, such as `torch._C._current_graph_task_id` or
`DistributedDataParallel._comm_hooks`, are not listed, because they raise an error if they are missing.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from hf_featreuse.errors import IncompatibleVersionError

logger = logging.get_logger(__name__)

# The oldest and the newest minor release that was tested.
TESTED = {"accelerate": ("1.15", "1.15"), "torch": ("2.11", "2.14"), "transformers": ("5.17", "5.24")}
INSTALLED = {
    "accelerate": accelerate.__version__,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}

# Methods of Trainer that our trainers override or call, with the parameters that they use: by position and name, or
# after the star only by name.
METHODS: Mapping[str, str] = {
    # Set up
    "__init__": (
        "model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func, "
        "compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics"
    ),
    "create_accelerator_and_postprocess": "",
    "_build_accelerator_args": "",
    "_validate_args": "",
    # Start of training
    "train": "resume_from_checkpoint",
    "_init_training_state": ("max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial"),
    "create_optimizer": "",
    "_prepare_for_training": "max_steps, train_dataloader, resume_from_checkpoint",
    "_load_from_checkpoint": "resume_from_checkpoint, model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_scaler": "checkpoint",
    # Take steps
    "_run_epoch": "*, epoch, train_dataloader, trial, ignore_keys_for_eval, start_time",
    "_load_rng_state": "checkpoint",
    "training_step": "model, inputs, num_items_in_batch",
    "compute_loss": "model, inputs",
    "_maybe_log_save_evaluate": (
        "tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, *, learning_rate"
    ),
    "log": "logs, start_time",
    "evaluation_loop": "",
    # Save
    "_save_checkpoint": "model, trial",
    "_get_output_dir": "trial",
    "save_model": "output_dir, _internal_call",
    "_save": "output_dir",
    "_save_optimizer_and_scheduler": "output_dir",
    "_save_rng_state": "output_dir",
    # End
    "_finalize_training": "trial, num_train_samples, start_time",
    "_load_best_model": "",
    # Publish
    "init_hf_repo": "token",
    "create_model_card": (
        "language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args"
    ),
    "push_to_hub": "commit_message, blocking, token, revision",
    "_push_from_checkpoint": "checkpoint_folder",
    "_finish_current_push": "",
}
# Attributes of a trainer: private ones that we read, and all that we set for Trainer.
ATTRIBUTES: Sequence[str] = (
    "_globalstep_last_logged",
    "_total_loss_scalar",
    "_tr_loss",
    "_train_batch_size",
    "compute_loss_func",
    "control",
    "hub_model_id",
    "is_in_train",
    "push_in_progress",
)
# Attributes that Trainer sets only when something is pushed.
_SET_LATER = {"push_in_progress"}
# Attributes of other classes that we read or set.
OTHERS: Sequence[tuple[str, type, str]] = (
    # Reveals a reentrant checkpoint function, which feature reuse refuses.
    ("transformers", PreTrainedModel, "_gradient_checkpointing_func"),
    # The forward without autocast, used to trace a prepared model.
    ("accelerate", Accelerator, "_original_forward"),
    ("accelerate", DistributedDataParallelKwargs, "find_unused_parameters"),
    ("accelerate", FullyShardedDataParallelPlugin, "state_dict_type"),
    ("accelerate", FullyShardedDataParallelPlugin, "transformer_cls_names_to_wrap"),
    # The compiled call of a block.
    ("torch", nn.Module, "_compiled_call_impl"),
)


def check_names(trainer: type = Trainer, others: Sequence[tuple[str, type, str]] = OTHERS) -> None:
    """Raise `IncompatibleVersionError` if a name is missing; warn if transformers is newer than what was tested.

    Args:
        trainer (`type`, defaults to `transformers.Trainer`): the class to check.
        others (`list[tuple[str, type, str]]`, *optional*): library, class and attribute of further names.

    Raises:
        IncompatibleVersionError: a name is missing; the error lists all of them.

    Example:
        >>> from hf_featreuse.trainer.private_names import check_names
        >>> check_names()
    """
    callers = [(name, set(_names_in(function))) for name, function in _functions(trainer)]
    faults = [fault for name, wanted in METHODS.items() if (fault := _fault(trainer, callers, name, wanted))]
    for name in ATTRIBUTES:
        if not any(name in mentioned for _, mentioned in callers):
            faults.append(f"`Trainer.{name}` is not used any more")
    found = {"transformers": faults, "accelerate": [], "torch": []}
    for library, cls, name in others:
        if not any(name in _names_in(function) for _, function in _functions(cls)):
            found[library].append(f"`{cls.__name__}.{name}` is not used any more")
    _raise(found)
    installed, (_, newest) = INSTALLED["transformers"], TESTED["transformers"]
    if _minor(installed) > _minor(newest):
        logger.warning(
            f"transformers {installed} is newer than {newest}, the newest release that hf_featreuse was tested with. "
            "All methods of Trainer that it relies on exist. If training or resuming fails, "
            f"{_advice('transformers')}."
        )


def check_attributes(trainer: Trainer) -> None:
    """Raise `IncompatibleVersionError` if a trainer lacks an attribute when training starts.

    Args:
        trainer (`transformers.Trainer`): inside `train()`, before the first step.
    """
    missing = [name for name in ATTRIBUTES if name not in vars(trainer) and name not in _SET_LATER]
    _raise({"transformers": [f"`Trainer.{name}` is not set when training starts" for name in missing]})


def _raise(found: Mapping[str, Sequence[str]]) -> None:
    """Raise one error with all faults, by library."""
    if not any(found.values()):
        return
    texts = [f"{name} {INSTALLED[name]} ({'; '.join(faults)})" for name, faults in found.items() if faults]
    advice = " and ".join(_advice(name) for name, faults in found.items() if faults)
    raise IncompatibleVersionError(
        f"hf_featreuse does not work with {', '.join(texts)}: training would run without its changes there. "
        f"{advice[0].upper()}{advice[1:]}."
    )


def _advice(library: str) -> str:
    oldest, newest = TESTED[library]
    major, minor = _minor(newest)
    return f'install a tested release: `pip install "{library}>={oldest},<{major}.{minor + 1}"`'


def _minor(version: str) -> tuple[int, int]:
    """Return the major and minor number of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _fault(trainer: type, callers: Sequence[tuple[str, set[str]]], name: str, wanted: str) -> str | None:
    """Return what is wrong with a method of Trainer; `None` if nothing is."""
    method = getattr(trainer, name, None)
    if method is None:
        return f"`Trainer.{name}({wanted})` does not exist"
    parameters = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
    kinds = {parameter.kind for parameter in parameters}
    names = [parameter.name for parameter in parameters]
    positional, _, by_name = (part.replace(",", " ").split() for part in wanted.partition("*"))
    # A wrapper that takes any arguments passes them on.
    takes_anything = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
    if not takes_anything and (names[: len(positional)] != positional or not set(by_name) <= set(names)):
        return f"`Trainer.{name}` takes ({', '.join(names)}), not ({wanted})"
    if name != "__init__" and not any(name in mentioned for caller, mentioned in callers if caller != name):
        return f"`Trainer.{name}` is not called any more"
    return None


def _functions(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the methods of a class and its bases by name, without their decorators."""
    for base in cls.__mro__[:-1]:
        for name, value in vars(base).items():
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if callable(value) and isinstance(value := inspect.unwrap(value), types.FunctionType):
                yield name, value


def _names_in(function: types.FunctionType | types.CodeType) -> Iterator[str]:
    """Yield the attributes and functions that code mentions, including its inner functions."""
    code = function if isinstance(function, types.CodeType) else function.__code__
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
