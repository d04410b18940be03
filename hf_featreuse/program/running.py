"""Train, evaluate, predict and publish: the program behind `featreuse train`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence, Sized
from typing import Any

from transformers import EarlyStoppingCallback

from hf_featreuse.data import ImageCollator, ImageSplit
from hf_featreuse.data.metrics import metrics_for
from hf_featreuse.errors import FeatureReuseError
from hf_featreuse.program.config_file import saved_options
from hf_featreuse.program.reports import write_reports
from hf_featreuse.program.setup import Setup, prepare
from hf_featreuse.text import one_line
from hf_featreuse.trainer.trainer import FeatureReuseTrainer

logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> None:
    """Train, evaluate and predict according to the options; see [`parse_arguments`].

    Args:
        argv (`Sequence[str]`): the command line without the name of the program.

    Raises:
        FeatureReuseError: an option, the data or a checkpoint cannot be used.
    """
    with prepare(argv) as setup:
        train_and_report(make_trainer(setup), setup)


def make_trainer(setup: Setup) -> FeatureReuseTrainer:
    """Make the trainer from model, data, metrics and early stopping.

    Args:
        setup (`Setup`): from [`prepare`].
    """
    run = setup.options.run
    stopping: list[Any] = []
    if run.early_stopping_patience is not None:
        stopping = [EarlyStoppingCallback(run.early_stopping_patience, run.early_stopping_threshold)]
    metrics: dict[str, Any] = metrics_for(setup.data.problem_type)
    trainer = FeatureReuseTrainer(
        setup.model,
        setup.args,
        data_collator=ImageCollator.from_processor(setup.processor),
        train_dataset=setup.splits.get("train"),
        eval_dataset=setup.splits.get("validation"),
        processing_class=setup.processor,
        callbacks=stopping,
        **metrics,
    )
    trainer.card_details = setup.card_details
    return trainer


def train_and_report(trainer: FeatureReuseTrainer, setup: Setup) -> None:
    """Run `--do_train`, `--do_eval` and `--do_predict`, and write the results to the output folder.

    Args:
        trainer (`FeatureReuseTrainer`): from [`make_trainer`], or your own.
        setup (`Setup`): from [`prepare`].
    """
    args, splits = setup.args, setup.splits
    if args.do_train:
        with saved_options(setup.options):
            result = trainer.train(resume_from_checkpoint=setup.resume_from)
        trainer.save_model()
        _report(trainer, "train", result.metrics, splits["train"])
        trainer.save_state()
    if args.do_eval:
        _report(trainer, "eval", trainer.evaluate(), splits["validation"])
    if args.do_predict:
        metrics = trainer.predict(splits["test"], metric_key_prefix="predict").metrics
        _report(trainer, "predict", metrics or {}, splits["test"])
    if args.do_train:
        _publish(trainer)
    # Last, because only the first process writes them.
    if args.should_save:
        write_reports(setup)


def _report(trainer: FeatureReuseTrainer, prefix: str, metrics: dict[str, float], split: ImageSplit) -> None:
    """Print and save metrics as the transformers example does, with the number of skipped images."""
    if isinstance(split, Sized):  # A stream has no length.
        metrics[f"{prefix}_samples"] = len(split)
    if split.num_skipped:
        metrics[f"{prefix}_skipped_images"] = split.num_skipped
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)


def _publish(trainer: FeatureReuseTrainer) -> None:
    """Write the model card with the plot of the run; with `--push_to_hub` push everything."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    logger.info(f"Model, results, card and plot are in {trainer.args.output_dir}")


def exit_on_error(run: Callable[[list[str]], object]) -> None:
    """Run a program with the command line of this process; exit with a one-line message on a user error.

    Args:
        run (`Callable`): takes the command line without the name of the program.
    """
    try:
        run(sys.argv[1:])
    except (FeatureReuseError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
