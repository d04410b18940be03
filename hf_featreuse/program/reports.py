"""Write the results of a run other than its metrics: the evaluation report and the predictions."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from pathlib import Path

from torch import nn

from hf_featreuse.data import OpenModel, open_classifier
from hf_featreuse.data.labels import SINGLE
from hf_featreuse.evaluation.splits import predict_split, report_on_split
from hf_featreuse.program.models import source_options
from hf_featreuse.program.setup import Setup
from hf_featreuse.text import joined

logger = logging.getLogger(__name__)

REPORT_FOLDER = "evaluation"
PREDICTIONS_FILE = "predictions.csv"
# Packages that only the report needs, by the name of their module.
_OPTIONAL = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def write_reports(setup: Setup) -> None:
    """Write `evaluation/` and `predictions.csv` for the saved or loaded model, according to the options.

    Call this in one process only: it opens the whole model again and communicates with no other process.

    Args:
        setup (`Setup`): the setup of the run.
    """
    args, task = setup.args, setup.data.problem_type
    if task != SINGLE:
        logger.info(f"No report and no predictions: they need one class per image, but the labels are for {task}.")
        return
    if setup.options.data.streaming:
        logger.info("No report and no predictions: they read a split twice, but `--streaming` reads it once.")
        return
    evaluates = bool(args.do_eval and _can_report(setup))
    if not evaluates and not args.do_predict:
        return
    opened = _open(setup)
    folder = Path(str(args.output_dir))
    common = {
        "batch_size": args.per_device_eval_batch_size,
        "num_workers": args.dataloader_num_workers,
        "disable_tqdm": True,
    }
    data = setup.options.data
    if evaluates:
        name = setup.data.name or data.dataset_name or data.validation_dir or data.train_dir
        _, page = report_on_split(
            opened,
            setup.data.splits["validation"],
            setup.data.label_names,
            folder / REPORT_FOLDER,
            about={"data": name, "split": "validation"},
            seed=args.seed,
            overwrite=True,
            **common,
        )
        logger.info(f"Report: {page}")
    if args.do_predict:
        file = folder / PREDICTIONS_FILE
        predict_split(opened, setup.data.splits["test"], setup.data.label_names, file, **common)
        logger.info(f"Predictions: {file}")


def _can_report(setup: Setup) -> bool:
    """Return whether a report can be written; if not, log why."""
    missing = [package for module, package in _OPTIONAL.items() if importlib.util.find_spec(module) is None]
    if missing:
        logger.info(
            f"No report in {REPORT_FOLDER}/: {joined(missing)} {'is' if len(missing) == 1 else 'are'} not installed. "
            'Run `pip install "hf_featreuse[plot]"`.'
        )
        return False
    return True


def _open(setup: Setup) -> OpenModel:
    """Return the model as this run saved or loaded it, on the device of the run."""
    model, args = setup.options.model, setup.args
    if args.do_train:
        opened = open_classifier(str(args.output_dir), trust_remote_code=model.trust_remote_code)
    elif model.model_name_or_path is not None:
        opened = open_classifier(model.model_name_or_path, needs_processor=False, **source_options(model))
        opened = dataclasses.replace(opened, processor=setup.processor)
    else:
        opened = OpenModel(type(setup.model).__name__, setup.model.eval(), setup.processor)
    nn.Module.to(opened.model, args.device)
    return opened
