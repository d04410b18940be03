"""Options: validated at construction, beside TrainingArguments, and on the command line."""

import dataclasses
import json
import math

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_featreuse import ConfigurationError, FeatureReuseArguments, FeatureReuseConfig
from hf_featreuse.trainer.recipe_arguments import RecipeArguments

DEFAULTS = {
    "drop_rate": 0.5,
    "drop_rate_schedule": "linear",
    "drop_rate_over_time": "constant",
    "drop_granularity": "batch",
    "vanilla_steps": 0,
    "stochastic_depth_steps": 3,
    "masked_freeze_steps": 1,
    "scale_kept": True,
    "train_trunk": "all",
    "frozen_batch_norm": "batch",
    "allow_inexact_skip": False,
    "target_blocks": None,
    "reuse_start": 0.0,
    "reuse_end": 1.0,
    "unfreeze_at": None,
    "reuse_seed": None,
}
OTHERS = {
    "drop_rate": 0.3,
    "drop_rate_schedule": "uniform",
    "drop_rate_over_time": "falling",
    "drop_granularity": "sample",
    "vanilla_steps": 1,
    "stochastic_depth_steps": 2,
    "masked_freeze_steps": 3,
    "scale_kept": False,
    "train_trunk": "head",
    "frozen_batch_norm": "inference",
    "allow_inexact_skip": True,
    "target_blocks": ["layers.0", "layers.1"],
    "reuse_start": 0.25,
    "reuse_end": 0.75,
    "unfreeze_at": None,
    "reuse_seed": 7,
}
BAD = [
    *(("drop_rate", value) for value in (1, 1.0, -0.1, 1.5, math.nan, True, False, "0.5", None)),
    *(("drop_rate_schedule", value) for value in ("cosine", "", None)),
    *(("drop_rate_over_time", value) for value in ("linear", "", None)),
    *(
        (name, value)
        for name in ("vanilla_steps", "stochastic_depth_steps", "masked_freeze_steps")
        for value in (-1, 0.5, 1.0, True, "1", None)
    ),
    *((name, value) for name in ("scale_kept", "allow_inexact_skip") for value in (1, 0, "true", None)),
    *(("train_trunk", value) for value in (1, 0, "true", "ALL", "", None)),
    *(("drop_granularity", value) for value in ("block", "", None)),
    *(("frozen_batch_norm", value) for value in ("eval", "", None)),
    *(("target_blocks", value) for value in ("", [], [""], ["layers.0", 1], 3, ["layers.0", None])),
    *(("reuse_start", value) for value in (-0.1, 1.1, math.nan, True, "0", None)),
    *(("reuse_end", value) for value in (-0.1, 1.1, math.nan, True, "1", None)),
    *(("reuse_seed", value) for value in (-1, 2**64, 0.5, True, "1")),
]


def config(tmp_path, **options: object) -> FeatureReuseConfig:
    return FeatureReuseConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)


def parse(tmp_path, *arguments: str) -> FeatureReuseConfig:
    parser = HfArgumentParser(FeatureReuseConfig)
    (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *arguments])
    return parsed


# Validation


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_value_is_named_at_construction(tmp_path, name, value):
    for make in (FeatureReuseArguments, lambda **options: config(tmp_path, **options)):
        with pytest.raises(ConfigurationError) as caught:
            make(**{name: value})
        assert f"`{name}={value!r}`" in str(caught.value)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"), [("mixup_alpha", -1.0), ("cutmix_alpha", float("nan")), ("ema_decay", 1.0), ("ema_decay", 0)]
)
def test_bad_value_of_the_recipe_is_named_at_construction(tmp_path, name, value):
    with pytest.raises(ConfigurationError, match=f"`{name}={value!r}`"):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.6, 0.4), (1.0, 1.0), (0.0, 0.0)])
def test_empty_window_is_an_error(start, end):
    with pytest.raises(ConfigurationError, match=rf"`reuse_start={start}` to `reuse_end={end}` is empty"):
        FeatureReuseArguments(reuse_start=start, reuse_end=end)


def test_value_set_later_is_checked_when_the_schedule_is_built():
    options = FeatureReuseArguments()
    options.drop_rate = 2.0
    with pytest.raises(ConfigurationError, match=r"`drop_rate=2\.0`"):
        options.schedule(4, 100, 0)


def test_bad_value_stops_before_training_arguments_are_processed(tmp_path):
    with pytest.raises(ConfigurationError):
        config(tmp_path / "new", drop_rate=2.0)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_good_value_is_taken_unchanged(tmp_path, name, value):
    assert getattr(FeatureReuseArguments(**{name: value}), name) == value
    assert getattr(config(tmp_path, **{name: value}), name) == value


@pytest.mark.parametrize(("value", "word"), [(True, "all"), (False, "none")])
def test_train_trunk_may_be_a_boolean_in_python(tmp_path, value, word):
    for options in (FeatureReuseArguments(train_trunk=value), config(tmp_path, train_trunk=value)):
        assert options.train_trunk == options.settings()["train_trunk"] == word
    values = {"output_dir": str(tmp_path), "train_trunk": value}
    (parsed,) = HfArgumentParser(FeatureReuseConfig).parse_dict(values)
    assert parsed.train_trunk == word


@pytest.mark.parametrize("target", [r".*\.layers\.[0-3]", ["layers.0"], ("layers.0", "layers.1")])
def test_targets_may_be_a_string_a_list_or_a_tuple(target):
    assert FeatureReuseArguments(target_blocks=target).target_blocks == target


# Defaults


def test_defaults_are_as_documented(tmp_path):
    assert FeatureReuseArguments().settings() == DEFAULTS
    assert config(tmp_path).settings() == DEFAULTS


