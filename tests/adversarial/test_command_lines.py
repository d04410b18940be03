"""Wrong command lines, each with its verdict: exit code and a part of the one-line message.

Every verb of `featreuse` and both examples run in this process. None may pass silently, end in a traceback, hang,
leave a folder behind or send a control character to the terminal.
"""

import contextlib
import io
import json
import shutil
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import run_image_classification
import run_image_classification_no_trainer
from command_line_cases import (
    ANALYZE,
    BROKEN,
    ESCAPE,
    EVALUATE,
    EXAMPLE,
    GENERAL,
    INSPECT,
    JSON,
    NEWLINE,
    PREDICT,
    PRUNE,
    PUSH,
    RIGHT,
    Case,
)
from PIL import Image
from tiny_checkpoints import save
from transformers import ViTConfig

from hf_featreuse import cli

pytest.importorskip("matplotlib", reason="plots need the extra `examples`")
pytest.importorskip("sklearn", reason="the digits need the extra `examples`")
pytestmark = pytest.mark.slow

MOST_SECONDS = 120


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    """Files and folders of the right and of many wrong kinds."""
    root = tmp_path_factory.mktemp("world")
    made = {"tiny": save(root / "tiny"), "pets": save(root / "pets", labels=["cat", "dog"])}

    def folder(name: str, **files: str | bytes) -> None:
        path = root / name
        path.mkdir(exist_ok=True)
        for file, content in files.items():
            (path / file.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
        made[name] = str(path)

    def variant(name: str, source: str = "tiny", **config: object) -> Path:
        path = Path(shutil.copytree(made[source], root / name))
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**content, **config}))
        made[name] = str(path)
        return path

    folder("empty")
    folder("full", notes__txt="mine")
    for name, content in {
        "broken": '{"a": ', "list": "[1, 2]", "null": "null", "binary": b"\x00\xff\xfe", "deep": "[" * 50_000,
        "no_type": "{}", "other_type": '{"model_type": "bert"}', "unknown_type": '{"model_type": "nonesuch"}',
        "hostile_type": json.dumps({"model_type": ESCAPE}), "bad_size": '{"model_type": "vit", "hidden_size": "x"}',
        "no_layers": '{"model_type": "vit", "num_hidden_layers": 0}',
        "negative": '{"model_type": "vit", "hidden_size": -8}',
    }.items():  # fmt: skip
        folder(f"{name}_config", config__json=content)
    ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8).save_pretrained(
        root / "weightless"
    )
    made["weightless"] = str(root / "weightless")
    weights = (root / "tiny" / "model.safetensors").read_bytes()
    for name, content in {
        "cut": weights[:-8],
        "zeros": bytes(len(weights)),
        "no_bytes": b"",
        "text": b"hello",
    }.items():
        (variant(f"{name}_weights") / "model.safetensors").write_bytes(content)
    (variant("no_processor") / "preprocessor_config.json").unlink()
    (variant("bad_processor") / "preprocessor_config.json").write_text("[]")
    variant("hostile_labels", "pets", id2label={"0": ESCAPE, "1": NEWLINE}, label2id={ESCAPE: 0, NEWLINE: 1})
    variant("$dollar$_{x}^", "tiny")
    variant("_under", "tiny")
    variant(BROKEN, "tiny")
    variant(ESCAPE, "tiny")
    for name, folder_name in {
        "dollar": "$dollar$_{x}^", "under": "_under", "broken_name": BROKEN, "escape_name": ESCAPE,
    }.items():  # fmt: skip
        made[name] = made.pop(folder_name)
    card = variant("bad_card")
    (card / "README.md").write_text("---\na: [\n---\n")
    (root / "file.txt").write_text("a file")
    made["file"] = str(root / "file.txt")
    made["none"] = str(root / "missing" / "folder")
    made["photo"] = str(root / "photo.png")
    Image.new("RGB", (8, 8)).save(made["photo"])
    for name, content in {
        "json_broken": '{"output_dir": ', "json_list": "[]", "json_null": "null", "json_binary": b"\xff\xfe",
        "json_deep": '{"a": ' * 50_000,
    }.items():  # fmt: skip
        made[name] = str(root / f"{name}.json")
        Path(made[name]).write_bytes(content if isinstance(content, bytes) else content.encode())
    return made


@contextlib.contextmanager
def within_time():
    """A hang ends in an error."""

    def stop(*_):
        raise AssertionError(f"not over after {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(main, argv: list[str], monkeypatch) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    with within_time(), warnings.catch_warnings(action="ignore"):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main()
            except SystemExit as end:
                # Like the interpreter.
                code = end.code if isinstance(end.code, int) else 1
                if isinstance(end.code, str):
                    print(end.code, file=err)
    return code or 0, out.getvalue(), err.getvalue()


def judge(case: Case, main, world, tmp_path, monkeypatch, prefix: str, more: list[str]) -> None:
    """Run a case in an empty folder and compare with its verdict."""
    monkeypatch.chdir(tmp_path)
    if case.json is not None:
        (tmp_path / "args.json").write_text(json.dumps(case.json))

    def filled(word: str) -> str:
        for name, path in world.items():
            word = word.replace(f"{{{name}}}", path)
        return word

    folders = tmp_path, Path(world["empty"]).parent
    before = [sorted(folder.rglob("*")) for folder in folders]
    code, out, err = run(main, [*map(filled, case.argv), *more], monkeypatch)
    after = [sorted(folder.rglob("*")) for folder in folders]
    assert code == case.code, f"exit code {code}: {err}"
    assert "unexpected error" not in err and "Traceback" not in err
    assert all(character.isprintable() or character in "\n\r\t" for character in err + out)
    if not case.code:
        assert case.message in out
        return
    told = [line for line in err.splitlines() if line.startswith(prefix)]
    assert len(told) == 1 and filled(case.message) in told[0] and err.endswith(f"{told[0]}\n"), err
    assert out == "" and before == after, after


@pytest.mark.parametrize("wrong", [*GENERAL, *INSPECT, *EVALUATE, *PREDICT, *ANALYZE, *PRUNE, *PUSH, *RIGHT], ids=str)
def test_a_wrong_command_line_of_featreuse(wrong, world, tmp_path, monkeypatch):
    prefix = "featreuse: " if wrong.code < 2 else "featreuse"
    judge(wrong, lambda: cli.main(sys.argv[1:]), world, tmp_path, monkeypatch, prefix, [])


# If one were not refused, it would train for a step.
_QUICK = (
    *("--max_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true", "--max_train_samples", "32"),
    *("--config_overrides", "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=16"),
    *("--output_dir", "out"),
)


@pytest.mark.parametrize("example", [run_image_classification, run_image_classification_no_trainer])
@pytest.mark.parametrize("wrong", [*EXAMPLE, *JSON], ids=str)
def test_a_wrong_command_line_of_an_example(wrong, example, world, tmp_path, monkeypatch):
    given = {word.split("=")[0] for word in wrong.argv}
    more = []
    if not wrong.argv[0].endswith((".json", "}")):
        pairs = zip(_QUICK[::2], _QUICK[1::2], strict=True)
        more = [word for pair in pairs if pair[0] not in given for word in pair]
    elif wrong.json is not None:
        quick = {name.removeprefix("--"): value for name, value in zip(_QUICK[::2], _QUICK[1::2], strict=True)}
        wrong = replace(wrong, json={**quick, **wrong.json})
    judge(wrong, example.main, world, tmp_path, monkeypatch, "error: ", more)
