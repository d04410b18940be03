"""What a local folder of images holds: its splits and classes, and that nothing vanishes without being named.

`tests/adversarial/test_folders.py` is the long table.
"""

import os
import re

import numpy as np
import pytest
from PIL import Image

from hf_featreuse.data import load_image_data
from hf_featreuse.data.scanning import scan
from hf_featreuse.errors import DataError


def images(root, *paths: str) -> str:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / path, "PNG")
    return str(root)


def two(prefix: str = "", names: tuple[str, str] = ("ant", "bee")) -> list[str]:
    return [f"{prefix}{name}/{index}.png" for name in names for index in range(3)]


def loaded(root, **options) -> tuple[dict[str, int], list[str]]:
    data = load_image_data(str(root), **{"train_val_split": None, **options})
    return {name: len(split) for name, split in data.splits.items()}, data.label_names


def test_words_of_splits_in_names_of_files_and_classes_mean_nothing(tmp_path):
    images(tmp_path, *two(names=("test", "my-train")), "test/view_train.png", "my-train/val.png")
    assert loaded(tmp_path) == ({"train": 8}, ["my-train", "test"])


@pytest.mark.parametrize("name", ["photos[2024]", "c*d", "a::b", "what?", "~"])
def test_a_path_is_not_a_pattern(tmp_path, name):
    images(tmp_path / name, *two(), "ant/a::b.png", "bee/[0].png")
    images(tmp_path / "c1d", *two(names=("cat", "dog")))
    assert loaded(tmp_path / name) == ({"train": 8}, ["ant", "bee"])
    train = load_image_data(train_dir=str(tmp_path / name), train_val_split=None).splits["train"]
    assert len(list(train)) == 8


def test_linked_classes_are_read_and_loops_end(tmp_path, caplog):
    images(tmp_path / "data", *two())
    images(tmp_path / "elsewhere", "cat/0.png")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "data" / "ant" / "up").symlink_to(tmp_path / "data")
    assert loaded(tmp_path / "data") == ({"train": 7}, ["ant", "bee", "cat"])
    assert "1 linked to a folder above: ant/up." in caplog.text


def test_names_that_are_not_utf_8_are_named_and_left_out(tmp_path, caplog):
    images(tmp_path, *two(), "x.png")
    os.rename(tmp_path / "x.png", os.path.join(os.fsencode(tmp_path), b"ant/\xff.png"))
    assert loaded(tmp_path)[0] == {"train": 6}
    assert r"1 with a name that is not UTF-8 (rename them): ant/\udcff.png" in caplog.text


def test_pipes_and_devices_called_like_images_are_named_not_opened(tmp_path, caplog):
    images(tmp_path, *two())
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    (tmp_path / "bee" / "zero.jpg").symlink_to("/dev/zero")
    assert loaded(tmp_path)[0] == {"train": 6}
    assert "2 not a regular file, or a link to nothing: ant/pipe.png, bee/zero.jpg" in caplog.text


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            ["1.png", "2.png"],
            "such as 1.png, lie in no class folder. Put the images of each class into a folder",
        ),
        (["ant/1.png"], "one class folder, 'ant'. A classifier needs two classes or more: add a folder"),
        (["train/1.png", "val/1.png"], "lie directly in folders of splits"),
        ([*two(), "ant/more/1.png"], "at different depths"),
        ([*two("x/"), *two("y/")], "have the same name.*--train_dir"),
        ([*two("train/"), "val/1.png"], "val` holds no class folders"),
        (
            [*two("train/"), *two("val/", ("ant", "zebra"))],
            "class folder 'zebra', and the training split has none",
        ),
        ([*two("train/"), *two("val/"), *two("dev/")], "could each be the split 'validation'"),
    ],
)
def test_what_cannot_be_a_classification_gets_advice_that_can_be_followed(tmp_path, paths, message):
    with pytest.raises(DataError, match=message):
        loaded(images(tmp_path, *paths))


def test_an_empty_class_is_named(tmp_path, caplog):
    images(tmp_path, *two())
    (tmp_path / "cat").mkdir()
    assert loaded(tmp_path)[1] == ["ant", "bee"]
    assert "1 without images: cat." in caplog.text


def test_every_file_of_a_random_tree_is_used_or_named(tmp_path, caplog):
    """Against a plain walk through the folder, and the names in the warning."""
    draw = np.random.default_rng(0)
    names = ["train", "a b", "x[1]", "c::d", "é", "e.train", "__f", ".g", "val"]
    for turn in range(8):
        caplog.clear()
        root = tmp_path / str(turn)
        images(root, *two())
        for _ in range(4):
            name, ending = draw.choice(names), draw.choice([".png", ".JPG", ".txt", "", ".tiff"])
            images(root, f"{draw.choice(['ant', 'bee', names[0], 'cat'])}/{name}{ending}")
        split = load_image_data(str(root), train_val_split=None).splits["train"]
        used = {row["path"] for row in split._read(split.rows)}
        missing = {os.path.join(folder, file) for folder, _, files in os.walk(root) for file in files} - used
        for path in missing:
            relative = os.path.relpath(path, root)
            hidden = re.search(r"/\.g(\.txt)?$", relative)  # of hidden files only images are named
            named = re.search(rf"(: |, ){re.escape(relative)}[,;.]", caplog.text)
            assert named or hidden, (relative, caplog.text)
        assert len(used) + len(missing) == sum(len(files) for _, _, files in os.walk(root))


def test_folders_that_all_link_to_each_other_are_walked_in_no_time(tmp_path):
    for one in range(9):
        for other in range(9):
            (tmp_path / f"d{one}").mkdir(exist_ok=True)
            (tmp_path / f"d{one}" / f"l{other}").symlink_to(tmp_path / f"d{other}")
    found = scan(str(tmp_path))
    assert 10 <= len(found.folders) <= 1 + 9 + 8 * 9
