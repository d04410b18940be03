"""Draw the two kinds of step and a schedule, for the docs.

    python tools/pictures.py

writes docs/images/steps.png and docs/images/schedule.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_featreuse import FeatureReuseSchedule, StepKind
from hf_featreuse.plotting import empty_figure, plot_training, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = Path(__file__).parents[1] / "docs" / "images"
BLUE, ORANGE, GRAY, LIGHT = "#0072B2", "#D55E00", "#666666", "#E4E4E4"
# Few and large: the picture is shown on phones too.
BLOCKS, DRAWN, STEPS_WIDTH_INCHES = 4, (1, 3), 5.2
# Width and height of a box, and the distance from one to the next.
WIDTH, HEIGHT, PITCH = 1.0, 0.8, 1.5


def draw_box(axes: Axes, place: int, text: str, color: str, *, dashed: bool = False) -> None:
    """Draw one part of the network, dashed if it is not computed."""
    from matplotlib.patches import FancyBboxPatch

    style = {"linestyle": "--", "facecolor": "none"} if dashed else {"facecolor": color}
    corner = (place * PITCH, -HEIGHT / 2)
    box = FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.12", edgecolor=GRAY, **style)
    axes.add_patch(box)
    dark = not dashed and color != LIGHT
    axes.text(
        place * PITCH + WIDTH / 2, 0, text, ha="center", va="center", color="white" if dark else GRAY, fontsize=13
    )


def draw_step(axes: Axes, title: str, note: str, *, skips: bool, color: str) -> None:
    """Draw the network in one kind of step, with a shortcut past each block that is skipped."""
    from matplotlib.patches import FancyArrowPatch

    last = BLOCKS + 1
    for place, text in enumerate(["stem", *(f"b{block}" for block in range(BLOCKS)), "head"]):
        drawn = place - 1 in DRAWN
        in_trunk = place in (0, last)
        trains = in_trunk or drawn != skips
        draw_box(axes, place, text, color if trains else LIGHT, dashed=skips and drawn)
    for place in range(last):
        if skips and {place - 1, place} & set(DRAWN):
            continue
        begin, end = place * PITCH + WIDTH, (place + 1) * PITCH
        arrow = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
        axes.add_patch(FancyArrowPatch((begin, 0), (end, 0), color=GRAY, **arrow))
    if skips:
        draw_shortcuts(axes)
    axes.text(0, 1.15, title, fontsize=14, fontweight="bold", color=color)
    axes.text(0, 0.72, note, fontsize=12, color="black")
    axes.set_xlim(-0.1, last * PITCH + WIDTH + 0.1)
    axes.set_ylim(-0.8, 1.5)
    axes.set_axis_off()


def draw_shortcuts(axes: Axes) -> None:
    """Draw the residual stream below each run of skipped blocks."""
    from matplotlib.patches import FancyArrowPatch

    low, gap = -HEIGHT / 2 - 0.2, (PITCH - WIDTH) / 2
    for block in DRAWN:
        if block - 1 in DRAWN:
            continue
        after = next(index for index in range(block + 1, BLOCKS + 1) if index not in DRAWN)
        begin, end = block * PITCH + WIDTH, (after + 1) * PITCH
        path = [(begin, 0), (begin + gap, 0), (begin + gap, low), (end - gap, low), (end - gap, 0)]
        axes.plot(*zip(*path, strict=True), color=BLUE, linewidth=1.5)
        arrow = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
        axes.add_patch(FancyArrowPatch((end - gap, 0), (end, 0), color=BLUE, **arrow))


def main() -> None:
    """Write both pictures."""
    figure = empty_figure(3.6)
    figure.set_figwidth(STEPS_WIDTH_INCHES)
    above, below = figure.subplots(2, 1)
    names = ", ".join(f"b{block}" for block in DRAWN)
    draw_step(
        above,
        "1. stochastic depth",
        f"D = {{{names}}} is skipped, the rest trains",
        skips=True,
        color=BLUE,
    )
    draw_step(
        below,
        "2. masked freeze",
        f"all run; of the blocks only D = {{{names}}} trains",
        skips=False,
        color=ORANGE,
    )
    save_figure(figure, IMAGES / "steps.png")

    schedule = FeatureReuseSchedule(12, drop_rate=0.5, seed=0)
    steps = 60
    kinds = [schedule.plan(step).kind for step in range(steps)]
    title = f"{steps} steps: {kinds.count(StepKind.STOCHASTIC_DEPTH)} of stochastic depth, "
    title += f"{kinds.count(StepKind.MASKED_FREEZE)} of masked freeze"
    # A log with a step and no loss: the picture is the schedule alone.
    plot_training([{"step": steps}], schedule, IMAGES / "schedule.png", title=title)


if __name__ == "__main__":
    main()
