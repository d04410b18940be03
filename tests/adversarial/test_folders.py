"""Folders of every layout and name: all images with their classes, or a message that names what is missing.

Nothing may be left out without a message: a case states how many images each split has, the classes, and what the
warning names; or what the error names.
"""

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_featreuse.data import load_image_data
from hf_featreuse.errors import DataError

pytestmark = pytest.mark.slow

# Words that `datasets` takes for a split, signs of patterns, addresses, shells and YAML, and other scripts.
NAMES = (
    *("train", "view_train", "training day", "test", "my-test-3", "val", "valid.1", "dev", "evaluation", "eval_2"),
    *(
        "validation-00000-of-00001",
        "data",
        "metadata",
        "README",
        "images",
        "label",
        "cat.jpg",
        "x.tar.gz",
        "x.parquet",
    ),
    *(
        "photos[2024]",
        "[!a]",
        "c*d",
        "**",
        "what?",
        "{a,b}",
        "a::b",
        "zip:",
        "file:",
        "~",
        "~root",
        "$HOME",
        "%20",
        "%s",
    ),
    *(
        "a b",
        " leading",
        "trailing ",
        "-rf",
        "--help",
        "a'b",
        'a"b',
        "`id`",
        "a;b",
        "a&b",
        "a|b",
        "a\\b",
        "#1",
        "null",
    ),
    *(
        "a\nb",
        "a\tb",
        "\x1b[31m",
        "\u202eabc",
        "\u200b",
        "é",
        "日本",
        "🐈",
        "0",
        "1e5",
        "-1",
        "True",
        "__all__",
        "CON",
    ),
    "x" * 200,
)


@dataclass
class Loads:
    """Number of images in each split, names of the classes, and what the warning names, if there is one."""

    counts: dict[str, int]
    classes: list[str]
    left_out: tuple[str, ...] = ()


@dataclass
class Refused:
    """The error names these."""

    names: tuple[str, ...]


Build = Callable[[Path], None]
CASES: dict[str, tuple[Build, dict, Loads | Refused]] = {}  # by name: what makes the folder, options, verdict
TWO = Loads({"train": 8}, ["ant", "bee"])


def loads(*left_out: str) -> Loads:
    """All eight images of two classes, and a warning that names these."""
    return Loads(TWO.counts, TWO.classes, left_out)


def image(path: Path, red: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (red, 0, 0)).save(path, "PNG")


def classes(*names: str, count: int = 4) -> Build:
    """A folder of images for each name, whose red is the class."""

    def build(root: Path) -> None:
        for red, name in enumerate(names):
            for index in range(count):
                image(root / name / f"{index}.png", red)

    return build


def both(*builds: Build) -> Build:
    def build(root: Path) -> None:
        for one in builds:
            one(root)

    return build


def inside(folder: str, *builds: Build) -> Build:
    return lambda root: both(*builds)(root / folder)


def files(*paths: str) -> Build:
    return lambda root: [image(root / path) for path in paths]  # type: ignore[return-value]


def text(path: str, content: str = "x") -> Build:
    def build(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)

    return build


def folder(path: str) -> Build:
    return lambda root: (root / path).mkdir(parents=True)


