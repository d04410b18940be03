"""Imports run one way, public names are documented, and the examples in the docstrings run."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments

import hf_featreuse
from hf_featreuse import FeatureReuseError

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_featreuse"
OPTIONAL = {"peft", "matplotlib", "sklearn", "torchvision", "wandb", "trackio", "tensorboard", "optuna", "timm"}
# Our modules whose names are public in addition to those of `hf_featreuse` itself.
PUBLIC_MODULES = {
    "hf_featreuse",
    *(
        f"hf_featreuse.{m}"
        for m in (
            *(
                "analysis",
                "checkpoints",
                "checkpoints.plain_loop",
                "data",
                "data.metrics",
                "evaluation",
                "hub",
                "inspection",
                "method.step_times",
                "plotting",
                "program",
                "pruning",
                "recipe.losses",
                "recipe.mixing",
            ),
            *("recipe.mixing", "small_models", "trainer.console", "trainer.step_log"),
        )
    ),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in FILES if name != "hf_featreuse"]


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path, *, top_level_only: bool = False, for_types: bool = False) -> list[tuple[str, str | None]]:
    """Every import as (module, name), name being None in `import module`; relative ones made absolute."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found: list[tuple[str, str | None]] = []
    pending: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
        elif for_type_checkers(node) and not for_types:
            continue
        elif top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        pending += list(ast.iter_child_nodes(node))
    return found


# Imports


def test_imports_keep_to_the_floors_and_form_no_cycle():
    """The contracts of pyproject.toml."""
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_imports_inside_a_room_form_no_cycle():
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        at_top = {
            f"{module}.{imported}" if f"{module}.{imported}" in FILES else module
            for module, imported in imports(FILES[name], top_level_only=True)
            if module.split(".")[0] == "hf_featreuse"
        }
        graph[name] = {target for target in at_top if target in FILES} - {name}
    while graph:
        leaves = {name for name, targets in graph.items() if not targets & graph.keys()}
        assert leaves, f"cycle among {sorted(graph)}"
        graph = {name: targets for name, targets in graph.items() if name not in leaves}


# What a checkpoint's files hold: their format is the business of the room that reads them.
FILE_FORMATS = {
    "transformers.TrainerState",
    "transformers.TrainingArguments",
    "transformers.trainer_pt_utils.safe_globals",
}


def test_only_the_room_of_the_trainers_knows_the_trainer_of_transformers():
    for name in MODULES:
        room = name.split(".")[1]
        known = {
            f"{module}.{imported}"
            for module, imported in imports(FILES[name], for_types=True)
            if module.startswith("transformers") and imported is not None
            if imported in ("Trainer", "TrainingArguments", "TrainerCallback", "TrainerState", "TrainerControl")
            or (module.startswith(("transformers.trainer", "transformers.training_args")) and not imported.isupper())
        }
        known -= FILE_FORMATS if room == "checkpoints" else set()
        assert not known or room == "trainer", f"{name} imports {sorted(known)}"


def test_optional_libraries_are_imported_where_they_are_used():
    for name in FILES:
        at_top = {module.split(".")[0] for module, _ in imports(FILES[name], top_level_only=True)}
        assert not at_top & OPTIONAL, f"{name} imports {sorted(at_top & OPTIONAL)} at its top"


@pytest.mark.slow
def test_what_is_not_used_is_not_imported():
    program = """
import sys
heavy = ("torch", "transformers", "datasets", "accelerate", "evaluate", "peft", "sklearn")
optional = ("matplotlib", "wandb", "tensorboard", "optuna", "onnx", "onnxruntime", "openvino")
import hf_featreuse
print([name for name in (*heavy, *optional) if name in sys.modules])
from hf_featreuse import FeatureReuseTrainer
# transformers itself may import peft and scikit-learn.
print([name for name in ("evaluate", *optional) if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines() == ["[]", "[]"]


def test_every_import_of_ours_is_absolute():
    for name, path in FILES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        relative = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert not relative, f"{name}, lines {relative}"


SCRIPTS = sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_examples_and_benchmarks_import_only_public_names(path):
    for module, name in imports(path):
        if module.split(".")[0] == "hf_featreuse":
            assert module in PUBLIC_MODULES, module
            assert name is not None
            assert not name.startswith("_"), name
            public = getattr(importlib.import_module(module), "__all__", None)
            assert public is None or name in public, f"{path.name} imports {name}, which {module} does not export"


def test_there_are_scripts_to_check():
    assert {path.name for path in SCRIPTS} >= {"run_image_classification.py", "subclass_trainer.py", "speed.py"}


# Public names


def test_all_names_what_the_package_exports():
    """Every name resolves, from the module that type checkers are told of."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for_types = next(node for node in tree.body if for_type_checkers(node))
    told = {alias.name: node.module for node in for_types.body for alias in node.names}
    assert {name: f"hf_featreuse.{module}" for name, module in hf_featreuse._MODULES.items()} == told
    assert sorted(told) == hf_featreuse.__all__
    assert set(hf_featreuse.__all__) <= set(dir(hf_featreuse))
    for name, module in told.items():
        value = getattr(hf_featreuse, name)
        assert value is getattr(importlib.import_module(module), name)
        assert value.__module__ == module, f"{name} is defined in {value.__module__}"
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = hf_featreuse.Nonsense


