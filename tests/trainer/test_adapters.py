"""Adapters of PEFT: only those of dropped blocks train in masked-freeze steps, and a skipped block skips its own."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import batch, build, examples
from torch import nn
from training_runs import RecordingTrainer, StepWatch, config, same_bits, state_of, traces, train

from hf_featreuse import CheckpointError, StepKind, find_residual_blocks, skip_blocks, train_only, trainable_blocks

LAYERS = {"vit": ["q_proj", "v_proj", "fc1"], "convnext": ["pwconv1", "pwconv2"]}
MARKS = {"lora": "lora_", "ia3": "ia3_l"}
METHODS = list(MARKS)


def adapted(architecture: str, method: str, saved: tuple[str, ...] = ("classifier",), **changed: Any) -> PeftModel:
    """A tiny model with adapters that do something, next to layers of its blocks."""
    targets = LAYERS[architecture]
    common = {"target_modules": targets, "modules_to_save": list(saved) or None, **changed}
    options = LoraConfig(**{"r": 2, **common}) if method == "lora" else IA3Config(feedforward_modules=[], **common)
    model = get_peft_model(build(architecture), options)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if MARKS[method] in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def is_adapter(name: str) -> bool:
    return any(mark in name for mark in MARKS.values())


class AdapterWatch(StepWatch):
    """Compares all weights and moments before and after every optimizer step of a model with adapters."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reuse, after = self.trainer.feature_reuse, self.take(**kwargs)
        plan = reuse.plan(state.global_step - 1)
        dropped = [f"{reuse.blocks[index].name}." for index in plan.dropped]
        kept = [f"{block.name}." for block in reuse.blocks if f"{block.name}." not in dropped]
        moved = [name for name in after if not same_bits(self.before[name], after[name])]
        self.kinds.add(plan.kind)
        head = [name for name in moved if "modules_to_save" in name]
        # Base weights rest in every step.
        assert [name for name in moved if not is_adapter(name) and name not in head] == []
        if plan.kind is StepKind.MASKED_FREEZE:
            assert [name for name in moved if name not in head and not name.startswith(tuple(dropped))] == []
            assert bool(head) is (reuse.train_trunk != "none")
            training = dropped
        else:
            assert [name for name in moved if name.startswith(tuple(dropped or ["none"]))] == []
            assert head
            training = kept
        assert all(any(name.startswith(prefix) for name in moved) for prefix in training)


