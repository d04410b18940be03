"""Two processes that train together, of which the second is lost at a point that the test chooses."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from killed_run import Telling
from tiny_models import build, examples
from torch import distributed as dist
from training_runs import config, state_of, traces, with_dropout

from hf_featreuse.checkpoints.completeness import newest_whole
from hf_featreuse.trainer import resumable as resumable_module

STEPS = 8
# From this step on the fault may come: a checkpoint is there by then.
EARLIEST = 3


class Losing(Telling):
    """Is killed, or raises, on rank 1 at the first such point from `EARLIEST` on."""

    fault, point, folder = "", "", Path()

    def tell(self, part: str) -> None:
        at_point = f"{self.kind} {part}".endswith(self.point) and self.state.global_step >= EARLIEST
        if self.fault and self.args.process_index == 1 and at_point:
            (self.folder / "lost.json").write_text(json.dumps([time.time(), self.state.global_step, self.kind]))
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("bad luck on rank 1")


def train_rank(rank: int, port: int, folder: Path, fault: str = "", point: str = "") -> None:
    """Run one of two processes, from the last complete checkpoint if there is one."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(folder / f"log_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    run(folder, fault, point)


def run(folder: Path, fault: str, point: str) -> None:
    """Train, and write what the run ended with, or how this process came through the end of the other one."""
    torch.set_num_threads(1)
    arguments = config(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
        weight_decay=0.1,
        logging_steps=3,
    )
    trainer = Losing(None, with_dropout(build("vit")), arguments, train_dataset=examples(20))
    trainer.fault, trainer.point, trainer.folder = fault, point, folder
    rank = trainer.args.process_index
    with survived(trainer, folder / f"survivor_{rank}.json"):
        trainer.train(resume_from_checkpoint=newest_whole(folder)[0] is not None)
    result = {
        "weights": state_of(trainer.model),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "history": trainer.state.log_history,
        "world": trainer.accelerator.num_processes,
    }
    torch.save(result, folder / f"result_{rank}.pt")
    dist.destroy_process_group()


@contextmanager
def survived(trainer: Losing, path: Path) -> Iterator[None]:
    """Write what an error that ends training leaves behind."""
    before, said = traces(trainer.model), []
    resumable_module.logger.warning = said.append
    try:
        yield
    except BaseException as error:
        found: dict[str, Any] = {
            "time": time.time(),
            "error": f"{type(error).__name__}: {error}",
            "said": said,
            "model is as before": traces(trainer.model) == before,
            "all train": all(parameter.requires_grad for parameter in trainer.model.parameters()),
            "no step is open": trainer.feature_reuse.current_plan is None,
        }
        path.write_text(json.dumps(found))
        raise


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[2:])
