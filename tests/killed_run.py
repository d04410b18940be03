"""A training process that tells how far it is, so that a test can kill it at any point."""

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tiny_models import build, examples
from training_runs import config, state_of, with_dropout

from hf_featreuse import FeatureReuseTrainer
from hf_featreuse.checkpoints.completeness import newest_whole

STEPS = 12
CASES: dict[str, dict[str, Any]] = {
    "1:1, accumulation": {"gradient_accumulation_steps": 2, "logging_steps": 5},
    "2:1, by sample": {"stochastic_depth_steps": 2, "drop_granularity": "sample", "logging_steps": 4},
    "fewer checkpoints": {"optim": "sgd", "optim_args": "momentum=0.9", "logging_steps": 5, "save_total_limit": 2},
}


class Telling(FeatureReuseTrainer):
    """Sends a line before and after each part of a step and of a save."""

    def __init__(self, connection: Connection | None, *args: Any, **kwargs: Any) -> None:
        self.connection, self.kind = connection, "start"
        super().__init__(*args, **kwargs)

    def tell(self, part: str) -> None:
        if self.connection is not None:
            self.connection.send_bytes(f"{self.state.global_step} {self.kind} {part}".encode())

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.kind = self.feature_reuse.current_plan.kind.value
        self.tell("forward")
        loss = super().compute_loss(*args, **kwargs)
        self.tell("backward")
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.tell("save of weights")
        super()._save_checkpoint(*args, **kwargs)
        self.tell("after a save")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.tell("save of the optimizer")
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self.tell("save of random states and sums")
        super()._save_rng_state(output_dir)


def train_to_the_end(folder: Path, case: str, connection: Connection | None) -> None:
    """Train, from the last complete checkpoint if there is one, and write the end of the run."""
    folder.mkdir(exist_ok=True)
    for stream, name in ((1, os.devnull), (2, folder / "errors.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    arguments = config(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        weight_decay=0.1,
        **CASES[case],
    )
    model = with_dropout(build("vit"))
    trainer = Telling(connection, model, arguments, train_dataset=examples(14))
    # `True` is what `--resume_from_checkpoint last` passes; a run that was killed before its first save starts again.
    trainer.train(resume_from_checkpoint=newest_whole(folder)[0] is not None)
    result = {
        "weights": state_of(trainer.model),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "history": trainer.state.log_history,
    }
    torch.save(result, folder / "result.part")
    (folder / "result.part").rename(folder / "result.pt")
