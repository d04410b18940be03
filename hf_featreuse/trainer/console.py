"""Console output: a summary before training and one after it, and the kind of step in the progress bar.

The summaries are printed if Trainer shows its progress bar, in the main process and at a log level (`log_level`) of
warning or below. With `disable_tqdm` they are messages of level info of the logger `hf_featreuse`, subject to Python's
logging configuration.
"""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

from torch import nn
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from hf_featreuse.inspection.expectation import expected_costs
from hf_featreuse.method.cost import StepCosts
from hf_featreuse.method.feature_reuse import FeatureReuse
from hf_featreuse.method.fsdp import unsharded_class
from hf_featreuse.method.schedule import FeatureReuseSchedule, StepKind
from hf_featreuse.trainer.overfitting import overfitting_line

logger = logging.getLogger(__name__)


class Run(Protocol):
    """The attributes of a trainer that the callbacks read."""

    feature_reuse: FeatureReuse | None
    step_costs: StepCosts | None
    step_kind: StepKind | None
    callback_handler: Any
    accelerator: Any

    @property
    def samples_per_process(self) -> int: ...


def opening_summary(
    reuse: FeatureReuse,
    costs: StepCosts | None,
    *,
    max_steps: int,
    processes: int = 1,
    precision: str = "no",
    engine: str | None = None,
    batch_size: int | None = None,
    micro_batches: int = 1,
) -> str:
    """Return the summary before training: model, blocks found, rates, steps, expected cost, sizes and engine.

    Args:
        reuse (`FeatureReuse`): blocks and schedule, bound to the model.
        costs (`StepCosts`, *optional*): arithmetic of the kinds of step; by default left out.
        max_steps (`int`): optimizer steps of the run.
        processes (`int`, defaults to 1): number of processes.
        precision (`str`, defaults to `"no"`): mixed precision, as accelerate names it.
        engine (`str`, *optional*): what several processes train with, such as `"FSDP2"`.
        batch_size (`int`, *optional*): samples in a micro-batch of one process. With one set per sample, the summary
            includes in how many ways a block divides them.
        micro_batches (`int`, defaults to 1): micro-batches of an optimizer step on all processes.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import FeatureReuse, FeatureReuseSchedule, find_residual_blocks
        >>> from hf_featreuse.trainer.console import opening_summary
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2))
        >>> blocks = find_residual_blocks(model)
        >>> reuse = FeatureReuse(model, blocks, FeatureReuseSchedule(2, drop_rate=0.5))
        >>> print(opening_summary(reuse, None, max_steps=100))  # doctest: +ELLIPSIS
        Feature reuse with ViTForImageClassification (... parameters)
          blocks  2, vit.layers.0 to vit.layers.1
          rates   0.25 to 0.50, one set per step
          steps   100, in cycles of 3 stochastic depth and 1 masked freeze
          engine  1 process on cpu, full precision
    """
    schedule, model = reuse.schedule, reuse.model
    lines = [f"Feature reuse with {unsharded_class(model).__name__} ({_count(model)} parameters)"]
    if not reuse.blocks:
        lines += ["  blocks  none: plain training", f"  steps   {max_steps}"]
    else:
        lowest, highest = min(schedule.rates), max(schedule.rates)
        rates = f"{lowest:.2f}" if lowest == highest else f"{lowest:.2f} to {highest:.2f}"
        each = "step" if schedule.drop_granularity == "batch" else "sample"
        over_time = {"falling": ", falling to 0", "rising": ", rising from 0"}.get(schedule.drop_rate_over_time, "")
        plain = f"{schedule.vanilla_steps} vanilla, " if schedule.vanilla_steps else ""
        lines += [
            f"  blocks  {len(reuse.blocks)}, {reuse.blocks[0].name} to {reuse.blocks[-1].name}",
            f"  rates   {rates}{over_time}, one set per {each}",
            f"  steps   {max_steps}, in cycles of {plain}{schedule.stochastic_depth_steps} stochastic depth and "
            f"{schedule.masked_freeze_steps} masked freeze",
        ]
        if costs is not None and type(schedule) is FeatureReuseSchedule:
            cost = _mean_costs(reuse, costs, max_steps)
            lines.append(
                f"  cost    share of arithmetic {cost['mean']:.2f} of a plain step on average (stochastic depth "
                f"{cost['stochastic_depth']:.2f}, masked freeze {cost['masked_freeze']:.2f})"
            )
        if batch_size and schedule.drop_granularity == "sample" and type(schedule) is FeatureReuseSchedule:
            lines.append(f"  sizes   {_sizes(schedule, batch_size, micro_batches, max_steps)}")
    device = next(model.parameters()).device.type
    where = f"{processes} process{'es' if processes > 1 else ''} on {device}{f', {engine}' if engine else ''}"
    lines.append(f"  engine  {where}, {'full precision' if precision == 'no' else precision}")
    return "\n".join(lines)


