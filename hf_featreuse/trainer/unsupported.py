"""Refuse, before training, engines and optimizers of Trainer that do not work with feature reuse.

An entry can be removed once a test shows that frozen weights and a resume are bit-identical with it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import nn
from transformers import TrainingArguments
from transformers.utils.generic import strtobool

from hf_featreuse.errors import ConfigurationError


@dataclass(frozen=True)
class Refusal:
    """Why something is refused, and what to do instead.

    Args:
        reason (`str`): the reason, as a sentence.
        way_out (`str`): the alternative, as a sentence.
    """

    reason: str
    way_out: str


_IN_BACKWARD = Refusal(
    "It changes weights inside backward instead of in the optimizer step, and its state is not in checkpoints, so "
    "neither a masked-freeze step nor a resume can be exact.",
    'Pass `optim="adamw_torch"`, or `optim="galore_adamw"` or `"apollo_adamw"` without `_layerwise`.',
)
_SCHEDULE_FREE = Refusal(
    "It switches all weights between a training and an evaluation state, and restores them only up to rounding: an "
    "evaluation or a checkpoint between two steps changes frozen weights (by up to 4e-9 in AdamWScheduleFree 1.4.1).",
    'Pass another optimizer with a scheduler, such as `optim="adamw_torch"` with `lr_scheduler_type="cosine"`.',
)
OPTIMIZERS = {
    **dict.fromkeys(("lomo", "adalomo"), _IN_BACKWARD),
    **dict.fromkeys(
        (
            "galore_adamw_layerwise",
            "galore_adamw_8bit_layerwise",
            "galore_adafactor_layerwise",
            "apollo_adamw_layerwise",
        ),
        _IN_BACKWARD,
    ),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), _SCHEDULE_FREE),
}
# Packages and classes of optimizers that can be passed to Trainer as objects.
PACKAGES = {"lomo_optim": _IN_BACKWARD, "schedulefree": _SCHEDULE_FREE}
CLASSES = {"LayerWiseDummyOptimizer": _IN_BACKWARD}
ENGINES = {
    "DeepSpeed": Refusal(
        "It keeps gradients in flat buffers, where the absent gradient of a frozen weight may become a zero, and "
        "momentum and weight decay would then change the weight.",
        "Launch with `torchrun`, or `accelerate launch --multi_gpu`, without a DeepSpeed config; if the model does "
        'not fit, use FSDP2: `fsdp=True, fsdp_config={"version": 2}`.',
    ),
    "FSDP version 1": Refusal(
        "It flattens several weights into one parameter, and it is not proven that a frozen part stays bit-identical.",
        'Use FSDP2: `fsdp=True, fsdp_config={"version": 2}`, or `fsdp_version: 2` in the config of accelerate.',
    ),
    "nn.DataParallel": Refusal(
        "Trainer chooses it if one process sees several GPUs; it copies the model to each of them in every step, and "
        "it is not proven that blocks are skipped and frozen in the copies.",
        "Launch one process per GPU: `torchrun --nproc_per_node <GPUs> script.py`; or use only one GPU: "
        "`CUDA_VISIBLE_DEVICES=0`.",
    ),
}


def check_engine(args: TrainingArguments, model: nn.Module | None) -> None:
    """Raise `ConfigurationError` for an engine or a named optimizer that cannot run feature reuse.

    Args:
        args (`TrainingArguments`): of the trainer; options of `accelerate launch` are read from the environment.
        model (`torch.nn.Module`, *optional*): if it is spread over several devices, `nn.DataParallel` is not used.

    Example:
        >>> from transformers import TrainingArguments
        >>> from hf_featreuse.trainer.unsupported import check_engine
        >>> check_engine(TrainingArguments("outputs/run", use_cpu=True, report_to="none"), None)
        >>> try:
        ...     check_engine(TrainingArguments("outputs/run", optim="lomo", use_cpu=True, report_to="none"), None)
        ... except ValueError as error:
        ...     print(str(error)[:29])
        `optim="lomo"` cannot be used
    """
    if args.deepspeed or args.deepspeed_plugin is not None or _launched_with("DEEPSPEED"):
        _refuse("DeepSpeed", ENGINES["DeepSpeed"])
    if fsdp_version(args) == 1:
        _refuse("FSDP version 1", ENGINES["FSDP version 1"])
    name = str(getattr(args.optim, "value", args.optim))
    if name in OPTIMIZERS:
        _refuse(f'`optim="{name}"`', OPTIMIZERS[name])
    # As in Trainer, a model on several devices is not copied.
    is_spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    if args.n_gpu > 1 and not is_spread:
        _refuse("nn.DataParallel", ENGINES["nn.DataParallel"], f" on {args.n_gpu} GPUs")


def check_optimizer(optimizer: object) -> None:
    """Raise `ConfigurationError` for an optimizer, or a class of them, that cannot run feature reuse."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    for base in kind.__mro__:
        refusal = PACKAGES.get(base.__module__.split(".")[0]) or CLASSES.get(base.__name__)
        if refusal is not None:
            _refuse(f"The optimizer {kind.__module__}.{kind.__name__}", refusal)


def _refuse(what: str, refusal: Refusal, where: str = "") -> None:
    raise ConfigurationError(
        f"{what}{where} cannot be used with feature reuse. {refusal.reason} {refusal.way_out} Plain training, with "
        "`stochastic_depth_steps=0` and `masked_freeze_steps=0`, is not refused."
    )


def _launched_with(engine: str) -> bool:
    """Return whether `accelerate launch` was asked to use an engine."""
    return bool(strtobool(os.environ.get(f"ACCELERATE_USE_{engine}", "false")))


def fsdp_version(args: TrainingArguments) -> int | None:
    """Return the version of FSDP that Trainer or accelerate will use, or `None`."""
    if args.fsdp:
        # Without plugin arguments it is that of torch_xla.
        return 1 if args.fsdp_plugin_args is None else int(args.fsdp_plugin_args["fsdp_version"])
    return int(os.environ.get("FSDP_VERSION", "1")) if _launched_with("FSDP") else None
