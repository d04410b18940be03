"""Every sample with its own set of blocks: skipped, frozen and counted as if each were alone in the batch."""

import contextlib
import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from tiny_architectures import SKIPPABLE, Architecture
from tiny_models import WITHOUT_BATCH_NORM, build, examples
from torch import nn
from torch.func import functional_call, grad
from training_runs import RecordingTrainer, config, train, with_dropout

from hf_featreuse import (
    BlockError,
    ConfigurationError,
    FeatureReuse,
    FeatureReuseSchedule,
    ResidualBlock,
    StepError,
    StepKind,
    StepPlan,
    compile_blocks,
    find_residual_blocks,
    measure_step_costs,
    train_only,
)
from hf_featreuse.cost import flop_counter
from hf_featreuse.per_sample import FROZEN, RESTS, TRAINS, sample_groups, skip_samples, train_samples

DEPTH, FREEZE = StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE
CPU = torch.device("cpu")


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


APART = tuple(case for case in SKIPPABLE if not has_batch_norm(case.build()))
TOGETHER = tuple(case for case in SKIPPABLE if case not in APART)


def each(architectures: tuple[Architecture, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in architectures])


def random_masks(samples: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Masks with a sample that drops nothing, one that drops everything, and blocks that all or none drop."""
    masks = np.random.default_rng(seed).random((samples, blocks)) < 0.5
    masks[0], masks[1] = False, True
    return masks


def score(logits: torch.Tensor) -> torch.Tensor:
    """A loss a sample that depends on every logit."""
    return (logits * torch.linspace(0.5, 1.5, logits.shape[-1])).square().sum(-1)


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found: dict, expected: dict) -> None:
    """Equal up to rounding, which in sums of large terms is relative to these."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        if gradient is None or not gradient.any():
            assert found[name] is None or not found[name].any(), name
        else:
            assert found[name] is not None, name
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-4, atol=2e-6 * largest, msg=lambda text, name=name: f"{name}: {text}"
            )


@contextlib.contextmanager
def masked(blocks: list[ResidualBlock], masks: np.ndarray, survival: list[float]) -> Iterator[None]:
    """Drop path as in timm and torchvision: everything is computed, and the branch of some samples masked."""
    handles = []
    for block, mask, probability in zip(blocks, torch.from_numpy(masks).T, survival, strict=True):

        def hook(_module, args, kwargs, output, block=block, mask=mask, probability=probability):
            stream = block.stream(args, kwargs)
            first = output if isinstance(output, torch.Tensor) else output[0]
            keep = (~mask).to(first.dtype).view(-1, *(1,) * (first.ndim - 1)) / probability
            first = stream + (first - stream) * keep
            return first if isinstance(output, torch.Tensor) else (first, *output[1:])

        handles.append(block.module.register_forward_hook(hook, with_kwargs=True))
    yield
    for handle in handles:
        handle.remove()


# Groups


def test_groups_of_stochastic_depth():
    groups = sample_groups(np.array([[True, False], [False, False]]), freezing=False, gradient_everywhere=True)
    assert groups.tolist() == [[RESTS, TRAINS], [TRAINS, TRAINS]]


def test_groups_of_masked_freeze():
    masks = np.array([[False, True, False], [False, False, False], [True, False, True]])
    groups = sample_groups(masks, freezing=True, gradient_everywhere=False)
    assert groups.tolist() == [[RESTS, TRAINS, FROZEN], [RESTS, RESTS, RESTS], [TRAINS, FROZEN, TRAINS]]
    groups = sample_groups(masks, freezing=True, gradient_everywhere=True)
    assert groups.tolist() == [[FROZEN, TRAINS, FROZEN], [FROZEN, FROZEN, FROZEN], [TRAINS, FROZEN, TRAINS]]


# Every architecture


@each(APART)
def test_stochastic_depth_equals_masking(case):
    model = case.build().eval()
    blocks = find_residual_blocks(model, case.batch())
    masks, inputs = random_masks(6, len(blocks)), case.batch(6)
    survival = [0.5 + 0.5 * index / len(blocks) for index in range(len(blocks))]
    for divisors in (None, survival):
        with masked(blocks, masks, divisors or [1.0] * len(blocks)):
            expected = model(**inputs).logits
            score(expected).sum().backward()
        wanted = gradients(model)
        with skip_samples(blocks, masks, CPU, survival=divisors):
            logits = model(**inputs).logits
            score(logits).sum().backward()
        torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
        assert_same_gradients(gradients(model), wanted)