def link(path: str, to: str) -> Build:
    def build(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(to)

    return build


def unix_socket(path: str) -> Build:
    def build(root: Path) -> None:
        here = os.getcwd()
        os.chdir((root / path).parent)  # the system takes only short paths of sockets
        try:
            socket.socket(socket.AF_UNIX).bind(Path(path).name)
        finally:
            os.chdir(here)

    return build


def raw(path: bytes) -> Build:
    """An image whose path is not UTF-8."""

    def build(root: Path) -> None:
        whole = os.path.join(os.fsencode(root), path)
        os.makedirs(os.path.dirname(whole), exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / "made.png")
        os.rename(root / "made.png", whole)

    return build


def case(name: str, build: Build, verdict: Loads | Refused, **options) -> None:
    assert name not in CASES
    CASES[name] = (build, options, verdict)


def names() -> None:
    pair = classes("ant", "bee")
    for name in NAMES:
        case(f"a class called {name!r}", classes("ant", name), Loads({"train": 8}, sorted(["ant", name])))
        case(f"a file called {name!r}", both(pair, files(f"ant/{name}.jpg")), Loads({"train": 9}, ["ant", "bee"]))
    for name in (
        "photos[2024]",
        "c*d",
        "a::b",
        "what?",
        "file:",
        "train",
        "view_train",
        "test.zip",
        "a b",
        "日本",
        "%20",
    ):
        case(f"in a folder called {name!r}", inside(name, pair), TWO)
    case("in c*d beside c1d", both(inside("c*d", pair), inside("../c1d", pair)), TWO)
    case(
        "files that are not UTF-8",
        both(pair, raw(b"ant/\xff.png")),
        Loads(TWO.counts, TWO.classes, ("ant/\\udcff.png",)),
    )
    case("a class that is not UTF-8", both(pair, raw(b"\xe9/1.png")), Loads(TWO.counts, TWO.classes, ("\\udce9",)))
    case(
        "an accent written in two ways",
        both(inside("train", classes("é", "b")), inside("val", classes("e\u0301"))),
        Loads({"train": 8, "validation": 4}, ["b", "é"]),
    )
    case("one name in two ways", classes("é", "e\u0301"), Refused(("same name",)))
    for ending in ("JPG", "Jpeg", "PNG", "TIFF", "bmp", "jfif", "WebP"):
        case(
            f"ending .{ending}",
            both(pair, lambda root, e=ending: os.rename(root / "ant/0.png", root / f"ant/0.{e}")),
            TWO,
        )


def splits() -> None:
    pair = classes("ant", "bee")
    three = {"splits": ("train", "validation", "test")}
    for word in ("validation", "valid", "val", "dev", "VAL", "Validation"):
        case(
            f"train and {word}",
            both(inside("train", pair), inside(word, pair)),
            Loads({"train": 8, "validation": 8}, TWO.classes),
        )
    for word in ("test", "testing", "eval", "evaluation"):
        case(
            f"training and {word}",
            both(inside("training", pair), inside(word, pair)),
            Loads({"train": 8, "test": 8}, TWO.classes),
            **three,
        )
    case("train alone", inside("train", pair), TWO)
    case(
        "splits one folder deeper",
        inside("beans", inside("train", pair), inside("test", pair)),
        Loads({"train": 8, "test": 8}, TWO.classes),
        **three,
    )
    case("train as a class", classes("bus", "train"), Loads({"train": 8}, ["bus", "train"]))
    case(
        "another folder next to the splits",
        both(inside("train", pair), files("unlabeled/1.png")),
        Loads(TWO.counts, TWO.classes, ("unlabeled",)),
    )
    case(
        "a test split without classes",
        both(inside("train", pair), files("test/1.png")),
        Loads(TWO.counts, TWO.classes, ("test",)),
    )
    case("an empty test split", both(inside("train", pair), folder("test")), Loads(TWO.counts, TWO.classes, ("test",)))
    case("a validation split without classes", both(inside("train", pair), files("val/1.png")), Refused(("val`",)))
    case("an empty validation split", both(inside("train", pair), folder("val")), Refused(("val`",)))
    case(
        "two validation splits",
        both(inside("train", pair), inside("val", pair), inside("dev", pair)),
        Refused(("/dev`", "/val`")),
    )
    case("no training split", both(inside("test", pair), inside("val", pair)), Refused(("'train'",)))
    case(
        "a class only in validation",
        both(inside("train", pair), inside("val", classes("ant", "cat"))),
        Refused(("'cat'",)),
    )
    case("a class only in test, which is not used", both(inside("train", pair), inside("test", classes("cat"))), TWO)
    case(
        "a class only in training",
        both(inside("train", classes("ant", "bee", "cat")), inside("val", pair)),
        Loads({"train": 12, "validation": 8}, ["ant", "bee", "cat"]),
    )
    case(
        "splits inside classes",
        both(inside("ant", classes("train", "test")), inside("bee", classes("train", "test"))),
        Refused(("ant/", "bee/")),
    )
    case("splits without classes", files("train/1.png", "val/1.png"), Refused(("/train`", "/val`")))
    case(
        "splits under other names",
        both(inside("train_set", pair), inside("test_set", pair)),
        Refused(("train_set", "test_set", "--train_dir")),
    )


def layouts() -> None:
    pair = classes("ant", "bee")
    case("plain", pair, TWO)
    case("one folder deeper", inside("photos", pair), TWO)
    case(
        "classes in groups",
        both(inside("x", pair), inside("y", classes("cat"))),
        Loads({"train": 12}, ["ant", "bee", "cat"], ("innermost", "x/ant")),
    )
    case(
        "one class in two groups",
        both(inside("x", pair), inside("y", classes("ant"))),
        Refused(("/x/ant`", "/y/ant`")),
    )
    case(
        "classes at different depths", both(pair, files("bee/more/1.png")), Refused(("/bee/more`", "different depths"))
    )
    case("flat", files("1.png", "2.png"), Refused(("such as 1.png", "named after the class")))
    case("one class", classes("ant"), Refused(("'ant'", "two classes")))
    case("an empty class", both(pair, folder("cat")), loads("cat"))
    case("a class without images", both(pair, text("cat/list.txt")), loads("cat", "cat/list.txt"))
    case("a class of another format", both(pair, text("cat/1.heic")), loads("cat", "cat/1.heic"))
    case("nothing", both(), Refused(("no images",)))
    case("only empty folders", folder("ant/bee"), Refused(("no images",)))
    case("only text", both(text("ant/1.txt"), text("bee/1.txt")), Refused(("no images",)))
    case("only an archive", text("photos.zip"), Refused(("photos.zip", "Unpack")))
    case("an archive next to classes", both(pair, text("ant/more.zip")), loads("ant/more.zip"))
    case("images next to class folders", both(pair, files("loose.png")), loads("loose.png"))
    case("a readme and a license", both(pair, text("README.md", "---\nlicense: mit\n---\n"), text("LICENSE")), TWO)
    case(
        "a card that points elsewhere",
        both(pair, text("README.md", "---\nconfigs:\n- data_files: https://x.org/y\n---\n")),
        TWO,
    )
    case("a table next to classes", both(pair, text("features.parquet")), TWO)
    case("text among images", both(pair, text("ant/note.txt")), loads("ant/note.txt"))
    case(
        "an image without an ending",
        both(pair, lambda root: os.rename(root / "ant/0.png", root / "ant/0")),
        Loads({"train": 7}, TWO.classes, ("ant/0",)),
    )
    case("a folder called like an image", both(pair, folder("ant/dir.png")), loads("ant/dir.png"))
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        case(f"a file of a system, {name}", both(pair, text(f"ant/{name}")), TWO)
    for name in ("__MACOSX", "@eaDir", ".git", ".ipynb_checkpoints"):
        case(f"a folder of a tool, {name}", both(pair, files(f"ant/{name}/0.png")), TWO)
    case("hidden images", both(pair, files("ant/._0.png")), loads("ant/._0.png"))
    case("a hidden class", both(pair, files(".cat/0.png")), loads(".cat"))


def links_and_devices() -> None:
    pair = classes("ant", "bee")
    three = Loads({"train": 12}, ["ant", "bee", "cat"])
    case("a linked class", both(pair, inside("../elsewhere", classes("cat")), link("cat", "../elsewhere/cat")), three)
    case("linked images", both(pair, link("ant/again.png", "0.png")), Loads({"train": 9}, TWO.classes))
    case("a linked split", both(inside("../elsewhere", pair), link("train", "../elsewhere")), TWO)
    case(
        "two links on the way",
        both(inside("../a", pair), link("../b/ant", "../a/ant"), link("../b/bee", "../a/bee"), link("train", "../b")),
        TWO,
    )
    case("a link to a folder above", both(pair, link("ant/up", "..")), loads("ant/up"))
    case("a link to itself", both(pair, link("ant/me.png", "me.png")), loads("ant/me.png"))
    case("a link to nothing", both(pair, link("ant/gone.png", "nowhere")), loads("ant/gone.png"))
    case("a class linked to nothing", both(pair, link("cat", "nowhere")), loads("cat"))
    case(
        "folders that link to each other",
        both(pair, *(link(f"l{i}/l{j}", f"../l{j}") for i in range(8) for j in range(8))),
        loads("linked more than"),
    )
    case("a pipe", both(pair, lambda root: os.mkfifo(root / "ant/pipe.png")), loads("ant/pipe.png"))
    case("a socket", both(pair, unix_socket("ant/socket.png")), loads("ant/socket.png"))
    case("a device", both(pair, link("ant/zero.png", "/dev/zero")), loads("ant/zero.png"))
    case(
        "a pipe called like metadata", both(pair, lambda root: os.mkfifo(root / "metadata.csv")), loads("metadata.csv")
    )
    case("a pipe called like a card", both(pair, lambda root: os.mkfifo(root / "README.md")), loads("README.md"))
    case("a pipe called like saved data", both(pair, lambda root: os.mkfifo(root / "state.json")), loads("state.json"))


def metadata() -> None:
    pair = files("x/1.png", "x/2.png")
    cats = Loads({"train": 2}, ["cat", "dog"])
    rows = "file_name,label\nx/1.png,cat\nx/2.png,dog\n"
    case("metadata.csv", both(pair, text("metadata.csv", rows)), cats)
    case(
        "metadata.jsonl",
        both(
            pair,
            text("x/metadata.jsonl", '{"file_name":"1.png","label":"cat"}\n{"file_name":"2.png","label":"dog"}\n'),
        ),
        cats,
    )
    case(
        "metadata of splits",
        both(*(inside(s, pair, text("metadata.csv", rows)) for s in ("train", "val"))),
        Loads({"train": 2, "validation": 2}, cats.classes),
    )
    case("metadata in a folder with brackets", inside("[1]", pair, text("metadata.csv", rows)), cats)
    case(
        "an image that metadata leaves out",
        both(pair, files("x/3.png"), text("metadata.csv", rows)),
        Loads(cats.counts, cats.classes, ("x/3.png",)),
    )
    case(
        "metadata with numbers",
        both(pair, text("metadata.csv", "file_name,label\nx/1.png,7\nx/2.png,30\n")),
        Loads({"train": 2}, ["7", "30"]),
    )
    for name in ("../x.png", "/etc/passwd", "x/../../y.png"):
        case(
            f"metadata that names {name}",
            both(pair, text("metadata.csv", f"file_name,label\n{name},cat\nx/2.png,dog\n")),
            Refused(("metadata.csv", name)),
        )
    case(
        "metadata without file_name",
        both(pair, text("metadata.csv", "image,label\nx/1.png,cat\n")),
        Refused(("metadata.csv", "file_name")),
    )
    case(
        "metadata without a label",
        both(pair, text("metadata.csv", "file_name,text\nx/1.png,cat\n")),
        Refused(("Found no label column", "text")),
    )
    case(
        "metadata with a missing label",
        both(pair, text("metadata.csv", "file_name,label\nx/1.png,3\nx/2.png,\n")),
        Refused(("has no label",)),
    )
    case("empty metadata", both(pair, text("metadata.csv", "")), Refused(("metadata.csv",)))
    case(
        "metadata without rows",
        both(pair, text("metadata.csv", "file_name,label\n")),
        Refused(("metadata.csv", "no rows")),
    )
    case("broken metadata", both(pair, text("metadata.jsonl", '{"file_name":')), Refused(("metadata.jsonl",)))
    case(
        "metadata that is not what it is called",
        both(pair, text("metadata.parquet", "x")),
        Refused(("metadata.parquet",)),
    )
    case(
        "two kinds of metadata",
        both(pair, text("metadata.csv", rows), text("metadata.jsonl")),
        Refused(("metadata.csv", "metadata.jsonl")),
    )
    case(
        "metadata next to the splits",
        both(inside("train", classes("ant", "bee")), text("metadata.csv", rows)),
        Loads(TWO.counts, TWO.classes, ("metadata.csv",)),
    )


for fill in (names, splits, layouts, links_and_devices, metadata):
    fill()


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_read_whole_or_what_is_missing_is_named(name, tmp_path, caplog):
    build, options, verdict = CASES[name]
    root = tmp_path / "data"
    root.mkdir()
    build(root)
    options = {"train_val_split": None, "cache_dir": str(tmp_path / "cache"), **options}
    if isinstance(verdict, Refused):
        with pytest.raises(DataError) as error:
            load_image_data(str(root), **options)
        assert all(part in str(error.value) for part in verdict.names), str(error.value)
        return
    with caplog.at_level(logging.WARNING):
        data = load_image_data(str(root), **options)
    assert {split: len(images) for split, images in data.splits.items()} == verdict.counts
    assert data.label_names == verdict.classes
    assert bool(verdict.left_out) == bool(caplog.records), caplog.text
    assert all(part in caplog.text for part in verdict.left_out), caplog.text
    for split in data.splits.values():
        assert len(list(split)) == len(split)
    if name.startswith("a class called"):
        reds = [int(item["pixel_values"][0, 0, 0]) for item in data.splits["train"]]
        own = data.label_names.index("ant")
        assert np.array_equal(np.array(reds) == 0, data.splits["train"].labels == own)
    assert "\x1b" not in caplog.text


def test_the_table_is_long_enough():
    assert len(CASES) >= 150
