"""Every code block of the README and of docs/ runs, and every command line is one that its program takes."""

import copy
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from distributed_runs import run_on_ranks
from docs_blocks import BLOCKS, COMMANDS, ROOT, Parsed, stop_after_parsing
from PIL import Image
from tiny_models import batch, build, examples
from training_runs import options, state_of
from transformers import HfArgumentParser, ViTForImageClassification, ViTImageProcessor, ViTModel

import hf_featreuse
from hf_featreuse import FeatureReuse, FeatureReuseConfig, FeatureReuseSchedule, cli, find_residual_blocks
from hf_featreuse.program import checks, parse_arguments

# Pages that have their own tests, of what each block does.
OWN_TESTS = {
    f"docs/{path.stem.removeprefix('test_docs_')}.md" for path in Path(__file__).parent.glob("test_docs_*.py")
}
PYTHON = sorted({block.page for block in BLOCKS if block.language == "python"} - OWN_TESTS)
# Needs two processes, see below.
DISTRIBUTED = "docs/distributed.md"


class QuietConfig(FeatureReuseConfig):
    """The config as a page makes it, without progress bars."""

    def __init__(self, output_dir, **more):
        super().__init__(output_dir, use_cpu=True, disable_tqdm=True, save_strategy="no", **more)


def deep_model():
    """A ViT of 12 blocks: some pages name the later ones."""
    config = copy.deepcopy(build("vit").config)
    config.num_hidden_layers = 12
    return ViTForImageClassification(config).train()


def names_of_the_reader(folder):
    """What the pages take as given: a model, data, and what belongs to a loop."""
    model = deep_model()
    blocks = find_residual_blocks(model)
    loader = [batch(seed=seed) for seed in range(3)]
    data = {"train": examples(8), "test": examples(4)}
    return {
        **{"model": model, "batch": loader[0], "labels": loader[0]["labels"], "loader": loader, **data},
        **{"validation_loader": loader, "eval_loader": loader, "optimizer": torch.optim.SGD(model.parameters(), 0.1)},
        "args": FeatureReuseConfig(**options(folder / "args")),
        "trainer": hf_featreuse.FeatureReuseTrainer(build("vit"), FeatureReuseConfig(**options(folder / "args"))),
        "reuse": FeatureReuse(
            model, blocks, FeatureReuseSchedule(len(blocks), drop_granularity="sample", seed=5), train_trunk=True
        ),
        **{"step": 1, "micro_batch": 0, "world_size": 1, "rank": 0, "full_size": len(loader[0]["labels"])},
    }


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with the checkpoints and images that the pages name, at the paths by which they name them."""
    folder = tmp_path_factory.mktemp("docs")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    for name in ("outputs/digits", "ada/digits", "path/to/checkpoint", "google/vit-base-patch16-224-in21k"):
        model = build("vit")
        # The checkpoint of ImageNet-21k comes without a head.
        (ViTModel(model.config) if name.startswith("google") else model).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    for index in range(20):
        image = folder / "AI-Lab-Makerere" / "beans" / ("healthy", "bean_rust")[index % 2] / f"{index}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 36), 60).convert("RGB").save(image)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PYTHON if page != DISTRIBUTED])
def test_python_blocks_run(page, here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setattr(hf_featreuse, "FeatureReuseConfig", QuietConfig)
    for block in BLOCKS:
        if (block.page, block.language) == (page, "python"):
            exec(compile(block.text, page, "exec"), names_of_the_reader(here))


def loop_of_ranks(folder):
    """The loop of the page on distributed training, on one rank of two; the weights after it."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    (text,) = (block.text for block in BLOCKS if (block.page, block.language) == (DISTRIBUTED, "python"))
    model = build("vit").train()
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    names["loader"] = torch.utils.data.DataLoader(examples(16), batch_size=4)
    before = state_of(model)
    exec(compile(text, DISTRIBUTED, "exec"), names)
    return {"before": before, "after": state_of(model), "wrapper": type(names["ddp_model"]).__name__}


@pytest.mark.slow
@pytest.mark.distributed
def test_the_loop_of_several_processes_runs(tmp_path):
    first, second = run_on_ranks({"loop": loop_of_ranks}, tmp_path)["loop"]
    assert first["wrapper"] == "DistributedDataParallel", first
    assert not torch.equal(first["before"]["classifier.weight"], first["after"]["classifier.weight"])
    assert all(torch.equal(first["after"][name], second["after"][name]) for name in first["after"])


# Command lines


