"""`featreuse evaluate` and `featreuse predict` on a tiny checkpoint."""

import json

import pytest
from PIL import Image
from tiny_checkpoints import save

from hf_featreuse.cli import main

pytest.importorskip("matplotlib", reason="plots need the extra `examples`")
pytest.importorskip("sklearn", reason="the digits need the extra `examples`")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("models") / "tiny")


def test_evaluate_reports_on_the_validation_images(tiny, tmp_path, capsys):
    folder = tmp_path / "report"
    assert main(["evaluate", tiny, "--output_dir", str(folder), "--disable_tqdm", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.endswith(f"Report: {folder / 'index.html'}\n")
    content = json.loads((folder / "evaluation.json").read_text())
    assert content["data"] == {"data": "scikit-learn digits", "split": "validation", "images": 360}
    assert sum(scores["support"] for scores in content["classes"]) == 360
    assert (folder / "index.html").read_text().count("<figure>") == 24


def test_evaluate_shows_the_images_of_its_mistakes(tiny, tmp_path, capsys, monkeypatch):
    """The gallery's image is the one whose label the mistake has, although the order is drawn."""
    from hf_featreuse.data import load_image_data
    from hf_featreuse.evaluation import splits

    seen = {}

    def write(found, folder, *, image, **options):
        seen.update({one.index: (one.label, image(one.index)) for one in found.mistakes})
        return folder

    monkeypatch.setattr(splits, "write_evaluation", write)
    arguments = ["--max_samples", "20", "--output_dir", str(tmp_path / "r"), "--disable_tqdm", "--device", "cpu"]
    assert main(["evaluate", tiny, *arguments]) == 0
    split = load_image_data(splits=("validation",)).splits["validation"]
    known = {split[i]["pixel_values"].numpy().tobytes(): str(split[i]["labels"]) for i in range(len(split))}
    assert seen
    for label, image in seen.values():
        from hf_featreuse.data import to_tensors

        assert known[to_tensors([image])[0].numpy().tobytes()] == label


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "0"], "`batch_size=0`"),
        (["--max_samples", "0"], "`max_samples=0`"),
        (["--num_mistakes", "-1"], "`num_mistakes=-1`"),
        (["--device", "warp"], "`device='warp'`"),
        (["--data", "no/such/folder"], "no/such/folder"),
    ],
)
def test_evaluate_refuses_wrong_options_in_one_line_and_leaves_no_folder(tiny, tmp_path, capsys, arguments, message):
    assert main(["evaluate", tiny, "--output_dir", str(tmp_path / "r"), "--disable_tqdm", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_predict_writes_a_file_and_names_what_it_could_not_read(tiny, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no")
    output = tmp_path / "out.csv"
    assert main(["predict", tiny, str(tmp_path), "--output", str(output), "--disable_tqdm", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out == f"1 images classified; 1 could not be decoded. Predictions: {output}\n"
    assert "b.png" in err and len(output.read_text().splitlines()) == 2


def test_predict_refuses_a_missing_file_in_one_line(tiny, tmp_path, capsys):
    assert main(["predict", tiny, str(tmp_path / "a.png"), "--output", str(tmp_path / "out.csv")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not any(tmp_path.iterdir())
