"""Trainer, accelerate and torch have every private name that training needs; a release without one is refused."""

import ast
import functools
import inspect
import itertools
import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_models import build, examples
from training_runs import config
from transformers import Trainer

import hf_featreuse
from hf_featreuse import FeatureReuseError, FeatureReuseTrainer, IncompatibleVersionError
from hf_featreuse.trainer.private_names import (
    ATTRIBUTES,
    INSTALLED,
    METHODS,
    OTHERS,
    TESTED,
    check_attributes,
    check_names,
)

PACKAGE = Path(hf_featreuse.__file__).parent
SET_BEFORE_TRAINING = [name for name in ATTRIBUTES if name != "push_in_progress"]
WITH_PARAMETERS = [name for name, parameters in METHODS.items() if parameters]


# A later release


def renamed_code(code: types.CodeType, old: str) -> types.CodeType:
    names = tuple(f"{old}_renamed" if name == old else name for name in code.co_names)
    constants = tuple(renamed_code(c, old) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    return code.replace(co_names=names, co_consts=constants)


def renamed_in(value: object, old: str) -> object:
    """A method with another name in its code, otherwise unchanged."""
    if isinstance(value, property):
        return property(renamed_in(value.fget, old))
    function = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else value
    if not isinstance(function, types.FunctionType):
        return value
    code = renamed_code(function.__code__, old)
    copy = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def changed(cls: type, **methods: object) -> type:
    """The class as a later release may have it: with other methods."""
    own = {name: value for base in reversed(cls.__mro__[:-1]) for name, value in vars(base).items()}
    own = {name: value for name, value in {**own, **methods}.items() if value is not None}
    return type(cls.__name__, (), {name: v for name, v in own.items() if name not in ("__dict__", "__weakref__")})


def renamed(cls: type, old: str) -> type:
    """The class after a rename of a method or attribute, in every method of the class."""
    whole = changed(cls)
    others = {name: renamed_in(value, old) for name, value in vars(whole).items()}
    return changed(whole, **{**others, f"{old}_renamed": others.get(old), old: None})


def with_parameters(name: str, change) -> type:
    """Trainer with other names of the parameters of a method, given those it has now."""
    signature = inspect.signature(getattr(Trainer, name))

    def method(self):
        raise AssertionError

    first, *others = signature.parameters.values()
    names = change([parameter.name for parameter in others])
    others = [p.replace(name=new) for p, new in zip(others, names, strict=True)]
    method.__signature__ = signature.replace(parameters=[first, *others])
    return changed(Trainer, **{name: method})


def declared(name: str) -> tuple[list[str], list[str]]:
    """The parameters of a method that are relied on, by position and by name only."""
    positional, _, by_name = (part.replace(",", " ").split() for part in METHODS[name].partition("*"))
    return positional, by_name


# Names


def test_installed_releases_have_every_name(caplog):
    check_names()
    assert not caplog.records


@pytest.mark.parametrize("name", [name for name in METHODS if name != "__init__"])
def test_renamed_method_is_refused(name):
    with pytest.raises(IncompatibleVersionError) as caught:
        check_names(renamed(Trainer, name))
    message = str(caught.value)
    assert f"`Trainer.{name}({METHODS[name]})` does not exist" in message
    assert f"transformers {INSTALLED['transformers']}" in message
    assert f'pip install "transformers>={TESTED["transformers"][0]},<5.' in message
    assert "torch" not in message
    # One name is missing, and no other.
    assert message.count("`Trainer.") == 1


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_renamed_parameter_is_refused(name):
    for relied_on in itertools.chain(*declared(name)):
        other = with_parameters(name, lambda names, old=relied_on: [f"{n}_" if n == old else n for n in names])
        with pytest.raises(IncompatibleVersionError, match=rf"`Trainer.{name}` takes \(.*\b{relied_on}_\b"):
            check_names(other)


@pytest.mark.parametrize("name", [name for name in METHODS if len(declared(name)[0]) > 1])
def test_parameters_in_another_order_are_refused(name):
    with pytest.raises(IncompatibleVersionError, match=f"`Trainer.{name}` takes"):
        check_names(with_parameters(name, lambda names: [names[1], names[0], *names[2:]]))


def test_more_parameters_and_wrappers_are_accepted():
    def save_checkpoint(self, model, trial, metrics=None):
        """Like Trainer's, with one more."""

    def anything(*args, **kwargs):
        return Trainer._save_rng_state(*args, **kwargs)

    @functools.wraps(Trainer._run_epoch)
    def wrapped(*args, **kwargs):
        return Trainer._run_epoch(*args, **kwargs)

    # Methods that a later one still calls stay called.
    calls = renamed_in(Trainer._save_checkpoint, "nothing")
    check_names(changed(Trainer, _save_rng_state=anything, _run_epoch=wrapped, calls=calls))
    check_names(changed(Trainer, _save_checkpoint=save_checkpoint, _save_checkpoint_inner=Trainer._save_checkpoint))


@pytest.mark.parametrize(
    ("caller", "called"),
    [
        ("_inner_training_loop", "_init_training_state"),
        ("_inner_training_loop", "_run_epoch"),
        ("_finalize_training", "_load_best_model"),
        ("_save_checkpoint", "_save_rng_state"),
        ("_prepare_for_training", "_load_optimizer_and_scheduler"),
    ],
)
def test_method_that_is_not_called_any_more_is_refused(caller, called):
    def other(self, *args, **kwargs):
        """Does everything itself."""

    with pytest.raises(IncompatibleVersionError, match=f"`Trainer.{called}` is not called any more"):
        check_names(changed(Trainer, **{caller: other}))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_renamed_attribute_is_refused_at_import(name):
    with pytest.raises(IncompatibleVersionError, match=f"`Trainer.{name}` is not used any more"):
        check_names(renamed(Trainer, name))


@pytest.mark.parametrize(("library", "cls", "name"), OTHERS, ids=lambda value: getattr(value, "__name__", value))
def test_name_of_another_class_is_needed(library, cls, name):
    missing = (library, renamed(cls, name), name)
    others = [entry if entry[1:] != (cls, name) else missing for entry in OTHERS]
    with pytest.raises(IncompatibleVersionError) as caught:
        check_names(others=others)
    message = str(caught.value)
    assert f"{library} {INSTALLED[library]} (`{cls.__name__}.{name}` is not used any more)" in message
    assert f'pip install "{library}>={TESTED[library][0]},<' in message
    assert message.count("pip install") == 1


def test_everything_that_is_missing_is_in_one_error():
    trainer = renamed(renamed(Trainer, "_load_from_checkpoint"), "_tr_loss")
    others = [("torch", renamed(torch.nn.Module, "_compiled_call_impl"), "_compiled_call_impl")]
    with pytest.raises(IncompatibleVersionError) as caught:
        check_names(trainer, others)
    message = str(caught.value)
    for part in ("_load_from_checkpoint", "_tr_loss", "_compiled_call_impl"):
        assert part in message
    assert 'pip install "transformers>=' in message
    assert 'pip install "torch>=' in message
    assert isinstance(caught.value, FeatureReuseError)
    assert isinstance(caught.value, ImportError)


# Versions


@pytest.mark.parametrize("version", ["5.999.0", "5.999.1.dev0", "6.0.0"])
def test_newer_transformers_warns_once(monkeypatch, caplog, version):
    monkeypatch.setitem(INSTALLED, "transformers", version)
    with caplog.at_level(logging.WARNING):
        check_names()
    (record,) = caplog.records
    assert f"transformers {version} is newer than {TESTED['transformers'][1]}" in record.getMessage()


def test_patch_release_of_the_newest_tested_does_not_warn(monkeypatch, caplog):
    monkeypatch.setitem(INSTALLED, "transformers", f"{TESTED['transformers'][1]}.99")
    with caplog.at_level(logging.WARNING):
        check_names()
    assert not caplog.records


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)


