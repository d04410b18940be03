"""Files of options: what is refused of them, and that the saved one repeats a run."""

import pytest
import yaml

from hf_featreuse import ConfigurationError
from hf_featreuse.program import parse_arguments, saved_options
from hf_featreuse.program.config_file import as_yaml, sections


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drop_rat: 1", "`drop_rat` in .* is not an option for a file. Did you mean drop_rate"),
        ("config: other.yaml", "Pass it on the command line"),
        ("launch: 2", "Pass it on the command line"),
        ("5: x", "`5` in .* is not an option"),
        ("learning_rate: [1]", r"`learning_rate` is \[1\]"),
        ("learning_rate: null", "`learning_rate` is null"),
        ("learning_rate: fast", "invalid float value"),
        ("- a", "contains a list"),
        ("", "contains nothing"),
        ("a: [", "cannot be read as YAML"),
        ("a: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("use_cpu: yes please", "use_cpu"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        parse_arguments(["--config", str(file)])


@pytest.mark.parametrize("name", ["missing.yaml", "run.txt", "folder.yaml"])
def test_a_file_that_is_none(name, tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigurationError, match=r"cannot be read|does not end in"):
        parse_arguments(["--config", str(tmp_path / name)])


RUNS = {
    "digits": [],
    # Values that are TrainingArguments' defaults and not those of a run from scratch.
    "scratch": [
        *"--train_dir x --model_type vit --output_dir o --weight_decay 0 --warmup_steps 0 --ema_decay 0.9".split(),
        *"--target_blocks layers.0 layers.1 --eval_strategy no --no_scale_kept --report_to none".split(),
        *("--lr_scheduler_kwargs", '{"num_cycles": 1}'),
    ],
    "fine-tuning": ["--train_dir", "x", "--output_dir", "o", "--early_stopping_patience", "2", "--do_train"],
    "evaluation": ["--do_eval", "--model_name_or_path", "x", "--output_dir", "o", "--optim", "sgd"],
}


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS.keys())
def test_a_saved_file_gives_the_same_options_again(words, tmp_path):
    options = parse_arguments(["--use_cpu", *words])
    (tmp_path / "run.yaml").write_text(as_yaml(options))
    again = parse_arguments(["--config", str(tmp_path / "run.yaml")])
    assert again.training.to_dict() == options.training.to_dict()
    assert (again.data, again.model) == (options.data, options.model)
    assert vars(again.run) == {**vars(options.run), "config": None}
    assert as_yaml(again) == as_yaml(options)


def test_tokens_and_how_a_run_begins_are_not_saved():
    secret = "hf_" + "x" * 30
    words = ["--token", secret, "--hub_token", secret, "--overwrite_output_dir", "--resume_from_checkpoint", "a/c-3"]
    text = as_yaml(parse_arguments(["--use_cpu", "--output_dir", "o", *words, "--trust_remote_code"]))
    assert secret not in text
    saved = yaml.safe_load(text)
    assert not {"token", "hub_token", "overwrite_output_dir", "resume_from_checkpoint", "config", "launch"} & set(
        saved
    )
    assert saved["trust_remote_code"] is True and saved["drop_rate"] == 0.5
    assert text.index("# method") < text.index("# data") < text.index("# model") < text.index("# recipe")


def test_every_option_has_one_topic():
    names = [name for topic in sections().values() for name in topic]
    assert len(names) == len(set(names)) > 150


def test_a_run_that_fails_at_once_leaves_no_file_or_the_one_before(tmp_path):
    options = parse_arguments(["--use_cpu", "--output_dir", str(tmp_path / "out")])
    file = tmp_path / "out" / "run.yaml"
    for before in (None, "mine"):
        if before:
            file.write_text(before)
        with pytest.raises(KeyError), saved_options(options):
            assert "drop_rate" in file.read_text()
            raise KeyError
        assert (file.read_text() if file.exists() else None) == before
    (tmp_path / "out" / "checkpoint-3").mkdir()
    with pytest.raises(KeyError), saved_options(options):
        raise KeyError
    assert "drop_rate" in file.read_text()
