"""A Trainer that writes the card of a run and pushes its model to the Hub; its subclass trains with feature reuse."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hf_featreuse.hub import Pusher, RunSummary, write_run_card
from hf_featreuse.hub.run_card import card_arguments, write_base_config, write_run_plot
from hf_featreuse.method.feature_reuse import FeatureReuse
from hf_featreuse.trainer.arguments import FeatureReuseArguments
from hf_featreuse.trainer.recipe import Recipe
from hf_featreuse.trainer.resumable import ResumableTrainer


class PublishingTrainer(ResumableTrainer):
    """Adds cards and pushes to [`ResumableTrainer`]; a base class of [`FeatureReuseTrainer`], which sets the rest."""

    # Read-only, because it is shared by all trainers.
    card_details: Mapping[str, Any] = MappingProxyType({})
    feature_reuse: FeatureReuse | None = None
    recipe: Recipe
    # Whether every stochastic-depth step so far scaled the kept blocks.
    _scales = True

    @property
    def reuse_args(self) -> FeatureReuseArguments:
        """The options of feature reuse: those of `args`, or the defaults if it is a plain `TrainingArguments`."""
        return self.args if isinstance(self.args, FeatureReuseArguments) else FeatureReuseArguments()

    @cached_property
    def pusher(self) -> Pusher:
        """What pushes this run to the Hub."""
        return Pusher(self.args)

    def init_hf_repo(
        self, token: str | None = None, private: bool | None = None, *, revision: str | None = None
    ) -> None:
        """Create the repository and its branch unless they exist; raise `HubError` if that fails."""
        if self.is_world_process_zero():
            self.pusher.make_repository(self.pusher.target(token, revision, private))
            self.hub_model_id = self.pusher.repo_id
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
        """Write the model card of the run to `output_dir/README.md`, and the training plot next to it.

        Takes the arguments of `Trainer.create_model_card`; `language`, `tasks`, `dataset_tags` and `dataset_args` are
        not used in the card of an image classifier. Missing arguments are taken from `card_details`, then
        `finetuned_from` from the model, which knows its checkpoint or configuration. Without matplotlib there is no
        plot.
        """
        if self.is_world_process_zero():
            given = {"license": license, "tags": tags, "model_name": model_name, "dataset": dataset}
            folder = str(self.args.output_dir)
            write_run_plot(self._summary(), folder)
            self._write_card(folder, finetuned_from=finetuned_from, **given)

    def _write_card(self, folder: str | Path, **given: Any) -> None:
        details = card_arguments(self.card_details)
        details.update({name: value for name, value in given.items() if value is not None})
        write_run_card(self._summary(details.pop("model_name", None)), folder, **details)

    def _summary(self, name: str | None = None) -> RunSummary:
        """Return the facts of the run for its card and plot."""
        args, state, reuse = self.args, self.state, self.feature_reuse
        loads_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        return RunSummary(
            name=self.pusher.repo_id or name or self.pusher.target().repo_id,
            model=self.accelerator.unwrap_model(self.model),
            settings={**self.reuse_args.settings(), "scale_kept": self.reuse_args.scale_kept and self._scales},
            schedule=None if reuse is None else reuse.schedule,
            block_names=[] if reuse is None else [block.name for block in reuse.blocks],
            # `to_dict` replaces enums by plain values.
            arguments={**args.to_dict(), "mixed_precision": args.mixed_precision},
            processes=args.world_size,
            steps=state.global_step,
            max_steps=state.max_steps,
            log_history=state.log_history,
            best_step=state.best_global_step if loads_best else None,
        )

    def _finish_folder(self, folder: Path) -> None:
        """Write the card and, for an adapter, the base configuration to a folder with the model."""
        write_base_config(self.accelerator.unwrap_model(self.model), folder)
        self._write_card(folder)

    def _save_averaged(self, folder: Path) -> None:
        with self.recipe.averaged():
            self._save(str(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the model of a checkpoint that was just written, and the checkpoint if the strategy asks for it."""
        step = self.state.global_step
        if not self.is_world_process_zero() or not self.pusher.is_due(checkpoint_folder, step):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        averaged = None if self.recipe.average is None else self._save_averaged
        self.pusher.push_checkpoint(checkpoint_folder, step, finish=self._finish_folder, save_averaged=averaged)
        self.push_in_progress = self.pusher.progress

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
            commit_message (`str`, defaults to `"End of training"`): commit message.
            blocking (`bool`, defaults to `True`): wait until the push is finished; otherwise push in the background.
            token (`str`, *optional*): by default `hub_token`, or the stored one.
            revision (`str`, *optional*): branch, created if missing; by default `hub_revision`.
            private (`bool`, *optional*): visibility of a new repository; by default `hub_private_repo`.
            kwargs: arguments of `create_model_card`.

        Returns:
            `CommitInfo`, or a `Future` of it with `blocking=False`; `None` on other processes than the first.

        Raises:
            HubError: the push failed; everything is saved, and the message contains the command that pushes again. In
                the background it is logged, and raised by the future's `result()`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # Save before any request to the Hub.
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = self.pusher.folder
        write_base_config(self.accelerator.unwrap_model(self.model), folder)
        self.create_model_card(**kwargs)
        self._finish_current_push()
        if self.pusher.repo_id is None or revision is not None:
            self.init_hf_repo(token=token, private=private, revision=revision)
            self._write_card(folder, **card_arguments(kwargs))  # The card names the repository, which is now known.
        target = self.pusher.target(token, revision, private)
        pushed = self.pusher.push(target, commit_message or "End of training", blocking=blocking)
        self.push_in_progress = self.pusher.progress
        return pushed
