"""The help of the program: by topic, complete, and readable in 80 columns."""

import dataclasses
import re

import pytest

from hf_featreuse.program import DataArguments, ModelArguments, RunArguments, parse_arguments
from hf_featreuse.trainer.arguments import FeatureReuseArguments, FeatureReuseConfig, RecipeArguments


def shown(capsys, flag, columns=80):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as end:
            parse_arguments(["--use_cpu", flag])
    assert not end.value.code
    return capsys.readouterr().out


def flags(text):
    return re.findall(r"^  --(\w+)", text, re.MULTILINE)


def names(*kinds):
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


def test_it_lists_the_method_first_and_every_option_of_ours_once(capsys):
    text = shown(capsys, "--help")
    assert re.findall(r"^([a-z]+):$", text, re.MULTILINE) == ["method", "data", "model", "recipe", "run"]
    assert flags(text)[0] == "drop_rate"
    assert len(flags(text)) == len(set(flags(text)))
    ours = names(FeatureReuseArguments, DataArguments, ModelArguments, RecipeArguments, RunArguments)
    assert ours <= set(flags(text))
    assert "--help_all also lists the other" in text
    assert shown(capsys, "-h") == text


def test_choices_and_defaults_are_shown(capsys):
    text = " ".join(shown(capsys, "--help").split())
    for part in (
        *("{linear,uniform}", "{batch,sample}", "{constant,falling,rising}", "{all,head,none}", "{batch,inference}"),
        *("drop_rate_schedule {linear,uniform} 'linear'", "[20; 30; 3]", "[0.001; 0.001; 5e-05]", "{no,steps,epoch}"),
    ):
        assert part in text


def test_all_lists_every_argument_of_the_trainer_too(capsys):
    assert names(FeatureReuseConfig) - {"_n_gpu"} <= set(flags(shown(capsys, "--help_all")))


@pytest.mark.parametrize("columns", [80, 100])
def test_no_line_is_wider_than_the_terminal(columns, capsys):
    for flag in ("--help", "--help-all"):
        lines = [line for line in shown(capsys, flag, columns).splitlines() if "https://" not in line]
        assert max(map(len, lines)) <= columns
        assert len(lines) > 100
