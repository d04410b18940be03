"""The example as a user calls it: its defaults, the flags of the transformers example, resume, and bad input."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from hf_featreuse import BadImageError, BlockError, ConfigurationError, DataError, FeatureReuseError

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_image_classification.py"
TINY = ["--config_overrides", "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=16"]
SHORT = ["--max_steps", "4", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("run_image_classification", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses resolve their annotations through sys.modules.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Two classes of eight noisy 12x12 images each, and the same for validation."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for index in range(8):
                pixels = noise.integers(0, 255, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index}.png")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_the_default_run_leaves_what_the_readme_promises(example, tmp_path):
    out = tmp_path / "out"
    example.run(["--output_dir", str(out), *TINY, *SHORT])
    assert {"train_loss", "eval_accuracy", "eval_top5_accuracy", "eval_loss"} <= set(results(out))
    for name in ("README.md", "training.png", "train_results.json", "eval_results.json", "trainer_state.json"):
        assert (out / name).stat().st_size > 0
    model = AutoModelForImageClassification.from_pretrained(out)
    assert model.config.id2label[3] == "3"
    answers = pipeline("image-classification", model=str(out))(Image.new("RGB", (8, 8)))
    assert {answer["label"] for answer in answers} <= set("0123456789")


def test_the_pipeline_predicts_what_evaluation_measured(example, tmp_path, image_folder, cache):
    out = tmp_path / "out"
    folders = ["--train_dir", f"{image_folder}/train", "--validation_dir", f"{image_folder}/validation"]
    example.run([*folders, "--model_type", "vit", "--output_dir", str(out), *TINY, *SHORT])
    classify = pipeline("image-classification", model=str(out))
    files = sorted((image_folder / "validation").rglob("*.png"))
    right = [classify(str(file))[0]["label"] == file.parent.name for file in files]
    assert results(out)["eval_accuracy"] == pytest.approx(sum(right) / len(right))


@pytest.mark.slow
def test_convnext_trains_from_a_single_json_file(example, tmp_path, image_folder, cache):
    out = tmp_path / "out"
    settings = {
        "train_dir": f"{image_folder}/train", "validation_dir": f"{image_folder}/validation",
        "model_type": "convnext", "output_dir": str(out), "max_steps": 2, "use_cpu": True, "disable_tqdm": True,
        "target_blocks": ["layers.0", "layers.1"], "drop_rate": 0.3, "logging_steps": 1,
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(settings))
    example.run([str(tmp_path / "run.json")])
    assert AutoModelForImageClassification.from_pretrained(out).config.model_type == "convnext"


@pytest.mark.slow
def test_flags_of_the_transformers_example_fine_tune_a_checkpoint(example, tmp_path, image_folder, cache):
    start, out = tmp_path / "start", tmp_path / "out"
    example.run(["--output_dir", str(start), *TINY, *SHORT])
    flags = [
        "--dataset_name", str(image_folder), "--model_name_or_path", str(start), "--output_dir", str(out),
        "--remove_unused_columns", "False", "--image_column_name", "image", "--label_column_name", "label",
        "--do_train", "--do_eval", "--learning_rate", "2e-5", "--num_train_epochs", "1",
        "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "8", "--logging_strategy", "steps",
        "--logging_steps", "10", "--eval_strategy", "epoch", "--save_strategy", "epoch",
        "--load_best_model_at_end", "True", "--save_total_limit", "3", "--seed", "1337",
        "--train_val_split", "0.15", "--max_train_samples", "16", "--max_eval_samples", "8",
        "--model_revision", "main", "--ignore_mismatched_sizes", "--disable_tqdm", "true", "--use_cpu", "true",
    ]  # fmt: skip
    example.run(flags)
    assert results(out)["eval_samples"] == 8
    assert results(out)["train_samples"] == 16


@pytest.mark.slow
def test_a_head_of_another_size_names_the_flag(example, tmp_path, image_folder, cache):
    start = tmp_path / "start"
    example.run(["--output_dir", str(start), *TINY, *SHORT])
    with pytest.raises(ConfigurationError, match="--ignore_mismatched_sizes"):
        example.run(
            [
                "--dataset_name",
                str(image_folder),
                "--model_name_or_path",
                str(start),
                "--output_dir",
                str(tmp_path / "o"),
            ]
        )


@pytest.mark.slow
def test_prediction_alone_writes_its_own_results(example, tmp_path, image_folder, cache):
    start, out = tmp_path / "start", tmp_path / "out"
    folders = ["--train_dir", f"{image_folder}/train", "--validation_dir", f"{image_folder}/validation"]
    example.run([*folders, "--model_type", "vit", "--output_dir", str(start), *TINY, *SHORT])
    with pytest.raises(FeatureReuseError, match="test"):
        example.run([*folders, "--model_name_or_path", str(start), "--do_predict", "--output_dir", str(out)])


@pytest.mark.slow
def test_an_interrupted_run_resumes_from_its_checkpoint(example, tmp_path):
    # Three steps an epoch: the run is cut inside the first epoch, at its end, and inside the second.
    flags = [*TINY, "--disable_tqdm", "true", "--use_cpu", "true", "--save_strategy", "steps", "--save_steps", "1"]
    flags += [
        "--eval_strategy",
        "no",
        "--lr_scheduler_type",
        "constant",
        "--warmup_steps",
        "0",
        "--save_total_limit",
        "9",
    ]
    flags += ["--max_train_samples", "96", "--max_steps", "7"]
    whole = tmp_path / "whole"
    example.run(["--output_dir", str(whole), *flags])
    first = AutoModelForImageClassification.from_pretrained(whole).state_dict()
    for step in (2, 3, 4):
        resumed = tmp_path / str(step)
        shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        with pytest.raises(ConfigurationError, match=r"contains checkpoints.*last`.*--overwrite_output_dir.*another"):
            example.run(["--output_dir", str(resumed), *flags])
        example.run(["--output_dir", str(resumed), *flags, "--resume_from_checkpoint", "last"])
        second = AutoModelForImageClassification.from_pretrained(resumed).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first), step


@pytest.mark.slow
def test_the_error_for_a_finished_run_says_what_to_pass(example, tmp_path):
    flags = ["--output_dir", str(tmp_path / "out"), *TINY, *SHORT]
    example.run(flags)
    with pytest.raises(ConfigurationError, match=r"finished run of 4 steps.*--overwrite_output_dir"):
        example.run(flags)
    example.run([*flags, "--overwrite_output_dir"])


def test_a_folder_with_other_files_is_not_written_into(example, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="not empty"):
        example.run(["--output_dir", str(tmp_path), *TINY, *SHORT])


def test_an_output_folder_that_cannot_be_written_is_refused_before_loading(example, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        example.run(["--output_dir", str(tmp_path / "file" / "out"), "--dataset_name", "never/looked/at"])


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--drop_rate", "1"], ConfigurationError, "drop_rate"),
        (["--stochastic_depth_steps", "-1"], ConfigurationError, "stochastic_depth_steps"),
        (["--reuse_start", "0.5", "--reuse_end", "0.5"], ConfigurationError, "window"),
        (["--target_blocks", "layers"], BlockError, "Candidates: vit.layers.0"),
        (["--model_type", "mobilenet_v1"], BlockError, "no residual block"),
        (["--model_type", "vitt"], ConfigurationError, "vitt"),
        (["--config_overrides", "hidden=3"], ConfigurationError, "hidden"),
        (["--dataset_name", "no/such/folder"], DataError, "no/such/folder"),
        (["--dropp_rate", "0.3"], ConfigurationError, "Did you mean --drop_rate"),
        (["--train_d", "images"], ConfigurationError, "Did you mean.*--train_dir"),
        (["--model_name_or_path", "no/such-model"], ConfigurationError, "no/such-model.*cannot be loaded"),
        (["--model_type", "vit", "--model_name_or_path", "x"], ConfigurationError, "from scratch"),
    ],
)
def test_bad_options_are_named_before_training(example, tmp_path, flags, error, message):
    with pytest.raises(error, match=message):
        example.run(["--output_dir", str(tmp_path / "out"), *SHORT, *flags])


def test_unknown_columns_name_those_there_are(example, tmp_path, image_folder, cache):
    common = ["--dataset_name", str(image_folder), "--model_type", "vit", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(DataError, match=r"img.*--image_column_name.*'image'"):
        example.run([*common, "--image_column_name", "img"])
    with pytest.raises(DataError, match=r"fine_label.*--label_column_name.*'label'"):
        example.run([*common, "--label_column_name", "fine_label"])


@pytest.mark.slow
def test_a_corrupt_image_is_named_or_left_out_and_counted(example, tmp_path, image_folder, cache):
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    bad = folder / "train" / "cat" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    flags = [
        "--train_dir",
        f"{folder}/train",
        "--validation_dir",
        f"{folder}/validation",
        "--model_type",
        "vit",
        *TINY,
    ]
    with pytest.raises(BadImageError, match=str(bad)):
        example.run([*flags, *SHORT, "--output_dir", str(tmp_path / "a")])
    example.run([*flags, *SHORT, "--output_dir", str(tmp_path / "b"), "--skip_bad_images"])
    assert results(tmp_path / "b")["train_skipped_images"] == 1
    assert results(tmp_path / "b")["train_samples"] == 15


def test_errors_end_the_command_in_one_line(example, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--output_dir", str(tmp_path / "out"), "--drop_rate", "2"])
    with pytest.raises(SystemExit, match=r"^error: `drop_rate=2.0` is not a probability"):
        example.main()
