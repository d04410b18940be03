"""The plot of a run shows the log and the schedule, and does not use pyplot."""

import itertools
import sys
import time

import numpy as np
import pytest
from PIL import Image

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.method.schedule import FeatureReuseSchedule, StepKind, StepPlan
from hf_featreuse.plotting import dropped_shares, plot_training

pytest.importorskip("matplotlib", reason="plots need the extra `examples`")

BLUE, ORANGE, GREEN, PURPLE, GRAY = (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (102, 102, 102)


class OneBlock(FeatureReuseSchedule):
    """A schedule that drops one block in all its cycles."""

    def __init__(self, num_blocks: int, block: int) -> None:
        super().__init__(num_blocks)
        self.block = block

    def plan(self, global_step: int) -> StepPlan:
        kind = StepKind.MASKED_FREEZE if global_step % 2 else StepKind.STOCHASTIC_DEPTH
        return StepPlan(kind, (self.block,))


def vanilla(num_blocks: int = 4) -> FeatureReuseSchedule:
    return FeatureReuseSchedule(num_blocks, stochastic_depth_steps=0, masked_freeze_steps=0)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1200
        return np.asarray(image.convert("RGB")).astype(int)


def rows_of(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Rows with more of the color than in a legend."""
    return np.flatnonzero((image == color).all(axis=2).sum(axis=1) > 200)


def count(image: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((image == color).all(axis=2).sum())


def test_shares_are_the_counts_of_the_plans():
    schedule = FeatureReuseSchedule(5, drop_rate=0.5, drop_rate_schedule="uniform", seed=3)
    shares = dropped_shares(schedule, 10)
    assert shares.shape == (2, 5, 10)
    for step in range(10):
        plan = schedule.plan(step)
        row = {"stochastic_depth": 0, "masked_freeze": 1, "vanilla": 0}[plan.kind.value]
        expected = np.zeros((2, 5))
        expected[row, list(plan.dropped)] = 1
        assert np.array_equal(shares[:, :, step], expected)


@pytest.mark.parametrize(("num_steps", "max_columns", "width"), [(10, 3, 4), (10, 10, 1), (25, 10, 4), (301, 20, 24)])
def test_columns_hold_equal_numbers_of_steps(num_steps, max_columns, width):
    schedule = FeatureReuseSchedule(3, drop_rate=0.5, seed=1)
    binned = dropped_shares(schedule, num_steps, max_columns)
    each = dropped_shares(schedule, num_steps, num_steps)
    assert binned.shape[2] == -(-num_steps // width) <= max_columns
    for column in range(binned.shape[2]):
        steps = each[:, :, column * width : (column + 1) * width]
        assert np.allclose(binned[:, :, column], steps.mean(axis=2))


class CountsPlans(FeatureReuseSchedule):
    """Counts its calls."""

    asked = 0

    def plan(self, *args, **kwargs):
        self.asked += 1
        return super().plan(*args, **kwargs)


def test_in_a_long_run_some_steps_of_each_column_represent_all():
    schedule = CountsPlans(24, drop_rate=0.5, seed=1, stochastic_depth_steps=1)
    depth, freeze = dropped_shares(schedule, 30_000)
    assert schedule.asked <= 300 * 24, "of the 300,000 steps of a long run, all would take 18 s"
    assert depth.shape == (24, 278)
    rates = np.asarray(schedule.rates)
    assert depth.mean(axis=1) == pytest.approx(rates / 2, abs=0.03)
    assert freeze.mean(axis=1) == pytest.approx(rates / 2, abs=0.03)


@pytest.mark.parametrize("num_steps", [20, 2000])
def test_first_block_is_the_lowest_row(tmp_path, num_steps):
    top, bottom = (
        rows_of(pixels(plot_training([{"step": num_steps}], OneBlock(6, block), tmp_path / f"{block}.png")), BLUE)
        for block in (5, 0)
    )
    assert len(top) and len(bottom)
    assert top.max() < bottom.min()


def test_raster_shows_each_kind_for_its_steps(tmp_path):
    image = pixels(plot_training([{"step": 40}], OneBlock(2, 1), tmp_path / "raster.png"))
    rows = rows_of(image, BLUE)
    strip = image[rows[len(rows) // 2]]
    kinds = [color for pixel in strip for color in (BLUE, ORANGE) if tuple(pixel) == color]
    changes = sum(1 for left, right in itertools.pairwise(kinds) if left != right)
    assert (kinds[0], kinds[-1], changes) == (BLUE, ORANGE, 39)


def test_panels_without_data_are_left_out(tmp_path):
    full = [
        {"step": 10, "loss": 2.0, "loss/stochastic_depth": 2.2, "loss/masked_freeze": 1.8, "loss/vanilla": 2.0},
        {"step": 20, "loss": 1.0, "loss/stochastic_depth": 1.2, "loss/masked_freeze": 0.8, "loss/vanilla": 1.0},
        {"step": 20, "eval_loss": 1.1, "eval_accuracy": 0.5, "eval_top5_accuracy": 0.9},
        {"step": 20, "train_runtime": 1.0},
    ]
    only_training = [entry for entry in full if "eval_loss" not in entry]
    schedule = FeatureReuseSchedule(4, drop_rate=0.5)
    images = [
        pixels(plot_training(log, plan, tmp_path / "deep" / f"{index}.png"))
        for index, (log, plan) in enumerate(
            [(full, schedule), (only_training, schedule), (only_training, vanilla()), (full, vanilla(0))]
        )
    ]
    heights = [image.shape[0] for image in images]
    assert heights[0] > heights[1] > heights[2] and heights[0] > heights[3] > heights[2]
    assert all(count(images[0], color) > 20 for color in (BLUE, ORANGE, GRAY, GREEN, PURPLE))
    assert count(images[1], GREEN) == count(images[1], PURPLE) == 0


def test_plain_trainer_log_shows_the_overall_loss_and_skips_gaps(tmp_path):
    log = [{"step": step, "loss": float("nan") if step == 3 else 2.0 / step} for step in range(1, 9)]
    image = pixels(plot_training(log, vanilla(), tmp_path / "plain.png"))
    assert count(image, GRAY) > 100
    assert count(image, BLUE) == 0


def test_names_and_title_are_drawn(tmp_path):
    log = [{"step": 20}]
    plain = pixels(plot_training(log, OneBlock(2, 0), tmp_path / "a.png"))
    titled = pixels(plot_training(log, OneBlock(2, 0), tmp_path / "b.png", title="ViT on digits"))
    named = pixels(
        plot_training(log, OneBlock(2, 0), tmp_path / "c.png", block_names=["vit.layers.0", "vit.layers.1"])
    )
    assert (titled[:30] != 255).sum() > 0 and plain.shape == titled.shape
    assert not np.array_equal(named[:, :60], plain[:, :60])


def test_hundred_thousand_steps_are_quick(tmp_path):
    log = [{"step": step, "loss/stochastic_depth": 1e5 / step} for step in range(100, 100_001, 100)]
    start = time.perf_counter()
    plot_training(log, FeatureReuseSchedule(48, drop_rate=0.3), tmp_path / "long.png")
    assert time.perf_counter() - start < 30
    assert pixels(tmp_path / "long.png").shape[0] < 1600


@pytest.mark.parametrize("log", [[], [{"loss": 1.0}], [{"step": 0, "eval_loss": 1.0}]])
def test_empty_log_is_refused(tmp_path, log):
    with pytest.raises(ConfigurationError, match=f"has {len(log)} entries"):
        plot_training(log, FeatureReuseSchedule(4), tmp_path / "empty.png")
    with pytest.raises(ConfigurationError, match="nothing to plot"):
        plot_training([{"step": 5}], vanilla(), tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()


def test_names_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="2 names, but the schedule has 4 blocks"):
        plot_training([{"step": 5}], FeatureReuseSchedule(4), tmp_path / "x.png", block_names=["a", "b"])


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r"pip install \"hf_featreuse\[plot\]\""):
        plot_training([{"step": 5}], OneBlock(2, 0), tmp_path / "x.png")


def test_pyplot_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert plot_training([{"step": 5, "loss": 1.0}], OneBlock(2, 0), tmp_path / "x.png").exists()


def test_with_one_set_per_sample_cells_are_shares_of_the_samples():
    schedule = FeatureReuseSchedule(
        3, drop_rate_schedule="uniform", drop_granularity="sample", stochastic_depth_steps=1
    )
    depth, freeze = dropped_shares(schedule, 408, max_columns=17)
    assert depth.mean(axis=1) == pytest.approx(0.25, abs=0.03)
    assert (depth == freeze).all(), "both steps of a cycle have the same sets"