def _sizes(schedule: FeatureReuseSchedule, batch_size: int, micro_batches: int, max_steps: int) -> str:
    """Return how many numbers of samples a block sees in 200 steps; a GPU selects kernels again for each new one."""
    found: list[set[int]] = [set() for _ in range(schedule.num_blocks)]
    for step in range(schedule.first_step, schedule.first_step + min(200, max_steps)):
        plan = schedule.plan(step, batch_size=batch_size, position=step % micro_batches * batch_size)
        if plan.sample_masks is not None:
            for of_block, count in zip(found, plan.sample_masks.sum(0).tolist(), strict=True):
                of_block.add(count)
    most = max(map(len, found), default=0)
    ways = f"a block divides {batch_size} samples in {most} way{'s' if most != 1 else ''}"
    return ways if most <= 1 or batch_size % 16 == 0 else f"{ways} at most; in 1 if their number is a multiple of 16"


def _mean_costs(reuse: FeatureReuse, costs: StepCosts, max_steps: int) -> dict[str, float]:
    """Return expected arithmetic by kind of step and on average over the run; for sets per sample, with 64 samples."""
    schedule = reuse.schedule
    if schedule.drop_granularity == "batch":
        found = expected_costs(costs, schedule, reuse.trunk_trains)
    else:
        plans = [schedule.plan(step, batch_size=64) for step in _some_cycles(schedule, max_steps)]
        found = {kind.value: 1.0 for kind in StepKind}
        for kind in found:
            shares = [costs.share(plan) for plan in plans if plan.kind == kind]
            found[kind] = sum(shares) / len(shares) if shares else 1.0
        found["mean"] = sum(costs.share(plan) for plan in plans) / max(len(plans), 1)
    last = max_steps - 1 if schedule.last_step is None else min(schedule.last_step, max_steps - 1)
    inside = max(last - schedule.first_step + 1, 0) / max(max_steps, 1)
    return {**found, "mean": 1 - inside + inside * found["mean"]}


