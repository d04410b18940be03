"""The example without a Trainer: the same masks, losses and weights as with one, exact resume, two processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_runs import free_port
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, pipeline

from hf_featreuse import CheckpointError, ConfigurationError, FeatureReuseSchedule, StepError
from hf_featreuse.checkpoints.changed_settings import PlanSource

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "run_image_classification_no_trainer.py"
TINY = "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=16"
# Three steps an epoch.
FLAGS = [
    *("--disable_tqdm", "true", "--use_cpu", "true", "--max_train_samples", "96", "--max_steps", "7"),
    *("--logging_steps", "1", "--eval_strategy", "epoch", "--save_strategy", "steps", "--save_steps", "1"),
    *("--save_total_limit", "9", "--drop_rate_schedule", "uniform"),
]
EVERYTHING = [
    *("--config_overrides", f"{TINY},hidden_dropout_prob=0.1", "--rand_augment_ops", "2", "--ema_decay", "0.7"),
    *("--mixup_alpha", "0.8", "--cutmix_alpha", "1", "--label_smoothing_factor", "0.1"),
]


@pytest.fixture(scope="module")
def with_trainer():
    import run_image_classification

    return run_image_classification


@pytest.fixture(scope="module")
def without():
    import run_image_classification_no_trainer

    return run_image_classification_no_trainer


def weights(folder):
    return AutoModelForImageClassification.from_pretrained(folder).state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logs(path, *names):
    history = json.loads(path.read_text())
    history = history["log_history"] if isinstance(history, dict) else history
    return [tuple(entry.get(name) for name in names) for entry in history if names[0] in entry]


def test_it_is_at_most_250_lines():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        EVERYTHING,
        ["--config_overrides", TINY, "--gradient_accumulation_steps", "2", "--drop_granularity", "sample"],
        ["--config_overrides", TINY, "--drop_rate", "0"],
        [
            *("--config_overrides", TINY, "--vanilla_steps", "1", "--train_trunk", "head", "--scale_kept", "false"),
            *("--drop_rate_over_time", "falling", "--reuse_start", "0.1", "--drop_rate", "0.9"),
        ],
        ["--model_type", "convnext", "--train_trunk", "none", "--weight_decay", "0.1", "--max_grad_norm", "0.1"],
    ],
    ids=["everything", "accumulation and sets per sample", "plain", "cycle", "convnext"],
)
def test_masks_losses_and_weights_are_bit_identical_to_the_trainer(with_trainer, without, tmp_path, flags):
    with_trainer.run(["--output_dir", str(tmp_path / "a"), *FLAGS, *flags])
    without.run(["--output_dir", str(tmp_path / "b"), *FLAGS, *flags])
    names = ("loss", "loss/stochastic_depth", "loss/masked_freeze", "loss/vanilla", "dropped_blocks", "compute_share")
    first = logs(tmp_path / "a" / "trainer_state.json", *names)
    second = logs(tmp_path / "b" / "log_history.json", *names)
    assert first == second
    assert len(first) == 7
    accuracies = [
        logs(tmp_path / "a" / "trainer_state.json", "eval_accuracy", "eval_top5_accuracy"),
        logs(tmp_path / "b" / "log_history.json", "eval_accuracy", "eval_top5_accuracy"),
    ]
    assert accuracies[0] == accuracies[1] != []
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in "ab"]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-6)


@pytest.mark.slow
def test_resume_is_exact_and_the_model_is_plain(without, tmp_path):
    whole = tmp_path / "whole"
    without.run(["--output_dir", str(whole), *FLAGS, *EVERYTHING])
    # Inside the first epoch, at its end, inside the second, and at the end of the run.
    for step in (2, 3, 4, 7):
        folder = tmp_path / str(step)
        shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        without.run(["--output_dir", str(folder), *FLAGS, *EVERYTHING, *LAST])
        assert same(weights(folder), weights(whole)), step
        assert (folder / "log_history.json").read_text() == (whole / "log_history.json").read_text(), step
    # What a kill leaves of a checkpoint has another name.
    (whole / "checkpoint-7").rename(whole / "unfinished-7")
    with pytest.raises(ConfigurationError, match=r"contains checkpoints\. Pass `--resume_from_checkpoint last`"):
        without.run(["--output_dir", str(whole), *FLAGS, *EVERYTHING])
    without.run(["--output_dir", str(whole), *FLAGS, *EVERYTHING, *LAST])
    assert (whole / "checkpoint-7").is_dir()
    assert (whole / "training.png").stat().st_size > 0
    assert pipeline("image-classification", model=str(whole)).model.config.id2label[3] == "3"


@pytest.mark.slow
def test_limits_kept_checkpoints_and_prints_both_summaries(without, tmp_path, capsys):
    flags = [*FLAGS, "--config_overrides", TINY, "--save_total_limit", "2", "--disable_tqdm", "false"]
    without.run(["--output_dir", str(tmp_path / "out"), *flags])
    assert sorted(path.name for path in (tmp_path / "out").glob("*-*")) == ["checkpoint-6", "checkpoint-7"]
    said = capsys.readouterr()
    assert "Feature reuse with ViTForImageClassification" in said.out
    assert "Trained 7 steps" in said.out
    assert "stochastic depth" in said.err


def test_bad_options_are_named(without, tmp_path):
    with pytest.raises(ConfigurationError, match="mixup_alpha"):
        without.run(["--output_dir", str(tmp_path / "out"), *FLAGS, "--mixup_alpha", "-1"])


BEST = ["--load_best_model_at_end", "false"]


@pytest.mark.parametrize("words", [["--layer_decay", "0.7"], ["--early_stopping_patience", "2", *BEST]])
def test_what_only_the_trainer_follows_is_refused(without, tmp_path, words):
    with pytest.raises(ConfigurationError, match=f"`{words[0]} .*` has no effect in this loop"):
        without.run(["--output_dir", str(tmp_path / "out"), *FLAGS, "--config_overrides", TINY, *words])
    assert not (tmp_path / "out").exists()


LAST = ["--resume_from_checkpoint", "last"]
SHORT = [*FLAGS, "--config_overrides", TINY, "--max_steps", "3", "--eval_strategy", "no", "--do_train"]


@pytest.mark.slow
def test_a_checkpoint_to_resume_from_is_found_or_refused_by_name(without, tmp_path):
    out = tmp_path / "out"
    without.run(["--output_dir", str(out), *SHORT])
    whole, resume = weights(out), ["--output_dir", str(tmp_path / "again"), *SHORT, "--resume_from_checkpoint"]
    without.run([*resume, f"{out}/checkpoint-2/"])
    assert same(weights(tmp_path / "again"), whole)
    with pytest.raises(CheckpointError, match="not a folder `checkpoint-<step>`"):
        without.run([*resume, str(tmp_path / "missing")])
    with pytest.raises(CheckpointError, match="does not fit this run"):
        without.run([*resume, f"{out}/checkpoint-2", "--ema_decay", "0.5"])
    (out / "checkpoint-3" / "optimizer.bin").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.bin is missing.*Pass .*checkpoint-2, the last complete"):
        without.run([*resume, f"{out}/checkpoint-3"])
    without.run(["--output_dir", str(out), *SHORT, *LAST])  # From checkpoint 2.
    assert (out / "checkpoint-3" / "optimizer.bin").is_file()
    for checkpoint in out.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="written by FeatureReuseTrainer"):
        without.run(["--output_dir", str(out), *SHORT, *LAST])


def plans(drop_rate=0.5, granularity="batch", **options):
    schedule = FeatureReuseSchedule(2, drop_rate, "uniform", seed=1, drop_granularity=granularity)
    options = {"scale_kept": True, "train_trunk": "all", "frozen_batch_norm": "batch", **options}
    return PlanSource(schedule, ("layers.0", "layers.1"), samples=16, options=options)


def test_settings_are_compared_with_those_of_the_checkpoint(tmp_path, caplog):
    from hf_featreuse.checkpoints.plain_loop import PLANS_FILE, check_settings

    folder = tmp_path / "checkpoint-9"
    folder.mkdir()

    def saved(source, **changed):
        (folder / PLANS_FILE).write_text(json.dumps({**source.to_json(), **changed}))

    check_settings(folder, plans())
    assert "records no settings" in caplog.text
    caplog.clear()
    saved(plans())
    check_settings(folder, plans())
    assert caplog.text == ""
    check_settings(folder, plans(scale_kept=False, train_trunk="head"))
    assert "train_trunk='head'" in caplog.text
    with pytest.raises(ConfigurationError, match=r"plan step \d as"):
        check_settings(folder, plans(drop_rate=0.2))
    saved(plans(scale_kept=False))
    with pytest.raises(ConfigurationError, match=r"`scale_kept=False`, and this run has `scale_kept=True`"):
        check_settings(folder, plans())
    saved(plans(granularity="sample"), sample_draw=1)
    with pytest.raises(ConfigurationError, match="version 1 of the draw"):
        check_settings(folder, plans(granularity="sample"))


@pytest.mark.slow
def test_an_unscaled_run_does_not_resume_with_scaling(without, tmp_path):
    out = tmp_path / "out"
    without.run(["--output_dir", str(out), *SHORT, "--scale_kept", "false"])
    unscaled, resume = weights(out), ["--output_dir", str(tmp_path / "no"), *SHORT, "--resume_from_checkpoint"]
    for step in (2, 3):  # Inside an epoch and at its end a checkpoint is loaded at different times.
        with pytest.raises(ConfigurationError, match="scale_kept"):
            without.run([*resume, f"{out}/checkpoint-{step}"])
    assert not (tmp_path / "no" / "model.safetensors").exists()
    shutil.rmtree(out / "checkpoint-3")
    without.run(["--output_dir", str(out), *SHORT, *LAST, "--scale_kept", "false"])
    assert same(weights(out), unscaled)
    without.run(["--output_dir", str(tmp_path / "scaled"), *SHORT])
    assert not same(weights(tmp_path / "scaled"), unscaled)


@pytest.mark.slow
def test_a_run_that_starts_anew_keeps_its_own_checkpoints_alone(without, with_trainer, tmp_path):
    out = tmp_path / "out"
    for folder in ("checkpoint-40", "unfinished-41"):
        (out / folder).mkdir(parents=True)
    again = ["--output_dir", str(out), *SHORT, "--overwrite_output_dir"]
    with pytest.raises(ConfigurationError, match="resumes the run in"):
        without.run([*again, "--resume_from_checkpoint", f"{out}/checkpoint-40"])
    for example in (without, with_trainer):
        (out / "checkpoint-41").mkdir()
        example.run([*again, "--save_total_limit", "1"])
        assert sorted(path.name for path in out.glob("*-*")) == ["checkpoint-3"]


def test_the_checkpoint_just_written_is_not_deleted(tmp_path):
    from hf_featreuse.checkpoints.plain_loop import name_checkpoint

    for name in ("checkpoint-7", "checkpoint-9", "checkpoint-best", "unfinished-3"):
        (tmp_path / name).mkdir()
    name_checkpoint(tmp_path / "unfinished-3", tmp_path / "checkpoint-3", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-9", "checkpoint-best"]


@pytest.mark.slow
def test_weights_that_are_lost_are_not_saved(without, tmp_path):
    with pytest.raises(StepError, match="NaN or infinite"):
        without.run(["--output_dir", str(tmp_path), *SHORT, "--learning_rate", "1e18", "--max_grad_norm", "0"])
    # The first step's learning rate is that of the warm-up, 0, and the second makes the weights huge but finite.
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint-1", "checkpoint-2", "run.yaml"}
    for path in tmp_path.glob("*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one_with_the_same_global_batch(without, tmp_path):
    common = [*FLAGS, "--config_overrides", TINY, "--optim", "sgd", "--learning_rate", "0.05", "--ema_decay", "0.7"]
    without.run(["--output_dir", str(tmp_path / "one"), *common, "--per_device_train_batch_size", "32"])
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [
        sys.executable,
        *launcher,
        str(EXAMPLE),
        "--output_dir",
        str(tmp_path / "two"),
        *common,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--per_device_train_batch_size", "16"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)
    names = ("loss", "dropped_blocks", "compute_share")
    for alone, together in zip(
        logs(tmp_path / "one" / "log_history.json", *names),
        logs(tmp_path / "two" / "log_history.json", *names),
        strict=True,
    ):
        assert together == pytest.approx(alone, rel=1e-5)
    assert (tmp_path / "two" / "checkpoint-7" / "random_states_1.pkl").is_file()
