"""A Trainer that goes on exactly where it was: what is mended of Trainer itself, apart from the method."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer
from transformers.utils import logging

from hf_featreuse.checkpoints import load_exactly, resolve_checkpoint

logger = logging.get_logger(__name__)


class ExactTrainer(Trainer):
    """`transformers.Trainer` with strict checkpoints and data sets that know their epoch; no feature reuse.

    Base of [`FeatureReuseTrainer`]. Weights are restored to the bit or not at all, a checkpoint that is cut short is
    passed over for the last whole one before it, and random transforms draw the same in a resumed epoch.

    Raises:
        CheckpointError: in `train()`, no checkpoint is whole or one does not hold every weight.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train`. A checkpoint that is cut short is passed over for the last whole one before it."""
        return super().train(resolve_checkpoint(resume_from_checkpoint, str(self.args.output_dir)), *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # accelerate 1.15 tells a data set its epoch, but neither with several processes nor in the epoch of a resume.
        dataset = kwargs["train_dataloader"].dataset
        if callable(set_epoch := getattr(dataset, "set_epoch", None)):
            set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    @property
    def _shards(self) -> bool:
        """Whether an engine keeps the weights in shards and loads them itself."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._shards or not load_exactly(self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        if folder is None or self._shards or not load_exactly(self.model, folder):
            super()._load_best_model()
        else:
            logger.info(f"Loaded the best model from {folder} (score: {self.state.best_metric}).")