@pytest.mark.parametrize("train_trunk", ["none", "head", "all"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", LAYERS)
def test_only_the_adapters_of_dropped_blocks_train(
    architecture: str, method: str, train_trunk: str, tmp_path: Path
) -> None:
    model, watch = adapted(architecture, method), AdapterWatch()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    before = traces(model)
    arguments = config(tmp_path, max_steps=8, weight_decay=0.1, train_trunk=train_trunk)
    watch.trainer = RecordingTrainer(model, arguments, train_dataset=examples(), callbacks=[watch])
    watch.trainer.train()
    assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= watch.kinds
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen
    assert all(
        is_adapter(name) or "modules_to_save" in name
        for name in set(state_of(model)) - set(frozen)
        if dict(model.named_parameters()).get(name) is not None
    )
    assert traces(model) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", LAYERS)
def test_the_base_never_thaws_inside_a_step(architecture: str, method: str) -> None:
    model = adapted(architecture, method)
    blocks = trainable_blocks(model, find_residual_blocks(model))
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for contexts in (
        train_only(model, blocks[1:3]),
        train_only(model, blocks[:1], train_trunk=True, all_blocks=blocks),
    ):
        with contexts:
            assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} < wanted
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", LAYERS)
def test_skipping_a_block_skips_its_adapter(architecture: str, method: str) -> None:
    model = adapted(architecture, method).eval()
    blocks = find_residual_blocks(model)
    names = {module: name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    called: Counter[str] = Counter()
    for module, name in names.items():
        module.register_forward_hook(lambda *_, name=name: called.update([name]))
    dropped = [blocks[0], blocks[2]]
    with torch.no_grad(), skip_blocks(dropped):
        logits = model(**batch()).logits
    prefixes = tuple(f"{block.name}." for block in dropped)
    expected = {name for name in names.values() if not name.startswith(prefixes)}
    assert expected
    assert set(called) == expected
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            nn.init.normal_(parameter)
    with torch.no_grad():
        with skip_blocks(dropped):
            assert torch.equal(model(**batch()).logits, logits)
        assert not torch.equal(model(**batch()).logits, logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", LAYERS)
def test_adapters_are_saved_loaded_merged_and_resumed(architecture: str, method: str, tmp_path: Path) -> None:
    base = copy.deepcopy(adapted(architecture, method).unload())
    arguments = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 4}
    whole = train(
        RecordingTrainer(adapted(architecture, method), config(tmp_path, **arguments), train_dataset=examples())
    )
    resumed = RecordingTrainer(adapted(architecture, method), config(tmp_path / "a"), train_dataset=examples())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_bits(state_of(resumed.model), state_of(whole.model))
    assert same_bits(resumed.optimizer.state_dict(), whole.optimizer.state_dict())

    whole.save_model(str(tmp_path / "adapter"))
    with torch.no_grad():
        logits = whole.model.eval()(**batch()).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(loaded(**batch()).logits, logits)
        merged = loaded.merge_and_unload().eval()
        assert torch.allclose(merged(**batch()).logits, logits, atol=1e-4)
    assert type(merged) is type(build(architecture))
    assert set(state_of(merged)) == set(state_of(build(architecture)))
    blocks = find_residual_blocks(merged)
    assert [f"base_model.model.{block.name}" for block in blocks] == [b.name for b in whole.feature_reuse.blocks]


def test_blocks_without_an_adapter_are_not_drawn(tmp_path: Path) -> None:
    model = adapted("vit", "lora", layers_to_transform=[1, 3], layers_pattern="layers")
    trainer = train(RecordingTrainer(model, config(tmp_path), train_dataset=examples()))
    assert [block.name.split(".")[-1] for block in trainer.feature_reuse.blocks] == ["1", "3"]


def test_adapters_alone_train_where_nothing_else_is_saved(tmp_path: Path) -> None:
    model = adapted("vit", "lora", saved=())
    trainer = train(RecordingTrainer(model, config(tmp_path, drop_rate=0.9, max_steps=8), train_dataset=examples()))
    # A cycle that drops every block leaves nothing to train in its first step, and is vanilla.
    assert not trainer.feature_reuse.trunk_trains
    plans = [trainer.feature_reuse.schedule.plan(step) for step in range(8)]
    assert any(len(plan.dropped) == 4 for plan in plans)
    assert all(len(plan.dropped) < 4 for _, plan in trainer.plans)


def test_an_adapter_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    arguments = config(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    train(RecordingTrainer(adapted("vit", "ia3"), arguments, train_dataset=examples()))
    other = RecordingTrainer(adapted("vit", "lora"), config(tmp_path), train_dataset=examples())
    before = state_of(other.model)
    with pytest.raises(CheckpointError, match="adapter"):
        other.train(resume_from_checkpoint=True)
    assert same_bits(state_of(other.model), before)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_adapters_of_convolutions_train_like_those_of_linear_layers(tmp_path: Path) -> None:
    # PEFT asks for a rank that the groups of the depthwise convolution divide, and cannot merge it.
    model, watch = adapted("convnext", "lora", target_modules=["dwconv", "pwconv1"], r=16), AdapterWatch()
    assert any("dwconv.lora_A" in name for name, _ in model.named_parameters())
    arguments = config(tmp_path, max_steps=8, weight_decay=0.1)
    watch.trainer = RecordingTrainer(model, arguments, train_dataset=examples(), callbacks=[watch])
    watch.trainer.train()
    assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= watch.kinds


class SavingInside(RecordingTrainer):
    """Saves the adapter in the first micro-batch of every step, while blocks are skipped or frozen."""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        self.save_model(f"{self.args.output_dir}/{self.plans[-1][1].kind.value}")
        return loss


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", LAYERS)
def test_an_adapter_saved_while_a_step_is_open_is_whole(architecture: str, method: str, tmp_path: Path) -> None:
    base = copy.deepcopy(adapted(architecture, method).unload())
    model = adapted(architecture, method)
    # The weights stay as they are, so that every save holds the same.
    arguments = config(tmp_path, learning_rate=0.0, max_steps=4)
    train(SavingInside(model, arguments, train_dataset=examples()))
    with torch.no_grad():
        logits = model.eval()(**batch()).logits
    wanted = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    assert len(wanted) == sum(p.requires_grad for p in model.parameters())
    for kind in (StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE):
        saved = safetensors.torch.load_file(tmp_path / kind.value / "adapter_model.safetensors")
        assert same_bits({name: tensor.clone() for name, tensor in saved.items()}, wanted)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / kind.value).eval()
        with torch.no_grad():
            assert torch.equal(loaded(**batch()).logits, logits)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_adapters_resume_exactly_at_every_step_of_a_cycle(method: str, tmp_path: Path) -> None:
    arguments = {"stochastic_depth_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = train(RecordingTrainer(adapted("vit", method), config(tmp_path, **arguments), train_dataset=examples()))
    assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= {plan.kind for _, plan in whole.plans}
    for step in (1, 2, 3):
        again = config(tmp_path / "again", stochastic_depth_steps=2)
        resumed = RecordingTrainer(adapted("vit", method), again, train_dataset=examples())
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same_bits(state_of(resumed.model), state_of(whole.model))
        assert same_bits(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
