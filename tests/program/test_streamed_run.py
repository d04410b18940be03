"""`featreuse train --streaming`: it learns, resumes exactly, and refuses what a stream cannot do."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from safetensors.torch import load_file
from training_runs import same_bits

from hf_featreuse import ConfigurationError
from hf_featreuse.program.running import run

FLAGS = ["--streaming", "--model_type", "resnet", "--image_scale_min", "0.9", "--horizontal_flip", "0", "--use_cpu",
         "--disable_tqdm", "true", "--per_device_train_batch_size", "32"]  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """scikit-learn's digits as Parquet files, the last 360 for validation."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data, folder = load_digits(), tmp_path_factory.mktemp("digits")
    images = [Pillow.fromarray(pixels) for pixels in np.rint(data.images * (255 / 16)).astype(np.uint8)]
    features = Features({"image": Image(), "label": ClassLabel(names=list("0123456789"))})
    for name, rows in (("train", slice(0, 1437)), ("validation", slice(1437, None))):
        columns = {"image": images[rows], "label": data.target[rows].tolist()}
        Dataset.from_dict(columns, features).to_parquet(str(folder / f"{name}.parquet"))
    return str(folder)


def train(digits, output, *more):
    run(["--dataset_name", digits, "--output_dir", str(output), *FLAGS, *more])
    return output


@pytest.mark.slow
def test_a_stream_reaches_an_accuracy(digits, tmp_path):
    output = train(digits, tmp_path / "run", "--max_steps", "180", "--eval_strategy", "no", "--save_strategy", "no")
    found = json.loads((output / "eval_results.json").read_text())
    # Measured: 0.925 of 360 images, by other writers than those of training.
    assert found["eval_accuracy"] > 0.85
    assert not (output / "evaluation").exists()


@pytest.mark.slow
def test_a_resumed_stream_is_exact(digits, tmp_path):
    common = ["--max_steps", "60", "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "25"]
    whole = train(digits, tmp_path / "whole", *common)
    # In the second pass, in which the images come in another order.
    checkpoint = ["--resume_from_checkpoint", str(whole / "checkpoint-50")]
    resumed = train(digits, tmp_path / "resumed", *common, *checkpoint)
    assert same_bits(*(load_file(folder / "model.safetensors") for folder in (whole, resumed)))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ([], "Pass `--max_steps`"),
        (["--max_steps", "1", "--skip_bad_images"], "leave out"),
        (["--max_steps", "1", "--do_train", "--do_predict"], "`--do_predict` needs a test split"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(digits, tmp_path, more, match):
    with pytest.raises(ConfigurationError, match=match):
        train(digits, tmp_path / "run", *more)