def _some_cycles(schedule: FeatureReuseSchedule, max_steps: int) -> list[int]:
    """Return the steps of four whole cycles, one in the middle of each quarter of the window, as rates may change."""
    last = max_steps - 1 if schedule.last_step is None else min(schedule.last_step, max_steps - 1)
    cycles = max((last - schedule.first_step + 1) // schedule.steps_per_cycle, 1)
    starts = sorted({cycles * (2 * quarter + 1) // 8 for quarter in range(4)})
    length = schedule.steps_per_cycle
    return [schedule.first_step + start * length + step for start in starts for step in range(length)]


def closing_summary(
    log_history: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    seconds: float,
    output_dir: str | None = None,
    compare_losses: bool = True,
) -> str:
    """Return the summary after training: time, arithmetic saved, accuracy, how far it overfits, and the folder.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`, with `compute_share`, and
            `eval_accuracy` or `eval_loss`; missing values and values that are not numbers are left out.
        steps (`int`): optimizer steps taken.
        seconds (`float`): how long training took, in seconds.
        output_dir (`str`, *optional*): folder of the run.
        compare_losses (`bool`, defaults to `True`): compare the losses of training and evaluation, and report what the
            accuracy study supports. Pass `False` if they are not comparable, as with Mixup.

    Example:
        >>> from hf_featreuse.trainer.console import closing_summary
        >>> log = [{"step": 10, "compute_share": 0.6}, {"step": 20, "compute_share": 0.8, "eval_accuracy": 0.91}]
        >>> print(closing_summary(log, steps=20, seconds=75.2, output_dir="outputs/run"))
        Trained 20 steps in 0:01:15
          arithmetic  70.0 % of plain training's, 30.0 % saved
          accuracy    91.0 % after step 20
          files       outputs/run
    """
    lines = [f"Trained {steps} steps in {datetime.timedelta(seconds=int(seconds))}"]
    if (share := mean_compute_share(log_history)) is not None:
        lines.append(f"  arithmetic  {share:.1%} of plain training's, {1 - share:.1%} saved")
    accuracies, evaluations = _numbers(log_history, "eval_accuracy"), _numbers(log_history, "eval_loss")
    if accuracies:
        (last, step), (best, best_step) = accuracies[-1], max(accuracies, key=lambda found: found[0])
        more = f", at best {best:.1%} after step {best_step}" if best > last else ""
        lines.append(f"  accuracy    {last:.1%} after step {step}{more}")
    elif evaluations:
        lines.append(f"  eval loss   {evaluations[-1][0]:.4g} after step {evaluations[-1][1]}")
    if compare_losses and (line := overfitting_line(log_history)) is not None:
        lines.append(f"  losses      {line}")
    if output_dir is not None:
        lines.append(f"  files       {output_dir}")
    # Python writes 70.0%; the SI has a space.
    return "\n".join(lines).replace("%", " %")


def _numbers(log_history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, int]]:
    """Return each (value, step) of a key of the log; your own metrics may return other types."""
    return [(float(entry[key]), entry["step"]) for entry in log_history if isinstance(entry.get(key), Real)]


def mean_compute_share(log_history: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean arithmetic of all logged steps as a share of a plain step; `None` if none was logged."""
    total, before = 0.0, 0
    for entry in log_history:
        if "compute_share" in entry:
            total += entry["compute_share"] * (entry["step"] - before)
            before = entry["step"]
    return total / before if before else None


class ConsoleCallback(TrainerCallback):
    """Prints both summaries, and shows the kind of step in Trainer's progress bar (terminal or notebook).

    Args:
        run (`FeatureReuseTrainer`): the trainer; it adds this callback itself. `trainer.remove_callback(
            ConsoleCallback)` removes it.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._begin = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the opening summary."""
        self._begin = time.monotonic()
        reuse, accelerator = self.run.feature_reuse, self.run.accelerator
        if reuse is not None:
            _say(
                lambda: opening_summary(
                    reuse,
                    self.run.step_costs,
                    max_steps=state.max_steps,
                    processes=accelerator.num_processes,
                    precision=accelerator.mixed_precision,
                    engine=_engine(accelerator),
                    batch_size=self.run.samples_per_process,
                    micro_batches=args.gradient_accumulation_steps * accelerator.num_processes,
                ),
                args,
                state,
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the kind of this step, which the bar shows at its next update."""
        kind = self.run.step_kind
        if kind is None:
            return
        text = describe_kind(kind)
        for callback in self.run.callback_handler.callbacks:
            _show_kind(callback, text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the closing summary."""
        seconds = time.monotonic() - self._begin
        _say(
            lambda: closing_summary(
                state.log_history,
                steps=state.global_step,
                seconds=seconds,
                output_dir=str(args.output_dir),
                compare_losses=not (args.label_smoothing_factor or getattr(args, "mixes", False)),
            ),
            args,
            state,
        )


def _show_kind(callback: Any, text: str) -> None:
    """Show a text in the progress bar of a callback of Trainer, if it has one."""
    # Trainer imports it only in a notebook: it needs IPython.
    notebook: Any = sys.modules.get("transformers.utils.notebook")
    if isinstance(callback, ProgressCallback):
        if callback.training_bar is not None:
            callback.training_bar.set_postfix_str(text, refresh=False)
    elif notebook is not None and isinstance(callback, notebook.NotebookProgressCallback):
        if callback.training_tracker is not None:
            callback.training_tracker.prefix = text


def _engine(accelerator: Any) -> str | None:
    """Return the common name of the engine of several processes."""
    kind = str(accelerator.distributed_type.value)
    if kind == "FSDP":
        return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    return "DDP" if kind.startswith("MULTI_") else None if kind == "NO" else kind


def describe_kind(kind: StepKind) -> str:
    """Return the kind of a step in words, padded to a constant width."""
    return kind.value.replace("_", " ").ljust(len(StepKind.STOCHASTIC_DEPTH.value))


def _say(make: Callable[[], str], args: Any, state: Any) -> None:
    """Print or log a text, created only if it is shown; a failure does not stop the run."""
    shown = logger.isEnabledFor(logging.INFO) if args.disable_tqdm else args.get_process_log_level() <= logging.WARNING
    if not shown or not state.is_world_process_zero:
        return
    try:
        text = make()
    except Exception:
        logger.warning("The summary of the run could not be created; training continues.", exc_info=True)
        return
    if args.disable_tqdm:
        logger.info(text)
    else:
        # Above an open progress bar, not into it.
        tqdm.write(text)


def _count(model: nn.Module) -> str:
    """Return the number of parameters, to three digits."""
    number = float(sum(parameter.numel() for parameter in model.parameters()))
    for unit in ("", " k", " M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} G"
