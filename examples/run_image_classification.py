"""Train or fine-tune an image classifier with feature reuse.

    accelerate launch examples/run_image_classification.py

trains a small ViT from scratch on scikit-learn's handwritten digits. Takes every flag of the transformers example of
the same name, every TrainingArguments, and the options of feature reuse; or one .json file with any of these. The
flags are in image_classification_arguments.py, data and models in image_classification.py;
run_image_classification_no_trainer.py is the same training in a loop of its own.
"""

from __future__ import annotations

import sys

from image_classification import Setup, set_up, start_logging
from image_classification_arguments import check_output_dir, logger, parse_arguments

from hf_featreuse import FeatureReuseError, FeatureReuseTrainer
from hf_featreuse.data import ImageCollator, ImageSplit
from hf_featreuse.data.metrics import build_compute_metrics, rank_top_k
from hf_featreuse.folders import new_folder
from hf_featreuse.text import one_line


def make_trainer(setup: Setup) -> FeatureReuseTrainer:
    """Put model, data and metrics together."""
    return FeatureReuseTrainer(
        setup.model,
        setup.args,
        data_collator=ImageCollator.from_processor(setup.processor),
        train_dataset=setup.splits.get("train"),
        eval_dataset=setup.splits.get("validation"),
        processing_class=setup.processor,
        compute_metrics=build_compute_metrics(),
        preprocess_logits_for_metrics=rank_top_k,
    )


def report(trainer: FeatureReuseTrainer, prefix: str, metrics: dict[str, float], split: ImageSplit) -> None:
    """Print and save metrics as the transformers example does, with the images that were left out."""
    metrics[f"{prefix}_samples"] = len(split)
    if split.num_skipped:
        metrics[f"{prefix}_skipped_images"] = split.num_skipped
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)


def run(argv: list[str]) -> None:
    model_args, data_args, args = parse_arguments(argv)
    start_logging(args)
    checkpoint = check_output_dir(model_args, args)
    with new_folder(str(args.output_dir)):  # Without files if what follows fails, it is removed again.
        setup = set_up(model_args, data_args, args)
        trainer, splits = make_trainer(setup), setup.splits
        trainer.card_details = setup.card_details
        if args.do_train:
            result = trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
            report(trainer, "train", result.metrics, splits["train"])
            trainer.save_state()
        if args.do_eval:
            report(trainer, "eval", trainer.evaluate(), splits["validation"])
        if args.do_predict:
            metrics = trainer.predict(splits["test"], metric_key_prefix="predict").metrics
            report(trainer, "predict", metrics, splits["test"])
        if args.do_train:
            publish(trainer)


def publish(trainer: FeatureReuseTrainer) -> None:
    """Write the model card with the plot of the run; push all of it where asked to."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    logger.info(f"Model, results, card and plot are in {trainer.args.output_dir}")


def main() -> None:
    try:
        run(sys.argv[1:])
    except (FeatureReuseError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