@each(APART)
def test_masked_freeze_equals_the_samples_one_by_one(case):
    model = case.build().eval()
    blocks = find_residual_blocks(model, case.batch())
    trunk = [parameter for parameter in model.parameters() if not in_any(parameter, blocks)]
    masks, inputs = random_masks(4, len(blocks)), case.batch(4)
    expected = model(**inputs).logits
    for sample, mask in enumerate(masks):
        chosen = [block for block, dropped in zip(blocks, mask, strict=True) if dropped]
        if chosen:
            with train_only(model, chosen):
                score(
                    model(**{key: value[sample : sample + 1] for key, value in inputs.items()}).logits
                ).sum().backward()
    wanted = gradients(model)
    for parameter in trunk:
        parameter.requires_grad_(False)
    with train_samples(blocks, masks, CPU):
        logits = model(**inputs).logits
        score(logits).sum().backward()
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
    assert_same_gradients(gradients(model), wanted)


def in_any(parameter: nn.Parameter, blocks: list[ResidualBlock]) -> bool:
    return any(parameter is own for block in blocks for own in block.module.parameters())


@each(TOGETHER)
def test_models_with_batch_norm_are_refused(case):
    model = case.build()
    blocks = find_residual_blocks(model, case.batch())
    schedule = FeatureReuseSchedule(len(blocks), drop_granularity="sample")
    with pytest.raises(BlockError, match=r"cannot train .*BatchNorm.*normalises over the batch"):
        FeatureReuse(model, blocks, schedule)


# Against gradients of single samples


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_masked_freeze_equals_a_masked_sum_of_per_sample_gradients(name: str):
    model = build(name).eval()
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks), stochastic_depth_steps=0), train_trunk=False)
    inputs = tiny_models.batch(6)
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(weights: dict, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, weights, (image[None],)).logits
        return nn.functional.cross_entropy(logits, label[None])

    single = [
        grad(loss)(parameters, image, label)
        for image, label in zip(inputs["pixel_values"], inputs["labels"], strict=True)
    ]
    with reuse.step(0, batch_size=6) as plan:
        model(**inputs).loss.backward()
    found = gradients(model)
    for index, block in enumerate(blocks):
        for key in parameters:
            if key.startswith(f"{block.name}."):
                parts = [single[sample][key] for sample in np.flatnonzero(plan.sample_masks[:, index])]
                wanted = torch.stack(parts).sum(0) / 6
                torch.testing.assert_close(found.pop(key), wanted, rtol=1e-4, atol=1e-6)
    assert all(gradient is None for gradient in found.values())


# What is computed


def sample_schedule(num_blocks: int, **changed) -> FeatureReuseSchedule:
    options = {"drop_rate": 0.5, "drop_rate_schedule": "uniform", "seed": 1, **changed}
    return FeatureReuseSchedule(num_blocks, drop_granularity="sample", **options)


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_a_block_is_computed_on_the_samples_that_keep_it_and_no_others(name: str):
    model = build(name)
    blocks = find_residual_blocks(model)
    masks = random_masks(6, len(blocks))
    masks[:, 0], masks[:, 1] = True, False
    seen = [0] * len(blocks)

    def count(index: int):
        return lambda _module, args: seen.__setitem__(index, args[0].shape[0])

    for index, block in enumerate(blocks):
        norm = next(m for m in block.module.modules() if isinstance(m, nn.LayerNorm))
        norm.register_forward_pre_hook(count(index))
    with skip_samples(blocks, masks, CPU):
        model(**tiny_models.batch(6))
    assert seen == (~masks).sum(0).tolist()


