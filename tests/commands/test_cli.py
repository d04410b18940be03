"""The console command: what goes to stdout, what to stderr, and with which exit code."""

import json
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import PerceiverConfig, Siglip2Config, ViTConfig

from hf_featreuse import cli, inspect_model, inspection
from hf_featreuse.cli import main

DOCUMENT = Path(__file__).parents[2] / "docs" / "inspect.md"


@pytest.fixture
def tiny(tmp_path) -> str:
    """A checkpoint folder without weights."""
    config = ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    config.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def block_names(text: str) -> list[str]:
    """The names in the lines of a table that begin with a number."""
    return re.findall(r"^ *\d+  ([\w.]+)  .*$", text, flags=re.MULTILINE)


def test_table(tiny, capsys):
    assert main(["inspect", tiny]) == 0
    out, err = capsys.readouterr()
    assert out == f"{inspect_model(tiny)}\n"
    assert block_names(out) == ["vit.layers.0", "vit.layers.1", "vit.layers.2"]
    assert err == ""


def test_options_reach_the_report(tiny, capsys):
    options = "--drop_rate 0.2 --drop_rate_schedule uniform --stochastic_depth_steps 2 --masked_freeze_steps 3"
    assert main(["inspect", tiny, *options.split(), "--vanilla_steps", "1", "--train_trunk", "head", "--json"]) == 0
    expected = inspect_model(
        tiny,
        drop_rate=0.2,
        drop_rate_schedule="uniform",
        stochastic_depth_steps=2,
        masked_freeze_steps=3,
        vanilla_steps=1,
        train_trunk="head",
    )
    assert json.loads(capsys.readouterr().out) == expected.to_dict()


