"""A Trainer whose pushes hold what they say, are never lost silently, and publish all that belongs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from hf_featreuse.averaging import WeightAverage
from hf_featreuse.checkpoints import is_adapter
from hf_featreuse.errors import HubError
from hf_featreuse.hub.folders import files_to_push
from hf_featreuse.hub.run_card import card_arguments, write_run_card, write_run_plot
from hf_featreuse.hub.sending import CARD_FILE, Target, make_repository, send

logger = logging.get_logger(__name__)

_SNAPSHOT_PREFIX = "_push-"
# Snapshot, where to, message, folder in the repository, and whether files for resuming belong.
_Job = tuple[Path, Target, str, str, bool]


class HubTrainer(Trainer):
    """`transformers.Trainer` with pushes that can be relied on; base of [`FeatureReuseTrainer`].

    A push while training goes on sends a snapshot of the checkpoint, so that the commit of step k holds the weights
    of step k. A push that fails is tried again, then reported with the command that repeats it; it stops training
    only if the repository cannot be made at the very beginning. `training_args.bin`, a pickle that holds the token,
    is never sent.

    Attributes:
        card_details (`Mapping[str, Any]`): arguments of `create_model_card` that hold for every card of this trainer,
            those of pushes while training goes on too: `finetuned_from`, `dataset`, `license`, `tags`.

    Raises:
        ConfigurationError: in `train()`, `card_details` holds what is no argument of `create_model_card`.
        HubError: at construction with `push_to_hub=True`, the repository cannot be made; in `push_to_hub()`, the push
            failed.
    """

    # Not to be changed in place: it belongs to every trainer.
    card_details: Mapping[str, Any] = MappingProxyType({})
    # Set by `RecipeTrainer`, with `ema_decay`.
    weight_average: WeightAverage | None = None
    push_in_progress: PushInProgress | None
    _pusher: ThreadPoolExecutor | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the base class does, once `card_details` can be used."""
        card_arguments(self.card_details)
        return super().train(*args, **kwargs)

    def _target(self, token: str | None = None, revision: str | None = None, private: bool | None = None) -> Target:
        """Where to push: what is given, else what the training arguments say."""
        args = self.args
        name = self.hub_model_id or args.hub_model_id or Path(str(args.output_dir)).absolute().name
        return Target(
            name,
            args.hub_revision if revision is None else revision,
            args.hub_private_repo if private is None else private,
            args.hub_token if token is None else token,
        )

    def init_hf_repo(
        self, token: str | None = None, private: bool | None = None, *, revision: str | None = None
    ) -> None:
        """Make the repository and its branch unless they exist; raise `HubError` if the Hub refuses."""
        if self.is_world_process_zero():
            self.hub_model_id = make_repository(
                hf_api(), self._target(token, revision, private), str(self.args.output_dir)
            )
            self.push_in_progress = None

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the model card of the run to `output_dir/README.md`, and the training plot beside it.

        Takes the arguments of `Trainer.create_model_card`; `language`, `tasks`, `dataset_tags` and `dataset_args` have
        no place in the card of an image classifier. What is not given is taken from `card_details`; `finetuned_from`
        of neither from the model, which knows the checkpoint or configuration it was made from. Without matplotlib
        there is no plot.
        """
        if self.is_world_process_zero():
            given = {"license": license, "tags": tags, "model_name": model_name, "dataset": dataset}
            folder = str(self.args.output_dir)
            write_run_plot(self, folder)  # pyright: ignore[reportArgumentType]
            self._write_card(folder, finetuned_from=finetuned_from, **given)

    def _write_card(self, folder: str | Path, **given: Any) -> None:
        details = {"finetuned_from": getattr(self.model, "name_or_path", None) or None}
        details.update(card_arguments(self.card_details))
        details.update({name: value for name, value in given.items() if value is not None})
        write_run_card(self, folder, **details)  # pyright: ignore[reportArgumentType]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer.save_model`. With `push_to_hub=True` it pushes too; a push that fails is only reported."""
        try:
            super().save_model(output_dir, _internal_call)
        except HubError as error:
            logger.error(str(error))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save model, image processor, plot and card, then push them.

        Args:
            commit_message (`str`, defaults to `"End of training"`): of the commit.
            blocking (`bool`, defaults to `True`): wait for the end of the push; else it goes on in the background.
            token (`str`, *optional*): by default `hub_token`, else the stored one.
            revision (`str`, *optional*): branch, made if missing; by default `hub_revision`.
            private (`bool`, *optional*): visibility of a repository that is made; by default `hub_private_repo`.
            kwargs: arguments of `create_model_card`.

        Returns:
            `CommitInfo`, or a `Future` of it with `blocking=False`; `None` on other processes than the first.

        Raises:
            HubError: the push failed; all is saved, and the message says how to push again. In the background it is
                logged, and raised by the future's `result()`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # Saved before the Hub is asked for anything.
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(str(self.args.output_dir))
        self._save_base_config(folder)
        self.create_model_card(**kwargs)
        self._finish_current_push()
        if self.hub_model_id is None or revision is not None:
            self.init_hf_repo(token=token, private=private, revision=revision)
            self._write_card(folder, **card_arguments(kwargs))  # Which names the repository now.
        target, message = self._target(token, revision, private), commit_message or "End of training"
        if blocking:
            return self._send(folder, target, message, folder)
        return self._in_background([(self._snapshot(folder, shutil.copy2), target, message, "", False)], folder)[0]

    def _save_base_config(self, folder: Path) -> None:
        """Write the configuration of an adapter's base: an adapter's files name no labels, the base's other ones."""
        model: Any = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if is_adapter(model) else None
        if isinstance(base, PreTrainedModel):
            base.config.save_pretrained(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the model of a checkpoint that was just written, and the checkpoint where the strategy says so."""
        strategy, step = self.args.hub_strategy, self.state.global_step
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            logger.info(f"Step {step} is not pushed: an earlier push still runs, and `hub_always_push` is not set.")
            return
        if not any(Path(checkpoint_folder).glob("*.safetensors")):
            logger.warning_once(
                f"Step {step} and later ones are not pushed: checkpoints hold the weights in shards, which only FSDP2 "
                'reads. The model is pushed whole at the end; `state_dict_type="FULL_STATE_DICT"` pushes each step.'
            )
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not running:  # What a process that was killed left behind.
            for stale in Path(str(self.args.output_dir)).glob(f"{_SNAPSHOT_PREFIX}*"):
                shutil.rmtree(stale, ignore_errors=True)
        try:
            jobs = self._checkpoint_jobs(Path(checkpoint_folder))
        except Exception as error:
            # The checkpoint is whole; neither a full disk here nor a card is a reason to stop training.
            again = self._target().again(checkpoint_folder)
            logger.error(f"Step {step} is not pushed: {error}. Push it later with `{again}`.")
            return
        self._in_background(jobs, Path(checkpoint_folder))

    def _checkpoint_jobs(self, checkpoint: Path) -> list[_Job]:
        """Pushes of the model of a checkpoint and, where the strategy says so, of the checkpoint, as they are now."""
        target, message = self._target(), f"Training in progress, step {self.state.global_step}"
        strategy = self.args.hub_strategy
        resumes = strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        model = self._model_snapshot(checkpoint, for_resuming=resumes)
        jobs = [(model, target, message, "", False)]
        if resumes:
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            whole = model
            if self.weight_average is not None:
                whole = self._snapshot(checkpoint, _link_or_copy, for_resuming=True)
            jobs.append((whole, target, f"{message}, checkpoint", f"{name}/", True))
        return jobs

    def _model_snapshot(self, checkpoint: Path, for_resuming: bool) -> Path:
        """The model of a checkpoint, with a card; with `ema_decay` the averaged one, whose results the card gives."""
        if self.weight_average is None:
            # Links cost no space, and stay when the checkpoint itself is deleted.
            snapshot = self._snapshot(checkpoint, _link_or_copy, for_resuming)
        else:
            snapshot = self._new_snapshot()
            with self.weight_average.applied():
                self._save(str(snapshot))
        self._save_base_config(snapshot)
        (snapshot / CARD_FILE).unlink(missing_ok=True)  # PEFT's, which may be a link to that of the checkpoint.
        self._write_card(snapshot)
        return snapshot

    def _new_snapshot(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=_SNAPSHOT_PREFIX, dir=str(self.args.output_dir)))

    def _snapshot(self, folder: Path, copy: Callable[[str, str], Any], for_resuming: bool = False) -> Path:
        """Keep the files of a folder as they are now, beside the run; those for resuming only where they are sent."""
        snapshot = self._new_snapshot()
        for name, path in files_to_push(folder, for_resuming=for_resuming).items():
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            copy(str(path), str(snapshot / name))
        return snapshot

    def _in_background(self, jobs: list[_Job], folder: Path) -> list[Future[CommitInfo]]:
        """Send, one after the other, commits from snapshots, then delete those; report what fails."""
        if self._pusher is None:
            self._pusher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        futures = []
        for snapshot, target, message, prefix, for_resuming in jobs:
            job = (snapshot, target, message, folder, prefix, for_resuming)
            futures.append(self._pusher.submit(self._send_and_report, *job))
        for snapshot in {job[0] for job in jobs}:
            self._pusher.submit(shutil.rmtree, snapshot, ignore_errors=True)
        earlier: Any = self.push_in_progress
        if earlier is None or earlier.is_done():
            self.push_in_progress = PushInProgress(futures)  # pyright: ignore[reportArgumentType]: it takes a list.
        else:
            earlier.jobs.extend(futures)
        return futures

    def _send_and_report(self, *job: Any) -> CommitInfo:
        try:
            return self._send(*job)
        except HubError as error:
            # Nobody may ever ask for the result.
            logger.error(str(error))
            raise

    @staticmethod
    def _send(
        source: Path, target: Target, message: str, folder: Path, prefix: str = "", for_resuming: bool = False
    ) -> CommitInfo:
        """Push the files of `source`; on failure, `folder` is what can be pushed again."""
        files = files_to_push(source, for_resuming=for_resuming)
        return send(hf_api(), target, {f"{prefix}{name}": path for name, path in files.items()}, message, folder)


def _link_or_copy(source: str, target: str) -> None:
    """Link a file, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