@pytest.mark.parametrize("freezing", [False, True])
def test_groups_keep_the_memory_format_of_the_stream(freezing: bool):
    model = build("convnext")
    blocks = find_residual_blocks(model)
    masks = random_masks(6, len(blocks))
    masks[0], masks[1] = True, False
    found: dict[str, list[bool]] = {}

    def note(_module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found["inputs"].append(args[0].is_contiguous(memory_format=torch.channels_last))
        if output.requires_grad:
            output.register_hook(
                lambda gradient: found["gradients"].append(gradient.is_contiguous(memory_format=torch.channels_last))
            )

    for block in blocks:
        next(m for m in block.module.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(note)
    context = train_samples if freezing else skip_samples
    for run in (contextlib.nullcontext(), context(blocks, masks, CPU)):
        found.update(inputs=[], gradients=[])
        with run:
            model(**tiny_models.batch(6)).loss.backward()
        assert all(found["inputs"]) and all(found["gradients"]) and len(found["gradients"]) >= len(blocks)


@pytest.mark.parametrize("train_trunk", [False, True])
@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_arithmetic_falls_in_proportion(name: str, train_trunk: bool):
    model = build(name).eval()
    model.set_attn_implementation("eager")
    blocks = find_residual_blocks(model)
    costs = measure_step_costs(model, blocks, train_trunk=train_trunk)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)), train_trunk=train_trunk)
    inputs = {"pixel_values": torch.randn(8, 3, model.config.image_size, model.config.image_size)}
    for step in range(4):
        with reuse.step(step, batch_size=8) as plan, flop_counter() as counter:
            model(**inputs).logits.sum().backward()
        model.zero_grad(set_to_none=True)
        assert plan.kind is (DEPTH, FREEZE)[step % 2]
        counted = counter.get_total_flops() / (8 * costs.vanilla)
        assert costs.share(plan) == pytest.approx(counted, rel=0.01)


def test_share_is_the_mean_over_samples_of_what_each_costs_alone():
    model = build("vit")
    blocks = find_residual_blocks(model)
    costs = measure_step_costs(model, blocks)
    masks = random_masks(5, len(blocks))
    alone = [costs.share(StepPlan(DEPTH, tuple(np.flatnonzero(mask)))) for mask in masks]
    assert costs.share(StepPlan(DEPTH, sample_masks=masks)) == pytest.approx(np.mean(alone), rel=1e-6)


# What samples share, and what they do not


