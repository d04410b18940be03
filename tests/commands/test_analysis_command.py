"""`featreuse analyze` on tiny checkpoints and the handwritten digits."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny_checkpoints import DIGITS, save
from transformers import AutoModelForImageClassification

from hf_featreuse.analysis import analyze_model
from hf_featreuse.cli import main
from hf_featreuse.data import EvalTransform, ImageCollator, load_image_data
from hf_featreuse.small_models import small_image_processor

pytest.importorskip("matplotlib", reason="plots need the extra `examples`")
pytest.importorskip("sklearn", reason="the digits need the extra `examples`")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def deeper(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("models") / "deeper", 3)


def analyze(tmp_path, *arguments: str) -> tuple[int, dict | None]:
    """Run the command and read its JSON."""
    folder = tmp_path / "report"
    options = ["--output_dir", str(folder), "--disable_tqdm", "--device", "cpu"]
    code = main(["analyze", *arguments, *options])
    path = folder / "analysis.json"
    return code, json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def test_two_models_side_by_side(tiny, deeper, tmp_path, capsys):
    code, content = analyze(tmp_path, tiny, deeper, "--max_samples", "40", "--batch_size", "16")
    assert code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [model["model"] for model in content["models"]] == [tiny, deeper]
    assert [len(model["blocks"]) for model in content["models"]] == [2, 3]
    assert [model["num_samples"] for model in content["models"]] == [40, 40]
    assert content["data"] == {
        "data": "scikit-learn digits",
        "split": "validation",
        "images": 40,
        "batch size": 16,
        "random draws": 10,
        "seed": 42,
    }
    assert f"{tiny}: ViTForImageClassification" in out and "#  block of vit.layers" in out
    assert out.endswith(f"Report: {tmp_path / 'report' / 'index.html'}\n")
    assert (tmp_path / "report" / "drop_many.png").exists()


def test_figures_are_those_of_the_images_of_the_split(tiny, tmp_path):
    _, content = analyze(tmp_path, tiny, "--batch_size", "360", "--random_draws", "0")
    opened = AutoModelForImageClassification.from_pretrained(tiny)
    processor = small_image_processor(opened.config, 8)
    split = load_image_data().splits["validation"].with_transform(EvalTransform(processor))
    whole = ImageCollator.from_processor(processor)([split[i] for i in range(360)])
    expected = analyze_model(opened, [whole], random_draws=0, disable_tqdm=True)
    found = content["models"][0]
    assert found["accuracy"]["correct"] == expected.accuracy.correct
    for block, other in zip(found["blocks"], expected.blocks, strict=True):
        assert block["residual_ratio"] == pytest.approx(other.residual_ratio, rel=1e-5)
        assert block["accuracy_without"]["correct"] == other.accuracy_without.correct
    # One batch in another order.
    assert found["cka"][0][1] == pytest.approx(expected.cka[0][1], rel=1e-5)


def test_same_command_gives_the_same_figures(tiny, tmp_path):
    first, second, other = (
        analyze(tmp_path / str(i), tiny, "--max_samples", "30", "--random_draws", "1", "--seed", seed)[1]
        for i, seed in enumerate(("1", "1", "2"))
    )
    assert first == second
    assert first["models"][0]["cka"] != other["models"][0]["cka"]


def test_labels_are_matched_by_name(tiny, tmp_path):
    """A model with its classes in another order has the same accuracy once its head is reordered likewise."""
    model = AutoModelForImageClassification.from_pretrained(tiny)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())
    model.config.id2label = {i: DIGITS[order[i]] for i in range(10)}
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    folder = tmp_path / "reordered"
    model.save_pretrained(folder)
    small_image_processor(model.config, 8).save_pretrained(folder)
    code, content = analyze(tmp_path, tiny, str(folder), "--random_draws", "0")
    assert code == 0
    assert content["models"][0]["accuracy"] == content["models"][1]["accuracy"]


@pytest.fixture
def pets(tmp_path) -> list[str]:
    """A folder of 24 images, as arguments."""
    for index in range(24):
        folder = tmp_path / "images" / "train" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * index, 0, 90)).save(folder / f"{index}.png")
    return ["--data", str(tmp_path / "images"), "--batch_size", "4"]


def test_image_folder_split_and_targets(tmp_path, capsys, pets):
    model = save(tmp_path / "pets", labels=["cat", "dog"])
    data = [*pets, "--split", "train"]
    code, content = analyze(tmp_path, model, *data, "--target_blocks", "layers.1", "vit.layers.0")
    assert code == 0, capsys.readouterr().err
    assert content["data"]["split"] == "train"
    assert content["models"][0]["num_samples"] == 20  # 15 % are the validation split
    assert len(content["models"][0]["blocks"]) == 2


def test_classes_with_other_names_are_noted(tmp_path, pets):
    model = save(tmp_path / "chats", labels=["chat", "chien"])
    code, content = analyze(tmp_path, model, *pets, "--random_draws", "0")
    assert code == 0
    assert content["models"][0]["notes"] == [
        "The model calls its classes chat, chien and the data cat, dog; they were matched in this order."
    ]


@pytest.mark.slow
def test_no_bar_is_shown_if_disabled(tmp_path, pets):
    """In a separate process, because the tests switch off the bars of datasets."""
    model = save(tmp_path / "pets", labels=["cat", "dog"])
    program = "import sys; from hf_featreuse.cli import main; sys.exit(main())"
    arguments = ["analyze", model, *pets, "--split", "train", "--output_dir", str(tmp_path / "report")]
    environment = {
        name: value for name, value in os.environ.items() if "PROGRESS" not in name and "VERBOS" not in name
    }
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", program, *arguments, "--disable_tqdm"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stderr == ""
    assert "Report: " in result.stdout


def test_progress_bars_are_on_stderr(tiny, tmp_path, capsys):
    options = ["--output_dir", str(tmp_path / "report"), "--max_samples", "8", "--random_draws", "0"]
    assert main(["analyze", tiny, *options]) == 0
    out, err = capsys.readouterr()
    assert f"Analyzing {tiny}: 100%" in err
    assert "100%|" not in out


# Bad input


def refused(tmp_path, capsys, *arguments: str) -> str:
    """The one line on stderr of a run that fails and writes nothing."""
    capsys.readouterr()
    code, content = analyze(tmp_path, *arguments)
    out, err = capsys.readouterr()
    assert (code, content, out) == (1, None, "")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "3"], "`batch_size=3`"),
        (["--max_samples", "0"], "`max_samples=0`"),
        (["--random_draws", "-1"], "`random_draws=-1`"),
        (["--seed", "-1"], "`seed=-1`"),
        (["--num_workers", "-1"], "`num_workers=-1`"),
        (["--device", "cuda:99"], "`device='cuda:99'`"),
        (["--split", "test"], "has none of the splits ['test']"),
        (["--data", "no/such/data"], "Cannot load data set 'no/such/data'"),
        (["--target_blocks", "layers"], "Candidates: vit.layers.0"),
    ],
)
def test_bad_options_are_refused(tiny, tmp_path, capsys, arguments, message):
    if "--device" in arguments:
        code = main(["analyze", tiny, "--output_dir", str(tmp_path / "report"), *arguments])
        assert code == 1
        assert message in capsys.readouterr().err
        return
    assert message in refused(tmp_path, capsys, tiny, *arguments)


def test_model_named_twice_is_refused(tiny, tmp_path, capsys):
    assert "is named twice" in refused(tmp_path, capsys, tiny, tiny)


def test_missing_model_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path, capsys, str(tmp_path / "empty"))
    assert "`no/such` cannot be loaded" in refused(tmp_path, capsys, "no/such")


def test_checkpoint_without_head_is_refused(tiny, tmp_path, capsys):
    model = AutoModelForImageClassification.from_pretrained(tiny)
    folder = tmp_path / "headless"
    model.vit.save_pretrained(folder)
    model.config.save_pretrained(folder)
    assert "lacks 2 weights of ViTForImageClassification, such as classifier.bias" in refused(
        tmp_path, capsys, str(folder)
    )


def test_checkpoint_without_processor_is_refused(tiny, tmp_path, capsys):
    folder = tmp_path / "bare"
    AutoModelForImageClassification.from_pretrained(tiny).save_pretrained(folder)
    assert "has no image processor" in refused(tmp_path, capsys, str(folder))


def test_other_classes_are_refused_before_anything_runs(tiny, tmp_path, capsys):
    other = save(tmp_path / "pets", labels=["cat", "dog"])
    err = refused(tmp_path, capsys, tiny, other)
    assert "has 2 classes (cat, dog) and the data 10 (0, 1, 2, 3, ...)" in err


def test_model_without_residual_block_is_refused(tmp_path, capsys):
    folder = save(tmp_path / "mobile", model_type="mobilenet_v1")
    assert "no residual block" in refused(tmp_path, capsys, folder)


def test_full_output_folder_is_refused_first(tmp_path, capsys):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "notes.txt").write_text("mine")
    assert "is not empty" in refused(tmp_path, capsys, "no/such")