@pytest.mark.slow
def test_import_of_the_trainer_stops_with_a_release_that_renamed_methods():
    result = run(
        "from transformers import Trainer\n"
        "for name in ('_load_from_checkpoint', '_run_epoch'):\n"
        "    setattr(Trainer, f'{name}_renamed', getattr(Trainer, name))\n"
        "    delattr(Trainer, name)\n"
        "from hf_featreuse import FeatureReuseTrainer\n"
    )
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "IncompatibleVersionError: " in line]
    assert "_load_from_checkpoint" in line
    assert "_run_epoch" in line


@pytest.mark.slow
def test_import_of_the_trainer_warns_once_of_a_newer_release():
    result = run(
        "import sys\n"
        "from transformers import Trainer\n"
        "sys.modules['transformers'].__version__ = '5.999.0'\n"
        "from hf_featreuse import FeatureReuseTrainer\n"
        "import hf_featreuse\n"
        "hf_featreuse.FeatureReuseTrainer\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("transformers 5.999.0 is newer than") == 1


# Attributes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = FeatureReuseTrainer(build("vit"), config(folder, max_steps=1), train_dataset=examples())
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", SET_BEFORE_TRAINING)
def test_attribute_must_be_set_when_training_starts(trained, name):
    check_attributes(trained)
    value = vars(trained).pop(name)
    try:
        with pytest.raises(IncompatibleVersionError, match=f"`Trainer.{name}` is not set when training starts"):
            check_attributes(trained)
    finally:
        vars(trained)[name] = value


def test_training_stops_before_the_first_step_without_an_attribute(tmp_path):
    class Later(FeatureReuseTrainer):
        """Trainer after a rename: its loop sets another attribute."""

        def _run_epoch(self, *args, **kwargs):
            self._training_loss = self.__dict__.pop("_tr_loss")
            super()._run_epoch(*args, **kwargs)

    trainer = Later(build("vit"), config(tmp_path), train_dataset=examples())
    with pytest.raises(IncompatibleVersionError, match="_tr_loss"):
        trainer.train()
    assert trainer.state.global_step == 0


# The lists are complete


def own_classes() -> list[type]:
    return [cls for cls in FeatureReuseTrainer.__mro__ if cls.__module__.startswith("hf_featreuse")]


def overridden() -> set[str]:
    """Our methods and properties that Trainer has too."""
    return {
        name
        for cls in own_classes()
        for name, value in vars(cls).items()
        if hasattr(Trainer, name)
        and (name == "__init__" or not name.startswith("__"))
        and (callable(value) or isinstance(value, property))
    }


def attributes_of_trainer() -> set[str]:
    """Attributes that Trainer's own code sets on itself."""
    return set(set_on_self(ast.parse(inspect.getsource(Trainer))))


def set_on_self(tree: ast.AST) -> list[str]:
    return [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]


def mentioned_in_the_package() -> set[str]:
    """Every attribute that the package reads, sets or calls, of whatever object."""
    paths = [path for path in PACKAGE.parent.rglob("hf_featreuse/**/*.py") if path.name != "private_names.py"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_override_is_declared():
    assert overridden() <= set(METHODS)
    assert len(own_classes()) >= 2


def test_every_private_name_of_trainer_that_is_used_is_declared():
    private = {name for name in {*vars(Trainer), *attributes_of_trainer()} if name[0] == "_" and name[:2] != "__"}
    assert mentioned_in_the_package() & private <= {*METHODS, *ATTRIBUTES}


def test_every_attribute_of_trainer_that_is_set_is_declared():
    written = {name for cls in own_classes() for name in set_on_self(ast.parse(inspect.getsource(cls)))}
    assert written & attributes_of_trainer() <= set(ATTRIBUTES)


def test_every_declared_name_is_used():
    used = mentioned_in_the_package() | overridden()
    assert {*METHODS, *ATTRIBUTES} <= used
    texts = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    for _, _, name in OTHERS:
        # More than once: not only in the list.
        assert texts.count(name) > 1, name


@pytest.mark.parametrize("name", sorted(overridden()))
def test_parameters_of_an_override_are_declared(name):
    theirs = inspect.signature(getattr(Trainer, name)).parameters
    named = {
        parameter
        for cls in own_classes()
        if name in vars(cls)
        for parameter in inspect.signature(vars(cls)[name]).parameters
        if parameter in theirs and parameter not in ("self", "args", "kwargs")
    }
    # Trainer of transformers 5.17 knows no `private`, which it never passes itself.
    assert named - {"private"} <= set(itertools.chain(*declared(name)))


@pytest.mark.parametrize("name", sorted(overridden()))
def test_override_accepts_what_trainer_may_pass(name):
    theirs = list(inspect.signature(getattr(Trainer, name)).parameters.values())
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    by_name = {p.name: p.name for p in theirs if p.kind is inspect.Parameter.KEYWORD_ONLY}
    in_order = [p.name for p in theirs if p.kind not in variable and p.name not in by_name]
    for cls in own_classes():
        if name in vars(cls):
            bound = inspect.signature(vars(cls)[name]).bind(*in_order, **by_name)
            # Our parameter gets the argument of that name.
            assert {key: value for key, value in bound.arguments.items() if isinstance(value, str)}.items() <= {
                key: key for key in bound.arguments
            }.items(), cls
            inspect.signature(vars(cls)[name]).bind("self", **{key: key for key in in_order[1:]}, **by_name)