class Branch(nn.Module):
    """A residual block that takes, besides the stream, what belongs to samples and what they share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, shift=None, *, extra=(), shared=None):
        # `shared` is of the sizes of the batch, yet belongs to no sample.
        y = self.linear(x) * shared.sum() + extra[0]["scale"][:, None] * extra[1][0].mean()
        return x + (y if shift is None else y + shift), shift


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Branch(4) for _ in range(3))

    def forward(self, x, shared):
        extra = ({"scale": x.sum(1)}, [shared])
        for block in self.blocks:
            x, _ = block(x, x * 0.1, extra=extra, shared=shared)
        return x


def test_arguments_of_samples_are_taken_apart_and_shared_ones_are_not():
    torch.manual_seed(0)
    model, generator = Network(), torch.Generator().manual_seed(1)
    shared = torch.randn(4, 2, generator=generator)
    blocks = find_residual_blocks(model, {"x": torch.randn(2, 4), "shared": shared})
    assert {block.unbatched for block in blocks} == {frozenset({"extra.1.0", "shared"})}
    # As many samples as `shared` has rows.
    x, masks = torch.randn(4, 4, generator=generator), random_masks(4, 3)
    with masked(blocks, masks, [1.0] * 3):
        expected = model(x, shared)
        expected.square().sum().backward()
    wanted = gradients(model)
    with skip_samples(blocks, masks, CPU):
        output = model(x, shared)
        output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    assert_same_gradients(gradients(model), wanted)


def test_attentions_of_samples_that_dropped_a_block_are_zero():
    model = build("swin").eval()
    model.set_attn_implementation("eager")
    blocks = find_residual_blocks(model)
    masks = np.zeros((4, len(blocks)), dtype=bool)
    masks[1, -1] = True
    with torch.no_grad(), skip_samples(blocks, masks, CPU):
        output = blocks[-1].module(torch.randn(4, 16, 16), (4, 4), output_attentions=True)
    assert output[1].shape[0] == 4
    assert not output[1][1].any()
    assert all(output[1][sample].any() for sample in (0, 2, 3))


def test_streams_that_are_not_batch_first_are_refused():
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 8, norm_first=True) for _ in range(2))

        def forward(self, pixel_values):
            stream = pixel_values.transpose(0, 1)
            for block in self.blocks:
                stream = block(stream)
            return stream

    model = SequenceFirst()
    blocks = find_residual_blocks(model, torch.randn(2, 3, 4))
    with pytest.raises(BlockError, match=r"cannot take apart the samples in block blocks\.0.*is not the batch"):
        FeatureReuse(model, blocks, sample_schedule(2))


# A step


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
@pytest.mark.parametrize("step", [0, 1])
def test_the_model_is_as_before_after_a_step_and_after_an_error(name: str, step: int):
    model = build(name)
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)))
    before = tiny_models.snapshot(model)
    with reuse.step(step, batch_size=4):
        copied = copy.deepcopy(model)
        model(**tiny_models.batch(4)).loss.backward()
    assert tiny_models.snapshot(model) == before
    assert [type(module) for module in copied.modules()] == before["classes"]
    with pytest.raises(ZeroDivisionError), reuse.step(step, batch_size=4):
        raise ZeroDivisionError
    assert tiny_models.snapshot(model) == before


@pytest.mark.parametrize("step", [0, 1])
def test_only_what_a_step_trains_has_gradients(step: int):
    model = build("vit")
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)), train_trunk=False)
    with reuse.step(step, batch_size=2) as plan:
        model(**tiny_models.batch(2)).loss.backward()
    for index, block in enumerate(blocks):
        trains = plan.sample_masks[:, index].any() if step else not plan.sample_masks[:, index].all()
        assert all((parameter.grad is not None) == trains for parameter in block.module.parameters())
    assert {plan.sample_masks[:, index].any() for index in range(4)} == {True, False} or not step
    assert (model.classifier.weight.grad is None) == bool(step)
    assert (model.vit.embeddings.cls_token.grad is None) == bool(step)


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_a_trunk_that_trains_learns_from_every_sample(name: str):
    model = build(name).eval()
    blocks = find_residual_blocks(model)
    inputs = tiny_models.batch(6)
    model(**inputs).loss.backward()
    whole = gradients(model)
    found = {}
    for train_trunk in (False, True):
        reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)), train_trunk=train_trunk)
        with reuse.step(1, batch_size=6):
            model(**inputs).loss.backward()
        found[train_trunk] = gradients(model)
    inside = {key for key in whole if any(key.startswith(f"{block.name}.") for block in blocks)}
    assert_same_gradients(found[True], {key: found[False][key] if key in inside else whole[key] for key in whole})


@pytest.mark.parametrize("scale_kept", [False, True])
def test_kept_samples_are_scaled_by_the_rate_of_the_block(scale_kept: bool):
    model = build("vit").eval()
    blocks = find_residual_blocks(model)
    schedule = sample_schedule(4, drop_rate_schedule="linear", drop_rate=0.6)
    reuse = FeatureReuse(model, blocks, schedule, scale_kept=scale_kept)
    with torch.no_grad(), reuse.step(0, batch_size=8) as plan:
        logits = model(**tiny_models.batch(8)).logits
    survival = [0.85, 0.7, 0.55, 0.4] if scale_kept else [1.0] * 4
    with torch.no_grad(), masked(blocks, plan.sample_masks, survival):
        torch.testing.assert_close(logits, model(**tiny_models.batch(8)).logits, rtol=1e-5, atol=1e-5)


def test_gradients_of_micro_batches_add_up():
    model = build("vit").eval()
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)))
    inputs = tiny_models.batch(8)
    for step in (0, 1):
        with reuse.step(step, batch_size=8):
            model(**inputs).loss.backward()
        wanted = gradients(model)
        for position in (0, 3, 6):
            part = {key: value[position : position + 3] for key, value in inputs.items()}
            with reuse.step(step, batch_size=len(part["labels"]), position=position):
                (model(**part).loss * len(part["labels"]) / 8).backward()
        assert_same_gradients(gradients(model), wanted)


@pytest.mark.parametrize("step", [0, 1])
def test_a_batch_in_which_nothing_trains(step: int):
    model = build("vit")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("vit.layers"))
    blocks = find_residual_blocks(model)

    class Constant(FeatureReuseSchedule):
        def plan(self, global_step, *, batch_size=None, position=0):
            kind = super().plan(global_step, batch_size=batch_size).kind
            return StepPlan(kind, sample_masks=np.full((batch_size, 4), kind is DEPTH))

    reuse = FeatureReuse(model, blocks, Constant(4, drop_granularity="sample"))
    with reuse.step(step, batch_size=3):
        model(**tiny_models.batch(3)).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_and_checkpointing_give_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = with_dropout(build("vit")).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        blocks = find_residual_blocks(model)
        reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)), scale_kept=True)
        for step in (0, 1):
            torch.manual_seed(7)
            with reuse.step(step, batch_size=6):
                model(**tiny_models.batch(6)).loss.backward()
            found.append(gradients(model))
    for plain, checkpointed in ((found[0], found[2]), (found[1], found[3])):
        assert all(
            torch.equal(value, checkpointed[name]) if value is not None else checkpointed[name] is None
            for name, value in plain.items()
        )


def test_the_number_of_samples_is_needed_and_checked():
    model = build("vit")
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)))
    with pytest.raises(ConfigurationError, match=r"Pass `batch_size"), reuse.step(0):
        pass
    with (
        pytest.raises(StepError, match=r"vit\.layers\.0 was called with 4 samples .* planned for 3"),
        reuse.step(0, batch_size=3),
    ):
        model(**tiny_models.batch(4))


def test_compiled_blocks_are_refused(tmp_path: Path):
    model = build("vit")
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)))
    with compile_blocks(blocks, backend="aot_eager"):
        for step in (0, 1):
            with (
                pytest.raises(ConfigurationError, match=r"vit\.layers\.0 is compiled.*drop_granularity=\"batch\""),
                reuse.step(step, batch_size=2),
            ):
                pass
    arguments = config(tmp_path, drop_granularity="sample", torch_compile=True, torch_compile_backend="aot_eager")
    with pytest.raises(ConfigurationError, match=r"`torch_compile=True` does not go with"):
        RecordingTrainer(build("vit"), arguments, train_dataset=examples(8)).train()


# Training


def run(folder: Path, **changed) -> RecordingTrainer:
    # SGD: where a gradient is zero but for rounding, AdamW would move by the whole learning rate.
    options = {"drop_granularity": "sample", "max_steps": 6, "logging_steps": 3, "optim": "sgd", **changed}
    return train(RecordingTrainer(build("vit"), config(folder, **options), train_dataset=examples(48)))


def test_accumulation_changes_nothing(tmp_path: Path):
    whole = run(tmp_path, per_device_train_batch_size=8)
    for size in (4, 2):
        parts = run(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        count = 8 // size
        for index, (step, plan) in enumerate(whole.plans):
            pieces = parts.plans[index * count : (index + 1) * count]
            assert {piece_step for piece_step, _ in pieces} == {step}
            assert {piece.kind for _, piece in pieces} == {plan.kind}
            assert np.array_equal(np.concatenate([piece.sample_masks for _, piece in pieces]), plan.sample_masks)
        for name, value in whole.model.state_dict().items():
            torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        for entry, expected in zip(parts.state.log_history[:-1], whole.state.log_history, strict=False):
            assert entry["dropped_blocks"] == pytest.approx(expected["dropped_blocks"])
            assert entry["loss/masked_freeze"] == pytest.approx(expected["loss/masked_freeze"], rel=1e-4)
            # A micro-batch that is small may need no gradient below a block where the whole batch does.
            assert 0.9 * expected["compute_share"] < entry["compute_share"] <= expected["compute_share"] + 1e-9
    # Both steps of a cycle have the same masks, the cycles different ones.
    masks = [plan.sample_masks for _, plan in whole.plans]
    assert all(np.array_equal(masks[index], masks[index + 1]) for index in (0, 2, 4))
    assert not np.array_equal(masks[0], masks[2])


_RANKS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from tiny_models import build, examples
from training_runs import config, RecordingTrainer, train
folder = Path({folder!r})
trainer = RecordingTrainer(
    build("vit"),
    config(folder, drop_granularity="sample", max_steps=4, optim="sgd", per_device_train_batch_size=2,
           gradient_accumulation_steps=2),
    train_dataset=examples(48),
)
train(trainer)
torch.save(
    {{"weights": trainer.model.state_dict(), "masks": [plan.sample_masks.tolist() for _, plan in trainer.plans]}},
    folder / f"rank{{trainer.args.process_index}}.pt",
)
"""


@pytest.mark.slow
def test_the_number_of_ranks_changes_nothing(tmp_path: Path):
    whole = run(tmp_path, per_device_train_batch_size=8, max_steps=4)
    script = tmp_path / "train.py"
    script.write_text(_RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for index, (_, plan) in enumerate(whole.plans):
        pieces = [ranks[rank]["masks"][2 * index + micro] for micro in (0, 1) for rank in (0, 1)]
        assert [mask for piece in pieces for mask in piece] == plan.sample_masks.tolist()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-4, atol=1e-5)