@pytest.mark.parametrize(
    "targets, kept", [(["vit.*[02]"], [0, 2]), (["layers.1", "layers.2"], [1, 2]), (["vit.layers.1"], [1])]
)
def test_one_target_is_an_expression_and_several_are_names(tiny, capsys, targets, kept):
    assert main(["inspect", tiny, "--json", "--target_blocks", *targets]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert [block["name"] for block in blocks] == [f"vit.layers.{index}" for index in kept]


def test_plot_is_written_beside_the_output(tiny, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra `examples`")
    path = tmp_path / "new" / "tiny.png"
    assert main(["inspect", tiny, "--json", "--plot", str(path)]) == 0
    assert len(json.loads(capsys.readouterr().out)["blocks"]) == 3
    with Image.open(path) as image:
        assert image.width == 1200


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mobilenet_v1"], "no residual block"),
        (["vit", "--drop_rate", "1.5"], "`drop_rate=1.5`"),
        (["vit", "--target_blocks", "x.*"], "Candidates: vit.layers.0"),
        (["resnett"], "Did you mean resnet"),
        (["vit", "--plot", "/dev/null/vit.png"], "/dev/null"),
    ],
)
def test_errors_are_one_line_on_stderr(arguments, message, capsys):
    assert main(["inspect", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("featreuse: ")
    assert err.count("\n") == 1
    assert message in err


def test_what_libraries_print_stays_off_stdout(tiny, capsys, monkeypatch):
    def noisy(*args, **kwargs):
        print("loading")
        warnings.warn("old", FutureWarning, stacklevel=1)
        logging.getLogger("transformers.models").warning("careful")
        return inspect_model(*args, **kwargs)

    monkeypatch.setattr(inspection, "inspect_model", noisy)
    verbosity = transformers.logging.get_verbosity()
    assert main(["inspect", tiny, "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["blocks"]) == 3
    assert err == "loading\n"
    assert transformers.logging.get_verbosity() == verbosity


@pytest.mark.parametrize("word", ["\x1b[31mred\x07", "one\ntwo\r", "\u202etxt.exe", "caf\udce9", "\x9b2J"])
def test_control_characters_never_reach_the_terminal(word, capsys, monkeypatch):
    assert main(["inspect", word]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err[:-1].isprintable()
    with pytest.raises(SystemExit):
        main(["inspect", "vit", word])
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())
    monkeypatch.setattr(inspection, "inspect_model", lambda *_, **__: f"{word}\nnext")
    assert main(["inspect", "vit"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nnext\n") and all(line.isprintable() for line in out.split("\n"))


@pytest.mark.parametrize("arguments", [["inspect", ""], ["push", "", "ada/x"], ["push", "x", "a/x", "--token", " "]])
def test_an_empty_argument_is_no_folder(arguments, capsys):
    assert main(arguments) == 1
    assert "is empty. Pass a value" in capsys.readouterr().err


def test_an_error_that_was_not_foreseen_is_one_line_too(capsys, monkeypatch):
    def fail(*_, **__):
        raise KeyError("\x1bweights")

    monkeypatch.setattr(inspection, "inspect_model", fail)
    assert main(["inspect", "vit"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "KeyError" in err and "python -X dev" in err and "\x1b" not in err


def test_ctrl_c_ends_in_one_line(capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "inspect_model", stop)
    assert main(["inspect", "vit"]) == 130
    assert capsys.readouterr().err == "featreuse: stopped by Ctrl-C.\n"


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["look", "vit"], ["inspect", "vit", "--drop_rate", "x"]])
def test_misuse_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert capsys.readouterr().out == ""


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"{verb.name} {verb.summary}" in out for verb in cli.VERBS)
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    out = capsys.readouterr().out
    assert "model type" in out
    assert out.count("(default: ") >= 4
    assert "SUPPRESS" not in out


def test_a_model_with_images_under_another_main_input_is_inspected(tmp_path, capsys):
    sizes = {"num_latents": 4, "d_latents": 16, "num_blocks": 1, "num_self_attends_per_block": 2, "image_size": 8}
    PerceiverConfig(**sizes, num_cross_attention_heads=1).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    names = ["perceiver.encoder.self_attends.0", "perceiver.encoder.self_attends.1"]
    assert block_names(capsys.readouterr().out) == names


def test_a_model_whose_inputs_no_configuration_tells_is_sent_to_python(tmp_path, capsys):
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    Siglip2Config(vision_config={**vision, "patch_size": 4, "num_patches": 16}).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "cannot be inspected from its configuration alone: Siglip2ForImageClassification fails on a batch" in err
    assert f"run `hf_featreuse.inspect_model({str(tmp_path)!r}, inputs=batch)` in Python." in err
    # What it says works.
    batch = {
        "pixel_values": torch.zeros(1, 16, 3 * 4 * 4),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        "spatial_shapes": torch.full((1, 2), 4),
    }
    assert len(inspect_model(str(tmp_path), inputs=batch).blocks) == 2


@pytest.mark.slow
def test_command_prints_json_and_nothing_else(tiny):
    program = "import sys; from hf_featreuse.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "inspect", tiny, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [block["index"] for block in json.loads(result.stdout)["blocks"]] == [0, 1, 2]
    assert result.stdout.startswith("{\n")
    assert result.stdout.endswith("}\n")
    assert result.stderr == ""


def test_console_script_is_declared():
    scripts = DOCUMENT.parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
    assert 'featreuse = "hf_featreuse.cli:main"' in scripts


# The documented outputs

EXAMPLES = re.findall(
    r"^\$ featreuse (inspect .+)\n((?:.*\n)*?)```",
    DOCUMENT.read_text(encoding="utf-8") + Path(__file__).with_name("inspect_outputs.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_four_models_are_shown():
    assert [command.split()[1] for command, _ in EXAMPLES] == ["resnet", "vit", "convnext", "swin"]


@pytest.mark.slow
@pytest.mark.parametrize("command, documented", EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_document_shows_what_the_command_prints(command, documented, capsys):
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert len(block_names(printed)) > 1
    assert documented.rstrip() == printed.rstrip()


@pytest.mark.slow
def test_a_reader_that_stops_reading_is_no_error(tiny):
    command = [sys.executable, "-c", "import sys; from hf_featreuse.cli import main; sys.exit(main(sys.argv[1:]))"]
    with subprocess.Popen([*command, "inspect", tiny], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read().decode() == ""
    assert process.returncode == 0
