"""Push a run, from snapshots in the background, without silent failures."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import CommitInfo
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from hf_featreuse.errors import HubError
from hf_featreuse.hub.folders import files_to_push
from hf_featreuse.hub.sending import CARD_FILE, Target, make_repository, send

logger = logging.get_logger(__name__)

_SNAPSHOT_PREFIX = "_push-"
# Snapshot, target, message, folder in the repository, and whether files for resuming are included.
_Job = tuple[Path, Target, str, str, bool]


class PushArguments(Protocol):
    """What a pusher reads of `TrainingArguments`."""

    output_dir: Any
    hub_model_id: str | None
    hub_revision: str | None
    hub_private_repo: bool | None
    hub_token: str | None
    hub_strategy: Any
    hub_always_push: bool


class Pusher:
    """Push the folder of a run and its checkpoints, in the foreground or from snapshots in the background.

    Args:
        args (`TrainingArguments`): what to push and where (`output_dir`, `hub_*`); read at each push.

    Attributes:
        repo_id (`str`, *optional*): id with its owner, once the repository exists.
        progress (`PushInProgress`, *optional*): the pushes in the background.

    Example:
        >>> from transformers import TrainingArguments
        >>> from hf_featreuse.hub import Pusher
        >>> Pusher(TrainingArguments("outputs/run", use_cpu=True, report_to="none")).target().repo_id
        'run'
    """

    repo_id: str | None = None
    progress: PushInProgress | None = None

    def __init__(self, args: PushArguments) -> None:
        self.args = args
        self._worker: ThreadPoolExecutor | None = None

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(str(self.args.output_dir))

    @property
    def is_running(self) -> bool:
        """Whether a push in the background has not ended."""
        return self.progress is not None and not self.progress.is_done()

    def target(self, token: str | None = None, revision: str | None = None, private: bool | None = None) -> Target:
        """Return where to push: the given values, else those of the training arguments."""
        args = self.args
        return Target(
            self.repo_id or args.hub_model_id or self.folder.absolute().name,
            args.hub_revision if revision is None else revision,
            args.hub_private_repo if private is None else private,
            args.hub_token if token is None else token,
        )

    def make_repository(self, target: Target) -> None:
        """Create the repository and its branch unless they exist; raise `HubError` if the Hub refuses."""
        self.repo_id = make_repository(hf_api(), target, str(self.args.output_dir))
        self.progress = None

    def push(self, target: Target, message: str, *, blocking: bool) -> CommitInfo | Future[CommitInfo]:
        """Push the folder of the run as it is now.

        Raises:
            HubError: the push failed. In the background it is logged, and raised by the future's `result()`.
        """
        if blocking:
            return _send(self.folder, target, message, self.folder)
        snapshot = self._snapshot(self.folder, shutil.copy2)
        return self._in_background([(snapshot, target, message, "", False)], self.folder)[0]

    def is_due(self, checkpoint: str | Path, step: int) -> bool:
        """Return whether to push a checkpoint that was just written; if not, log the reason."""
        if self.args.hub_strategy == "end":
            return False
        if self.is_running and not self.args.hub_always_push:
            logger.info(f"Step {step} is not pushed: an earlier push still runs, and `hub_always_push` is not set.")
            return False
        if not any(Path(checkpoint).glob("*.safetensors")):
            logger.warning_once(
                f"Step {step} and later ones are not pushed: checkpoints hold the weights in shards, which only FSDP2 "
                'reads. The whole model is pushed at the end; `state_dict_type="FULL_STATE_DICT"` pushes each step.'
            )
            return False
        return True

    def push_checkpoint(
        self,
        checkpoint: str | Path,
        step: int,
        *,
        finish: Callable[[Path], None],
        save_averaged: Callable[[Path], None] | None = None,
    ) -> None:
        """Push the model of a checkpoint in the background, and the checkpoint too if the strategy asks for it.

        A failure is logged with the command that pushes again; it never stops training.

        Args:
            checkpoint (`str` or `Path`): folder of a checkpoint that was just written.
            step (`int`): optimizer steps until then.
            finish (`Callable`): writes the card and further files into a folder with the model.
            save_averaged (`Callable`, *optional*): saves the model with averaged weights into a folder; by default
                the model of the checkpoint is pushed.
        """
        checkpoint = Path(checkpoint)
        if not self.is_running:  # Left by a process that was killed.
            for stale in self.folder.glob(f"{_SNAPSHOT_PREFIX}*"):
                shutil.rmtree(stale, ignore_errors=True)
        try:
            jobs = self._checkpoint_jobs(checkpoint, step, finish, save_averaged)
        except Exception as error:
            # The checkpoint is complete; a full disk here, or a card that fails, is not a reason to stop training.
            again = self.target().again(checkpoint)
            logger.error(f"Step {step} is not pushed: {error}. Push it later with `{again}`.")
            return
        self._in_background(jobs, checkpoint)

    def _checkpoint_jobs(
        self,
        checkpoint: Path,
        step: int,
        finish: Callable[[Path], None],
        save_averaged: Callable[[Path], None] | None,
    ) -> list[_Job]:
        """Prepare the pushes of a checkpoint's model and, if the strategy asks for it, of the checkpoint."""
        target, message, strategy = self.target(), f"Training in progress, step {step}", self.args.hub_strategy
        resumes = strategy in ("checkpoint", "all_checkpoints")
        if save_averaged is None:
            # Links take no space, and stay when the checkpoint itself is deleted.
            model = self._snapshot(checkpoint, _link_or_copy, for_resuming=resumes)
        else:
            model = self._new_snapshot()
            save_averaged(model)
        (model / CARD_FILE).unlink(missing_ok=True)  # PEFT's card, which may be a link to that of the checkpoint.
        finish(model)
        jobs = [(model, target, message, "", False)]
        if resumes:
            name = "last-checkpoint" if strategy == "checkpoint" else checkpoint.name
            complete = model
            if save_averaged is not None:
                complete = self._snapshot(checkpoint, _link_or_copy, for_resuming=True)
            jobs.append((complete, target, f"{message}, checkpoint", f"{name}/", True))
        return jobs

    def _new_snapshot(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=_SNAPSHOT_PREFIX, dir=self.folder))

    def _snapshot(self, folder: Path, copy: Callable[[str, str], Any], for_resuming: bool = False) -> Path:
        """Copy the files of a folder next to the run as they are now; those for resuming only if they are sent."""
        snapshot = self._new_snapshot()
        for name, path in files_to_push(folder, for_resuming=for_resuming).items():
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            copy(str(path), str(snapshot / name))
        return snapshot

    def _in_background(self, jobs: list[_Job], folder: Path) -> list[Future[CommitInfo]]:
        """Send commits from snapshots one after the other, log failures, and then delete the snapshots."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        futures = []
        for snapshot, target, message, prefix, for_resuming in jobs:
            job = (snapshot, target, message, folder, prefix, for_resuming)
            futures.append(self._worker.submit(_send_and_report, *job))
        for snapshot in {job[0] for job in jobs}:
            self._worker.submit(shutil.rmtree, snapshot, ignore_errors=True)
        if self.progress is None or self.progress.is_done():
            self.progress = PushInProgress(futures)  # pyright: ignore[reportArgumentType]: it takes a list.
        else:
            running: Any = self.progress.jobs
            running.extend(futures)
        return futures


def _send_and_report(*job: Any) -> CommitInfo:
    try:
        return _send(*job)
    except HubError as error:
        # Nobody may ever ask for the result.
        logger.error(str(error))
        raise


def _send(
    source: Path, target: Target, message: str, folder: Path, prefix: str = "", for_resuming: bool = False
) -> CommitInfo:
    """Push the files of `source`; an error names `folder` as what can be pushed again."""
    files = files_to_push(source, for_resuming=for_resuming)
    return send(hf_api(), target, {f"{prefix}{name}": path for name, path in files.items()}, message, folder)


def _link_or_copy(source: str, target: str) -> None:
    """Link a file, or copy it if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