def test_settings_hold_our_options_and_no_others(tmp_path):
    assert config(tmp_path, **OTHERS).settings() == OTHERS
    assert set(OTHERS) == {field.name for field in dataclasses.fields(FeatureReuseArguments)}


def test_no_default_of_training_arguments_changes(tmp_path):
    theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name: field for field in dataclasses.fields(FeatureReuseConfig)}
    recipe = {field.name for field in dataclasses.fields(RecipeArguments)}
    assert set(ours) == set(theirs) | set(DEFAULTS) | recipe
    for name, field in theirs.items():
        assert (ours[name].default, ours[name].default_factory) == (field.default, field.default_factory), name
    plain, made = TrainingArguments(output_dir=str(tmp_path)), FeatureReuseConfig(output_dir=str(tmp_path))
    # `logging_dir` and the like hold the time.
    varying = {name for name in theirs if isinstance(getattr(plain, name), str) and "runs" in getattr(plain, name)}
    for name in theirs.keys() - varying:
        assert str(getattr(made, name)) == str(getattr(plain, name)), name
    assert made.world_size == plain.world_size


def test_config_is_training_arguments(tmp_path):
    made = config(tmp_path, learning_rate=0.1, seed=3)
    assert isinstance(made, TrainingArguments)
    assert isinstance(made, FeatureReuseArguments)
    assert (made.learning_rate, made.seed, made.drop_rate) == (0.1, 3, 0.5)
    assert made.device.type == "cpu"


def test_output_dir_stays_the_first_positional_argument(tmp_path):
    assert FeatureReuseConfig(str(tmp_path)).output_dir == str(tmp_path)


# Command line


def test_command_line_defaults_are_those_of_the_config(tmp_path):
    assert parse(tmp_path).settings() == DEFAULTS


def test_command_line_takes_every_option(tmp_path):
    parsed = parse(
        tmp_path,
        *("--drop_rate", "0.3", "--drop_rate_schedule", "uniform", "--stochastic_depth_steps", "2"),
        *("--masked_freeze_steps", "3", "--scale_kept", "false", "--train_trunk", "head"),
        *("--vanilla_steps", "1", "--drop_rate_over_time", "falling"),
        *("--drop_granularity", "sample", "--frozen_batch_norm", "inference", "--allow_inexact_skip"),
        *("--target_blocks", "layers.0", "layers.1"),
        *("--reuse_start", "0.25", "--reuse_end", "0.75", "--reuse_seed", "7"),
    )
    assert parsed.settings() == OTHERS


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["layers.0"], "layers.0"),
        ([r".*\.layers\.[01]"], r".*\.layers\.[01]"),
        (["layers.0", "layers.1"], ["layers.0", "layers.1"]),
    ],
)
def test_one_target_is_a_regular_expression_and_several_are_names(tmp_path, values, expected):
    assert parse(tmp_path, "--target_blocks", *values).target_blocks == expected
    assert parse(tmp_path, "--target-blocks", *values, "--seed", "3").target_blocks == expected


def test_scaling_is_turned_off_as_any_flag_of_training_arguments(tmp_path):
    assert [parse(tmp_path, *off).scale_kept for off in (["--no_scale_kept"], ["--scale_kept", "false"])] == [
        False
    ] * 2


def test_dashes_are_accepted(tmp_path):
    parsed = parse(tmp_path, "--drop-rate", "0.3", "--masked-freeze-steps", "2", "--reuse-seed", "0")
    assert (parsed.drop_rate, parsed.masked_freeze_steps, parsed.reuse_seed) == (0.3, 2, 0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--drop_rate", "1.5"], "`drop_rate=1.5`"),
        (["--drop_rate_schedule", "cosine"], "`drop_rate_schedule='cosine'`"),
        (["--masked_freeze_steps", "-1"], "`masked_freeze_steps=-1`"),
        (["--train_trunk", "false"], "`train_trunk='false'` is unknown. Pass one of ('all', 'head', 'none')"),
        (["--drop_rate_over_time", "linear"], "`drop_rate_over_time='linear'`"),
        (["--reuse_start", "0.5", "--reuse_end", "0.5"], "`reuse_start=0.5`"),
    ],
)
def test_bad_value_on_the_command_line_is_named(tmp_path, arguments, named):
    with pytest.raises(ConfigurationError) as caught:
        parse(tmp_path, *arguments)
    assert named in str(caught.value)


def test_every_option_has_help():
    text = HfArgumentParser(FeatureReuseConfig).format_help()
    for field in dataclasses.fields(FeatureReuseArguments):
        assert f"--{field.name}" in text
        assert len(field.metadata["help"]) > 30, field.name


@pytest.mark.parametrize("target", [None, r".*layers\.0", ["layers.0"], ["layers.0", "layers.1"]])
def test_dictionaries_and_json_keep_strings_and_lists(tmp_path, target):
    values = {"output_dir": str(tmp_path), "target_blocks": target, "drop_rate": 0.3}
    parser = HfArgumentParser(FeatureReuseConfig)
    assert parser.parse_dict(values)[0].target_blocks == target
    (tmp_path / "options.json").write_text(json.dumps(values))
    parsed = parser.parse_json_file(str(tmp_path / "options.json"))[0]
    assert (parsed.target_blocks, parsed.drop_rate) == (target, 0.3)


def test_options_are_written_with_the_training_arguments(tmp_path):
    made = config(tmp_path, **OTHERS)
    written = made.to_dict()
    assert {name: written[name] for name in OTHERS} == OTHERS
    assert {name: json.loads(made.to_json_string())[name] for name in OTHERS} == OTHERS
    assert made.to_sanitized_dict()["drop_rate"] == 0.3
