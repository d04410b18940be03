"""Train or fine-tune an image classifier with feature reuse, in a plain loop on accelerate, without a Trainer.

    accelerate launch examples/run_image_classification_no_trainer.py

takes the flags of run_image_classification.py. Of TrainingArguments it follows those that this file names; the others
have no effect. With the same flags and seed it trains to bitwise the same weights on a CPU: the same order of data
(accelerate's seedable sampler), optimizer groups, scheduler, clipping, and loss divided by the images of a step.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DistributedDataParallelKwargs
from image_classification_loop import Progress, check_followed, make_loader, make_optimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers import get_scheduler, set_seed

from hf_featreuse import (
    BatchMixer,
    FeatureReuse,
    WeightAverage,
    check_finite,
    find_residual_blocks,
    measure_step_costs,
    mix_losses,
    reduce_active_gradients,
    trainable_blocks,
)
from hf_featreuse.checkpoints.plain_loop import (
    find_checkpoint,
    hold_folder,
    load_checkpoint,
    plan_source,
    save_checkpoint,
)
from hf_featreuse.data.metrics import TopKAccuracy, rank_top_k
from hf_featreuse.hub import PLOT_FILE
from hf_featreuse.plotting import plot_training
from hf_featreuse.program import Setup, exit_on_error, prepare, saved_options
from hf_featreuse.recipe.mixing import classification_loss
from hf_featreuse.trainer.console import closing_summary, describe_kind, opening_summary


class Loop:
    """The training of one model."""

    def __init__(self, setup: Setup) -> None:
        args = self.args = setup.args
        accelerator = self.accelerator = Accelerator(
            cpu=args.use_cpu,
            mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
            log_with=args.report_to or None,
            project_dir=args.output_dir,
            # What trains changes from step to step.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        set_seed(args.seed)
        self.setup, self.progress, self.average = setup, Progress(accelerator.device), None
        self.loaders = {name: make_loader(setup, name, accelerator) for name in setup.splits}
        model = setup.model.to(accelerator.device)
        if not args.do_train:
            self.model = accelerator.prepare(model)
            return
        self.steps_per_epoch = math.ceil(len(self.loaders["train"]) / args.gradient_accumulation_steps)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.steps_per_epoch)
        # Blocks are found, and arithmetic is counted, before the model is wrapped.
        found = find_residual_blocks(model, None, args.target_blocks) if args.uses_blocks else []
        blocks = trainable_blocks(model, found) if found else []
        names = ("scale_kept", "train_trunk", "frozen_batch_norm", "allow_inexact_skip")
        schedule = args.schedule(len(blocks), steps, args.seed)
        self.reuse = FeatureReuse(model, blocks, schedule, **{name: getattr(args, name) for name in names})
        self.plans = plan_source(self.reuse, args, accelerator.num_processes)
        self.costs = measure_step_costs(model, blocks, train_trunk=args.train_trunk) if blocks else None
        self.mixer, self.max_steps = BatchMixer(args.mixup_alpha, args.cutmix_alpha, args.seed), steps
        self.model, self.optimizer = accelerator.prepare(model, make_optimizer(model, args))
        warmup = args.get_warmup_steps(steps)
        self.scheduler = get_scheduler(args.lr_scheduler_type, self.optimizer, warmup, steps, args.lr_scheduler_kwargs)
        self.average = None if args.ema_decay is None else WeightAverage(model, args.ema_decay)
        if blocks and isinstance(self.model, DistributedDataParallel):
            reduce_active_gradients(self.model, self.reuse)

    def steps_of_epoch(self, epoch: int, skipped: int) -> Any:
        """The micro-batches of each optimizer step that is left of an epoch."""
        loader, size = self.loaders["train"], self.args.gradient_accumulation_steps
        loader.set_epoch(epoch)
        if skipped:
            loader = skip_first_batches(loader, skipped * size)
            loader.set_epoch(epoch)
        self.setup.splits["train"].set_epoch(epoch)
        batches = iter(loader)
        while step := list(itertools.islice(batches, size)):
            yield step

    def train(self, checkpoint: str | None) -> None:
        accelerator, progress, begun = self.accelerator, self.progress, time.monotonic()
        first = 0 if checkpoint is None else int(checkpoint.rsplit("-", 1)[1])
        epoch, skipped = divmod(first, self.steps_per_epoch)
        # The loader draws from the random state when it begins: inside an epoch the checkpoint comes after it.
        if checkpoint is not None and (not skipped or first >= self.max_steps):
            checkpoint = load_checkpoint(self, checkpoint)
        shows = accelerator.is_main_process and not self.args.disable_tqdm
        if shows:
            engine = {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
            print(opening_summary(self.reuse, self.costs, max_steps=self.max_steps, **engine))
        bar = tqdm(total=self.max_steps, initial=first, disable=not shows)
        while max(first, progress.step) < self.max_steps:
            for batches in self.steps_of_epoch(epoch, skipped):
                if checkpoint is not None:
                    checkpoint = load_checkpoint(self, checkpoint)
                bar.set_postfix_str(describe_kind(self.step(batches)), refresh=False)
                bar.update()
                ended = progress.step == self.max_steps
                self.log_evaluate_save(ended or progress.step % self.steps_per_epoch == 0)
                if ended:
                    break
            epoch, skipped = epoch + 1, 0
        bar.close()
        if self.average is not None:
            self.average.copy_to_model()
        if shows:
            time_and_place = {"seconds": time.monotonic() - begun, "output_dir": self.args.output_dir}
            print(closing_summary(progress.history, steps=progress.step, **time_and_place))

    def step(self, batches: list[dict[str, torch.Tensor]]) -> Any:
        """Take one optimizer step; return its kind."""
        args, accelerator, step = self.args, self.accelerator, self.progress.step
        self.model.train()
        # Every image of the step counts the same, also if the last micro-batch is smaller.
        images = accelerator.gather(sum((batch["labels"] != -100).sum() for batch in batches)).sum()
        for index, batch in enumerate(batches):
            position, labels = index * accelerator.num_processes + accelerator.process_index, batch["labels"]
            samples = {"batch_size": len(labels), "position": position * args.per_device_train_batch_size}
            last = batch is batches[-1]
            waits = contextlib.nullcontext() if last else accelerator.no_sync(self.model)
            with waits, self.reuse.step(step, **samples) as plan:
                pixels, share = self.mixer(batch["pixel_values"], step, position)
                logits = self.model(pixel_values=pixels).logits
                smoothed = {"num_items": images, "label_smoothing": args.label_smoothing_factor}
                # The shares of mix_losses apply to the loss of either label of a mixed image.
                loss = mix_losses(lambda y, x=logits, s=smoothed: classification_loss(x, y, **s), labels, share)
                # DistributedDataParallel averages gradients over the processes, and the sum is wanted.
                loss = loss * accelerator.num_processes
                accelerator.backward(loss)
            self.progress.loss += loss.detach()
            self.progress.by_kind.add(step, plan, self.costs.share(plan) if self.costs else 1.0, loss.detach())
        if args.max_grad_norm > 0:
            accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        if self.average is not None:
            self.average.update(self.progress.step)
        return plan.kind

    def log_evaluate_save(self, epoch_ended: bool) -> None:
        """Do what is due after this step."""
        args, progress, accelerator = self.args, self.progress, self.accelerator

        def due(strategy: str, every: float | None) -> bool:
            return (strategy == "steps" and progress.step % every == 0) or (strategy == "epoch" and epoch_ended)

        if due(args.logging_strategy, args.logging_steps):
            loss = accelerator.reduce(progress.loss, "mean").item() / (progress.step - progress.logged)
            self.log({"loss": loss, **progress.by_kind.drain(lambda sums: accelerator.reduce(sums, "mean"))})
            progress.logged = progress.step
            progress.loss.zero_()
        if "validation" in self.loaders and due(args.eval_strategy, args.eval_steps):
            with contextlib.nullcontext() if self.average is None else self.average.applied():
                self.log(self.evaluate())
        if due(args.save_strategy, args.save_steps):
            save_checkpoint(self)

    def log(self, logs: dict[str, float]) -> None:
        self.progress.history.append({**logs, "step": self.progress.step})
        self.accelerator.log(logs, step=self.progress.step)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracies of the whole network, each image counted once on however many processes."""
        self.model.eval()
        metrics, losses = [TopKAccuracy(k, keep_in_memory=True) for k in (1, 5)], []
        smoothing = {"label_smoothing": self.args.label_smoothing_factor}
        for batch in self.loaders["validation"]:
            logits = self.model(pixel_values=batch["pixel_values"]).logits
            loss = cross_entropy(logits.float(), batch["labels"], reduction="none", **smoothing)
            loss, ranked, labels = self.accelerator.gather_for_metrics((loss, rank_top_k(logits), batch["labels"]))
            losses.append(loss)
            for metric in metrics:
                metric.add_batch(predictions=ranked, references=labels)
        found = {"loss": torch.cat(losses).mean().item()}
        for metric in metrics:
            found |= metric.compute()
        return {f"eval_{name}": value for name, value in found.items()}

    def save(self) -> None:
        """Write a model that plain transformers loads, the log and the plot."""
        folder, history = Path(self.args.output_dir), self.progress.history
        model = self.accelerator.unwrap_model(self.model)
        check_finite(model, self.progress.step)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            model.save_pretrained(folder)
            self.setup.processor.save_pretrained(folder)
            (folder / "log_history.json").write_text(json.dumps(history, indent=2), encoding="utf-8")
            names = [block.name for block in self.reuse.blocks]
            plot_training(history, self.reuse.schedule, folder / PLOT_FILE, block_names=names)


def run(argv: list[str]) -> Loop:
    with prepare(argv) as setup:
        args = setup.args
        check_followed(setup)
        checkpoint = find_checkpoint(setup.resume_from, args)
        loop = Loop(setup)
        if args.report_to:
            loop.accelerator.init_trackers(args.project, config=args.settings())
        if args.do_train:
            with hold_folder(loop.accelerator, args), saved_options(setup.options):
                loop.train(checkpoint)
                loop.save()
        if args.do_eval:
            results = loop.evaluate()
            if loop.accelerator.is_main_process:
                file = Path(args.output_dir) / "all_results.json"
                file.write_text(json.dumps(results, indent=2), encoding="utf-8")
                print(results)
        loop.accelerator.end_training()
    return loop


def main() -> None:
    exit_on_error(run)


if __name__ == "__main__":
    main()
