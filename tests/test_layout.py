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
# What each room of the method may import of ours. Rooms that are not listed are leaves: none of these imports them.
ALLOWED = {
    "errors": set(),
    "schedule": {"errors"},
    "probing": {"errors"},
    "tracing": {"errors", "probing"},
    "targets": {"errors"},
    "blocks": {"errors", "probing", "tracing", "targets"},
    "binding": {"errors", "blocks"},
    "skipping": {"errors", "blocks", "binding"},
    "freezing": {"errors", "blocks"},
    "batch_norm": {"binding"},
    "per_sample": {"errors", "blocks", "binding", "skipping", "freezing"},
    "compiling": {"probing", "blocks", "binding"},
    "sharding": set(),
    "engine": {"errors", "schedule", "blocks", "skipping", "freezing", "per_sample", "batch_norm", "sharding"},
    "distribution": {"errors", "schedule", "engine"},
    "cost": {"errors", "schedule", "probing", "blocks", "freezing", "per_sample"},
    "mixing": {"errors"},
    "averaging": {"errors"},
    "recipe": {"averaging", "mixing"},
    "config": {"errors", "schedule", "freezing", "recipe"},
    "step_log": {"schedule"},
    "resume_state": set(),
    "changed_plans": {"errors", "schedule"},
    "checkpoints": {"errors"},
    "whole_checkpoints": {"errors", "resume_state"},
    "refusals": {"errors"},
    "faults": {"errors", "whole_checkpoints", "sharding"},
    "exact_trainer": {"errors", "checkpoints", "faults", "resume_state", "whole_checkpoints"},
    "engine_trainer": {
        *("config", "distribution", "engine", "errors", "exact_trainer", "refusals", "sharding", "binding"),
    },
    "plotting": {"errors", "inspection", "schedule"},
    "console": {"cost", "engine", "inspection", "schedule", "sharding"},
    "tracking": {"console", "errors", "plotting", "schedule"},
    "recipe_trainer": {"averaging", "engine_trainer", "errors", "mixing", "recipe"},
    "trainer": {
        *("errors", "schedule", "probing", "blocks", "engine", "cost", "config", "step_log", "checkpoints"),
        *("skipping", "freezing", "compiling", "hub", "recipe_trainer", "changed_plans", "console", "tracking"),
    },
}
KNOW_THE_TRAINER = {
    *("config", "console", "engine_trainer", "exact_trainer", "recipe_trainer", "trainer", "hub", "refusals"),
    "tracking",
}
OPTIONAL = {"peft", "matplotlib", "sklearn", "torchvision", "wandb", "trackio", "tensorboard", "optuna", "timm"}
# Modules of ours whose names are public besides those of `hf_featreuse` itself.
PUBLIC_MODULES = {
    "hf_featreuse",
    *(
        f"hf_featreuse.{m}"
        for m in (
            *("analysis", "console", "data", "hub", "inspection", "metrics", "mixing", "plotting", "pruning"),
            *("small_models", "step_log"),
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


def rooms(path: Path, *, at_run_time: bool = False) -> set[str]:
    """The rooms of ours, one for each module or subpackage, that a file imports."""
    found = set()
    for module, name in imports(path, for_types=not at_run_time):
        parts = module.split(".")
        if parts[0] == "hf_featreuse":
            is_package = len(parts) == 1 and name is not None and f"hf_featreuse.{name}" in FILES
            found |= {parts[1]} if len(parts) > 1 else {name} if is_package else {"hf_featreuse"}
    return found


# Imports


@pytest.mark.parametrize("room", ALLOWED)
def test_room_imports_only_what_lies_before_it(room):
    # A room may have several files, which import each other.
    name = f"hf_featreuse.{room}"
    files = [path for module, path in FILES.items() if module == name or module.startswith(f"{name}.")]
    assert files
    found = set().union(*map(rooms, files)) - {room}
    assert found <= ALLOWED[room], f"{room} imports {sorted(found - ALLOWED[room])}"


def test_the_trainer_alone_imports_the_distribution():
    importing = [
        name
        for name, path in FILES.items()
        if "distribution" in rooms(path) and not name.startswith("hf_featreuse.distributed")
    ]
    # The package itself exports its public function.
    assert importing == ["hf_featreuse", "hf_featreuse.engine_trainer"]


def test_imports_of_ours_form_no_cycle():
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


def test_nothing_of_ours_imports_the_trainer():
    assert not [name for name in MODULES if "trainer" in rooms(FILES[name], at_run_time=True)]
    # The model card is written from a trainer, whose type it names.
    assert [name for name in MODULES if "trainer" in rooms(FILES[name])] == ["hf_featreuse.hub.run_card"]


def test_only_a_few_rooms_know_the_trainer_of_transformers():
    for name in MODULES:
        room = name.split(".")[1]
        known = {
            f"{module}.{imported}"
            for module, imported in imports(FILES[name], for_types=True)
            if module.startswith("transformers") and imported is not None
            if imported in ("Trainer", "TrainingArguments", "TrainerCallback", "TrainerState", "TrainerControl")
            or (module.startswith(("transformers.trainer", "transformers.training_args")) and not imported.isupper())
        }
        assert not known or room in KNOW_THE_TRAINER, f"{name} imports {sorted(known)}"


def test_optional_libraries_are_imported_where_they_are_used():
    for name in FILES:
        at_top = {module.split(".")[0] for module, _ in imports(FILES[name], top_level_only=True)}
        assert not at_top & OPTIONAL, f"{name} imports {sorted(at_top & OPTIONAL)} at its top"


@pytest.mark.slow
def test_importing_the_package_imports_no_plotting_or_tracking_library():
    # transformers itself may import peft and scikit-learn.
    program = "import sys, hf_featreuse; print([m for m in ('matplotlib', 'wandb', 'optuna') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


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
            assert module in PUBLIC_MODULES, f"{path.name} imports from {module}"
            assert name is not None
            assert not name.startswith("_"), name
            public = getattr(importlib.import_module(module), "__all__", None)
            assert public is None or name in public, f"{path.name} imports {name}, which {module} does not export"


def test_there_are_scripts_to_check():
    assert {path.name for path in SCRIPTS} >= {"run_image_classification.py", "subclass_trainer.py", "speed.py"}


# Public names


def test_all_names_what_the_package_exports():
    exported = {
        name for name, value in vars(hf_featreuse).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert exported == set(hf_featreuse.__all__)
    assert len(set(hf_featreuse.__all__)) == len(hf_featreuse.__all__)
    assert sorted(hf_featreuse.__all__) == hf_featreuse.__all__


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


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    results = doctest.testmod(module, verbose=False)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples of {name} failed"


def test_every_module_is_looked_at():
    found = {info.name for info in pkgutil.walk_packages(hf_featreuse.__path__, "hf_featreuse.")}
    assert found == set(MODULES)
