"""Train or fine-tune an image classifier with feature reuse.

    accelerate launch examples/run_image_classification.py

trains a small ViT from scratch on scikit-learn's handwritten digits, as `featreuse train` does. It takes every flag of
the transformers example of the same name, all TrainingArguments, and the options of feature reuse; `--help` lists
them. run_image_classification_no_trainer.py is the same training as a plain loop. To change the training, such as the
loss, copy this file and replace a part of it.
"""

from hf_featreuse.program import exit_on_error, make_trainer, prepare, train_and_report


def run(argv: list[str]) -> None:
    """Load data and model, train, evaluate, and write the results to the output folder."""
    with prepare(argv) as setup:
        train_and_report(make_trainer(setup), setup)


def main() -> None:
    """Run with the command line of this process; errors of the user are one line."""
    exit_on_error(run)


if __name__ == "__main__":
    main()
