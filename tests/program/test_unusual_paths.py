"""From a folder of photographs to a pushed model where every path has spaces and letters of several scripts."""

import csv
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_featreuse.cli import main
from hf_featreuse.data import EvalTransform, ImageCollator, load_image_data
from hf_featreuse.small_models import small_config, small_image_processor

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))
from hub_server import serve

CLASSES = ("Tag & Nacht", "schöne 写真", "чат")
TINY = ["--config_overrides", "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=16"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with one folder of images per class."""
    folder = tmp_path_factory.mktemp("Ordner mit Ü") / "meine Fotos 图"
    random = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(12):
            pixels = random.integers(0, 60, (16, 16, 3)) + 90 * number
            Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / name / f"Bild {index} é.png")
    return folder


@pytest.mark.slow
def test_train_evaluate_predict_and_push(photos, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="reports need the extra for them")
    model = tmp_path / "Läufe 1" / "mein Modell 模型"
    words = [
        "--model_type",
        "vit",
        *TINY,
        "--use_cpu",
        "--disable_tqdm",
        "true",
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "8",
    ]
    assert main(["train", "--train_dir", str(photos), "--output_dir", str(model), *words]) == 0
    report = tmp_path / "Bericht é"
    evaluate = ["evaluate", str(model), "--data", str(photos), "--output_dir", str(report), "--disable_tqdm"]
    assert main(evaluate) == 0
    page = (report / "index.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("schöne 写真", "чат"))
    output = tmp_path / "Vorhersagen ß.csv"
    capsys.readouterr()
    assert main(["predict", str(model), str(photos), "--output", str(output), "--disable_tqdm"]) == 0
    assert capsys.readouterr().out == f"36 images classified. Predictions: {output}\n"
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["file"]).parent.name for row in rows} == set(CLASSES)
    assert {row["label"] for row in rows} <= set(CLASSES)
    with serve() as hub:
        settings = {"HF_TOKEN": "hf_writes", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        environment = {**os.environ, **settings, "HF_ENDPOINT": hub.url}
        command = [sys.executable, "-m", "hf_featreuse", "push", str(model), "ada/photos"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "model.safetensors" in hub.commits("ada/photos")[-1].files


def test_data_reach_workers_that_are_started_afresh(photos):
    """Windows and macOS pickle what a worker needs: data set, transform and collator."""
    data = load_image_data(str(photos), splits=("train",))
    processor = small_image_processor(small_config("vit", 16, 3), 16)
    split = data.splits["train"].with_transform(EvalTransform(processor))
    collator = ImageCollator.from_processor(processor)
    again, collate = pickle.loads(pickle.dumps((split, collator)))
    there, here = collate([again[0], again[5]]), collator([split[0], split[5]])
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)
