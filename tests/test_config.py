"""Options: validated at construction, beside TrainingArguments, and on the command line."""

import dataclasses
import itertools
import json
import math
from fractions import Fraction

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_featreuse import ConfigurationError, FeatureReuseArguments, FeatureReuseConfig, FeatureReuseSchedule
from hf_featreuse.config import window_steps
from hf_featreuse.recipe import RecipeArguments

DEFAULTS = {
    "drop_rate": 0.5,
    "drop_rate_schedule": "linear",
    "drop_granularity": "batch",
    "stochastic_depth_steps": 1,
    "masked_freeze_steps": 1,
    "scale_kept": False,
    "train_trunk": True,
    "frozen_batch_norm": "batch",
    "allow_inexact_skip": False,
    "target_blocks": None,
    "reuse_start": 0.0,
    "reuse_end": 1.0,
    "reuse_seed": None,
}
OTHERS = {
    "drop_rate": 0.3,
    "drop_rate_schedule": "uniform",
    "drop_granularity": "sample",
    "stochastic_depth_steps": 2,
    "masked_freeze_steps": 3,
    "scale_kept": True,
    "train_trunk": False,
    "frozen_batch_norm": "inference",
    "allow_inexact_skip": True,
    "target_blocks": ["layers.0", "layers.1"],
    "reuse_start": 0.25,
    "reuse_end": 0.75,
    "reuse_seed": 7,
}
BAD = [
    *(("drop_rate", value) for value in (0, 1, 0.0, 1.0, -0.1, 1.5, math.nan, True, "0.5", None)),
    *(("drop_rate_schedule", value) for value in ("cosine", "", None)),
    *((n, v) for n in ("stochastic_depth_steps", "masked_freeze_steps") for v in (-1, 0.5, 1.0, True, "1", None)),
    *((n, v) for n in ("scale_kept", "train_trunk", "allow_inexact_skip") for v in (1, 0, "true", None)),
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
        *("--masked_freeze_steps", "3", "--scale_kept", "--train_trunk", "false"),
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


def test_dashes_are_accepted(tmp_path):
    parsed = parse(tmp_path, "--drop-rate", "0.3", "--masked-freeze-steps", "2", "--reuse-seed", "0")
    assert (parsed.drop_rate, parsed.masked_freeze_steps, parsed.reuse_seed) == (0.3, 2, 0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--drop_rate", "1.5"], "`drop_rate=1.5`"),
        (["--drop_rate_schedule", "cosine"], "`drop_rate_schedule='cosine'`"),
        (["--masked_freeze_steps", "-1"], "`masked_freeze_steps=-1`"),
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


# Schedule


def test_schedule_is_built_from_every_option():
    schedule = FeatureReuseArguments(**OTHERS).schedule(num_blocks=6, max_steps=100, seed=1)
    expected = FeatureReuseSchedule(
        6,
        drop_rate=0.3,
        drop_rate_schedule="uniform",
        stochastic_depth_steps=2,
        masked_freeze_steps=3,
        seed=7,
        first_step=25,
        last_step=75,
        drop_granularity="sample",
    )
    assert vars(schedule) == vars(expected)


def test_schedule_of_the_defaults_has_no_end():
    assert vars(FeatureReuseArguments().schedule(6, 100, 1)) == vars(FeatureReuseSchedule(6, seed=1))


@pytest.mark.parametrize(("reuse_seed", "expected"), [(None, 42), (0, 0), (7, 7), (2**64 - 1, 2**64 - 1)])
def test_seed_of_the_schedule(reuse_seed, expected):
    assert FeatureReuseArguments(reuse_seed=reuse_seed).schedule(4, 10, seed=42).seed == expected


@pytest.mark.parametrize(("depth", "freeze", "expected"), [(1, 1, True), (1, 0, True), (0, 1, True), (0, 0, False)])
def test_alternates_unless_both_kinds_have_no_steps(depth, freeze, expected):
    options = FeatureReuseArguments(stochastic_depth_steps=depth, masked_freeze_steps=freeze)
    assert options.alternates is expected
    if not expected:
        assert options.schedule(0, 10, 0).rates == ()


@pytest.mark.parametrize(
    ("start", "end", "max_steps", "expected"),
    [
        (0.0, 1.0, 100, (0, None)),
        (0, 1, 7, (0, None)),
        (0.25, 0.75, 100, (25, 75)),
        (0.25, 0.75, 10, (3, 7)),
        (0.0, 0.5, 3, (0, 1)),
        (0.5, 1.0, 3, (2, None)),
        # Products that come out a rounding error above or below a whole number.
        (0.07, 1.0, 100, (7, None)),
        (0.0, 0.29, 100, (0, 29)),
        (0.1, 0.3, 10, (1, 3)),
        (0.55, 0.57, 100, (55, 57)),
        (1 / 3, 2 / 3, 3, (1, 2)),
        (1 / 3, 2 / 3, 300_000, (100_000, 200_000)),
    ],
)
def test_window_steps_are_those_within_the_fractions(start, end, max_steps, expected):
    assert window_steps(start, end, max_steps) == expected


@pytest.mark.parametrize("max_steps", [1, 7, 10, 64, 99, 100, 1000])
def test_window_steps_equal_exact_arithmetic(max_steps):
    for start, end in itertools.combinations(range(0, 100, 3), 2):
        first, last = window_steps(start / 100, end / 100, max_steps)
        assert first == math.ceil(Fraction(start, 100) * max_steps)
        assert last == math.floor(Fraction(end, 100) * max_steps)