def test_a_command_that_does_nothing_yet_imports_no_heavy_library():
    """Of the 6 seconds that help once took, most were these imports."""
    for line in (
        "--help",
        "inspect --help",
        "analyze --help",
        "prune --help",
        "push --help",
        "env --help",
        "--version",
        "insepct",
    ):
        program = f"""
import contextlib, io, sys
from hf_featreuse.cli import main
shown = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
    main({line.split()})
assert shown.getvalue().removeprefix("usage: ").startswith("featreuse")
heavy = ("torch", "transformers", "datasets", "matplotlib", "huggingface_hub")
print([name for name in heavy if name in sys.modules])
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.strip() == "[]", line


def test_names_of_the_method_are_public():
    names = """FeatureReuseSchedule StepPlan StepKind find_residual_blocks ResidualBlock skip_blocks train_only
    FeatureReuse FeatureReuseConfig FeatureReuseTrainer FeatureReuseError""".split()
    assert set(names) <= set(hf_featreuse.__all__)


def is_child_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, FeatureReuseError) and value is not FeatureReuseError


@pytest.mark.parametrize("name", hf_featreuse.__all__)
def test_public_name_is_documented(name):
    value = getattr(hf_featreuse, name)
    text = value.__doc__
    assert text, f"{name} has no docstring"
    first, *rest = text.strip().splitlines()
    assert first.endswith("."), f"the docstring of {name} does not begin with one sentence on one line: {first}"
    if is_child_error(value):
        assert issubclass(value, (ValueError, RuntimeError, ImportError)), name
        return
    assert not rest or not rest[0].strip(), f"the summary of {name} is longer than a line"
    assert "Example:" in text, f"the docstring of {name} has no example"
    assert ">>> " in text, f"the docstring of {name} has no example"


@pytest.mark.parametrize(
    "name", [name for name in hf_featreuse.__all__ if inspect.isfunction(getattr(hf_featreuse, name))]
)
def test_every_argument_of_a_public_function_is_documented(name):
    function = getattr(hf_featreuse, name)
    arguments = [argument for argument in inspect.signature(function).parameters if argument != "self"]
    if name != "trainable_blocks":  # Two arguments that its summary names.
        missing = [argument for argument in arguments if f"{argument} (`" not in function.__doc__]
        assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize(
    "name",
    [
        *("BatchMixer", "FeatureReuse", "FeatureReuseConfig", "FeatureReuseSchedule", "ResidualBlock", "StepCosts"),
        *("StepPlan", "WeightAverage"),
    ],
)
def test_every_argument_of_a_public_class_is_documented(name):
    cls = getattr(hf_featreuse, name)
    arguments = inspect.signature(cls).parameters
    if name == "FeatureReuseConfig":
        theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
        arguments = [field.name for field in dataclasses.fields(cls) if field.name not in theirs]
    missing = [argument for argument in arguments if f"{argument} (`" not in cls.__doc__]
    assert not missing, f"{name}: {missing}"


# Examples


@pytest.mark.parametrize("name", [name for name in MODULES if name != "hf_featreuse.__main__"])
def test_examples_of_the_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    results = doctest.testmod(module, verbose=False)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples of {name} failed"


def test_every_module_is_looked_at():
    found = {info.name for info in pkgutil.walk_packages(hf_featreuse.__path__, "hf_featreuse.")}
    assert found == set(MODULES)