def read_script(path, arguments, monkeypatch):
    """Run a script up to where it has read its command line."""
    script = ROOT / path
    assert script.is_file(), f"{path} does not exist"
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    into_dataclasses = HfArgumentParser.parse_args_into_dataclasses

    def parse(self, args=None, **more):
        *_, rest = into_dataclasses(self, args, **{**more, "return_remaining_strings": True})
        assert rest == [], f"{path} has no flags {rest}"
        raise Parsed

    stop_after_parsing(monkeypatch)
    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", parse)
    if "hf_featreuse.program" in script.read_text(encoding="utf-8"):
        read_training(arguments, monkeypatch)
        return
    if "parse_arg" not in script.read_text(encoding="utf-8"):
        assert arguments == [], f"{path} takes no argument"
        return
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def read_training(arguments, monkeypatch):
    """Read the command line of the training program; a file of options is one that a command of the page writes."""
    # Trackers need not be installed here.
    known = list(checks.INTEGRATION_TO_CALLBACK)
    monkeypatch.setattr(checks, "get_available_reporting_integrations", lambda: known)
    words = iter(arguments)
    flags = [word for word in words if word != "--config" or not next(words).endswith("/run.yaml")]
    if "--help" not in flags and not flags[:1] == ["run.yaml"]:
        parse_arguments([*flags, "--use_cpu"])


def read_launch(parser, arguments, monkeypatch):
    """Read the command line of a launcher, then that of the script or module that it starts."""
    launch = parser.parse_args(arguments)
    if launch.module:
        program = launch.training_script.replace("hf_featreuse", "featreuse")
        read_command([program, *launch.training_script_args], monkeypatch)
        return
    read_script(launch.training_script, launch.training_script_args, monkeypatch)


def read_pip(arguments):
    from pip._internal.commands import create_command

    found, targets = create_command(arguments[0]).parse_args(arguments[1:])
    assert all((ROOT / name).is_file() for name in found.constraints)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for target in [*targets, *found.editables]:
        _, _, extra = target.partition("[")
        assert not extra or extra.rstrip("]") in extras, target


def read_command(command, monkeypatch):
    """Hand a command line to the parser of the program that it calls."""
    program, *arguments = command
    if program == "featreuse" and arguments[0] == "train":
        read_training(arguments[1:], monkeypatch)
    elif program == "featreuse":
        stop_after_parsing(monkeypatch)
        with pytest.raises(Parsed):
            cli.main(arguments)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert arguments[0] == "launch"
        read_launch(launch_command_parser(), arguments[1:], monkeypatch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        read_launch(get_args_parser(), arguments, monkeypatch)
    elif program == "pip":
        read_pip(arguments)
    elif program == "zensical":
        from zensical.main import cli as zensical

        zensical.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    elif program == "python" and arguments[0] == "-c":
        compile(arguments[1], "<command line>", "exec")
    elif program == "python":
        read_script(arguments[0], arguments[1:], monkeypatch)
    elif program == "pytest":
        paths = [ROOT / argument for argument in arguments if argument.startswith("tests/")]
        assert all(path.exists() for path in paths), command
    else:
        assert command == ["hf", "auth", "login"], f"No test knows how to read `{shlex.join(command)}`"


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda text: text)
def test_a_command_line_is_one_that_its_program_takes(page, line, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    read_command(COMMANDS[page, line], monkeypatch)
    for name in set(sys.modules) - before:  # Scripts import their neighbors by short names.
        if getattr(sys.modules[name], "__file__", None) and str(ROOT) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.mark.slow
def test_pytest_takes_the_flags_that_the_pages_pass():
    words = [word for command in COMMANDS.values() if command[0] == "pytest" for word in command[1:]]
    flags = [word for word in words if not word.startswith("tests/")]
    assert "-n0" in flags
    # `--markers` prints and exits, once the whole command line is read.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, "--markers"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


# Commands that are run


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.language == "console"],
    ids=lambda block: block.text.splitlines()[0],
)
def test_what_a_page_shows_of_a_command_is_what_it_prints(block, capsys):
    line, *shown = block.text.splitlines()
    _, *arguments = shlex.split(line.removeprefix("$ "))
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == shown


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder in which the example was run, for two steps, at its usual place."""
    folder = tmp_path_factory.mktemp("digits")
    flags = ["--max_steps", "2", "--use_cpu", "--disable_tqdm", "true", "--eval_strategy", "no"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
        patch.setattr(sys, "argv", ["example", *flags])
        runpy.run_path(str(ROOT / "examples" / "run_image_classification.py"), run_name="__main__")
    return folder


RUN = [
    (page, line)
    for page, line in COMMANDS
    if line.startswith("featreuse ")
    if (page, line.split()[1]) == ("docs/pruning.md", "prune") or "--plot" in line
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), RUN, ids=lambda text: text)
def test_a_command_runs(page, line, digits, monkeypatch, capsys):
    monkeypatch.chdir(digits)
    shutil.rmtree("outputs/shallow", ignore_errors=True)  # The page writes four models to one place.
    assert cli.main(COMMANDS[page, line][1:]) == 0, capsys.readouterr().err


# Parts of this file that would pass without looking


def test_every_block_is_looked_at():
    languages = {block.language for block in BLOCKS}
    assert languages <= {"", "bash", "bibtex", "console", "python", "yaml"}
    assert {"README.md", "docs/index.md", "docs/method.md", DISTRIBUTED} <= set(PYTHON)
    assert {"docs/recipes.md", "docs/subclassing.md"} <= OWN_TESTS
    assert len(COMMANDS) > 50
    assert len(RUN) >= 5
