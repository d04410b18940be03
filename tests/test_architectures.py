"""Every image classifier in transformers: blocks found, skipped, frozen, counted and trained as expected of each."""

import contextlib
import importlib.util
import re
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from tiny_architectures import ARCHITECTURES, NOT_INSTALLED, SKIPPABLE, WITH_BLOCKS, Architecture
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as MAPPING

from hf_featreuse import (
    BlockError,
    FeatureReuseConfig,
    FeatureReuseTrainer,
    ResidualBlock,
    StepKind,
    StepPlan,
    find_residual_blocks,
    measure_step_costs,
    skip_blocks,
    train_only,
)
from hf_featreuse.cost import flop_counter
from hf_featreuse.probing import undisturbed

DEPTH, FREEZE = StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE


def each(architectures: tuple[Architecture, ...]) -> pytest.MarkDecorator:
    """A test for every architecture."""
    return pytest.mark.parametrize("case", architectures, ids=[case.name for case in architectures])


class Shortcut(nn.Module):
    """What stands in for a removed block: its first input, in the shape of the block's output."""

    def __init__(self, num_outputs: int | None) -> None:
        super().__init__()
        self.num_outputs = num_outputs

    def forward(self, stream, *args, **kwargs):
        return stream if self.num_outputs is None else (stream, *(None,) * (self.num_outputs - 1))


def objective(case: Architecture, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the model's own loss or, where it has none, one made of the logits."""
    torch.manual_seed(5)
    if case.returns_loss:
        output = model(**case.labelled(4))
        return output.logits, output.loss
    logits = model(**case.batch(4)).logits
    return logits, logits.square().mean()


def some_and_all(blocks: list[ResidualBlock]) -> list[list[ResidualBlock]]:
    return [blocks[:1], blocks[-1:], blocks[::2], blocks]


# The mapping


def test_every_type_of_this_transformers_is_labelled():
    labelled = {case.model_type for case in ARCHITECTURES} | set(NOT_INSTALLED)
    assert len(labelled) == 42
    assert labelled <= set(MAPPING)
    classes = {case.model_class for case in ARCHITECTURES}
    for model_type in labelled - set(NOT_INSTALLED):
        names = MAPPING[model_type]
        assert {names} if isinstance(names, str) else set(names) <= classes, model_type
    assert len({case.name for case in ARCHITECTURES}) == len(ARCHITECTURES)


@pytest.mark.parametrize("model_type", sorted(MAPPING))
def test_default_configuration_has_blocks_or_says_why_not(model_type):
    # A type that a later transformers adds comes here by itself.
    package = NOT_INSTALLED.get(model_type)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{model_type} needs the package {package}")
    names = MAPPING[model_type]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    with torch.device("meta"):
        model = model_class(CONFIG_MAPPING[model_type]())
    before = tiny_models.snapshot(model)
    try:
        blocks = find_residual_blocks(model)
    except BlockError as error:
        assert len(str(error)) > 60
    else:
        assert blocks
        assert all(model.get_submodule(block.name) is block.module for block in blocks)
    assert tiny_models.snapshot(model) == before


# The table in the documentation


def test_the_table_names_every_type():
    page = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text()
    assert sorted(set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))) == sorted(MAPPING), (
        "docs/architectures.md is for another transformers. Run `python benchmarks/architectures.py`."
    )
    classes = [names for value in MAPPING.values() for names in ((value,) if isinstance(value, str) else value)]
    assert all(f"| `{name}` |" in page for name in classes)
    # Figures known from the papers' layouts: 12 layers of ViT; 16 layers of ResNet-50, of which 4 have projections.
    assert "| `vit` | `ViTForImageClassification` | 12 |" in page
    assert "| `resnet` | `ResNetForImageClassification` | 12 |" in page
    assert "| `mobilenet_v1` | `MobileNetV1ForImageClassification` | 0 |" in page


# Finding


@each(WITH_BLOCKS)
def test_blocks_are_exactly_those_labelled(case):
    model = case.build()
    before, state = tiny_models.snapshot(model), {key: value.clone() for key, value in model.state_dict().items()}
    blocks = find_residual_blocks(model, case.batch())
    assert tuple(block.name for block in blocks) == case.blocks
    assert {block.exact for block in blocks} == {case.exact}
    assert {block.activation for block in blocks} == {case.activation}
    assert {block.num_outputs for block in blocks} == {case.num_outputs}
    assert {(block.position, block.keyword) for block in blocks} == {(0, None)}
    assert tiny_models.snapshot(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@each(tuple(case for case in ARCHITECTURES if not case.blocks))
def test_models_without_shortcuts_are_refused(case):
    with pytest.raises(BlockError, match="has no residual block that can be skipped"):
        find_residual_blocks(case.build(), case.batch())


@each(tuple(case for case in WITH_BLOCKS if not case.needs_inputs))
def test_a_batch_is_made_from_the_config(case):
    assert tuple(block.name for block in find_residual_blocks(case.build())) == case.blocks


@each(tuple(case for case in WITH_BLOCKS if case.needs_inputs))
def test_models_with_inputs_of_their_own_need_a_batch(case):
    model = case.build()
    if case.model_type == "shieldgemma2":
        # Without an image, its vision tower is not called.
        assert tuple(block.name for block in find_residual_blocks(model)) == case.blocks[2:]
        return
    with pytest.raises(BlockError, match="Pass a small batch"):
        find_residual_blocks(model)


@each(tuple(case for case in SKIPPABLE if case.model_type == "levit"))
def test_finding_leaves_no_graph_in_the_model(case):
    model = case.build()
    find_residual_blocks(model, case.batch())
    caches = [module.attention_bias_cache for module in model.modules() if "attention_bias_cache" in vars(module)]
    assert caches
    assert not any(caches)


# Skipping


@each(SKIPPABLE)
def test_skipping_equals_taking_the_blocks_out(case):
    # LeViT cannot be copied or run backward twice in eval mode, so the reference is built anew and both train.
    model = case.build()
    blocks = find_residual_blocks(model, case.batch())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for dropped in some_and_all(blocks):
        reference = case.build()
        for block in dropped:
            reference.set_submodule(block.name, Shortcut(case.num_outputs))
        expected, expected_loss = objective(case, reference)
        expected_loss.backward()
        model.load_state_dict(state)
        model.zero_grad(set_to_none=True)
        with skip_blocks(dropped):
            logits, loss = objective(case, model)
            loss.backward()
        assert loss.isfinite()
        assert torch.equal(logits, expected)
        kept = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            if name not in kept or kept[name].grad is None:
                assert parameter.grad is None, name
            else:
                assert parameter.grad.isfinite().all(), name
                torch.testing.assert_close(parameter.grad, kept[name].grad)
        statistics = dict(reference.named_buffers())
        for name, buffer in model.named_buffers():
            if name in state:
                assert torch.equal(buffer, statistics.get(name, state[name])), name


@each(SKIPPABLE)
def test_every_block_makes_a_difference(case):
    model = case.build().eval()
    blocks = find_residual_blocks(model, case.batch())
    with torch.no_grad():
        full = model(**case.batch()).logits
        for block in blocks:
            with skip_blocks([block]):
                assert not torch.allclose(model(**case.batch()).logits, full, rtol=1e-5, atol=1e-6), block.name
        assert torch.equal(model(**case.batch()).logits, full)


@each(tuple(case for case in WITH_BLOCKS if not case.exact))
def test_inexact_shortcuts_are_refused(case):
    blocks = find_residual_blocks(case.build(), case.batch())
    with pytest.raises(BlockError, match="Gelu follows the addition"), skip_blocks(blocks[:1]):
        pass


def with_eager_attention(case: Architecture) -> PreTrainedModel:
    model = case.build().eval()
    model.set_attn_implementation("eager")
    return model


# Their loops collect what each block returns; in the others, hooks on the attention modules collect it.
_ONE_ENTRY_A_BLOCK = {"data2vec-vision", "imagegpt", "perceiver", "pvt", "pvt_v2"}
_ONE_ENTRY_A_STAGE = {"donut-swin", "hiera", "swinv2"}
# One entry a stage, of its last block, where that one runs.
_LAST_OF_A_STAGE = {"swin"}


@each(SKIPPABLE)
def test_attentions_can_be_asked_for_while_blocks_are_skipped(case):
    model = with_eager_attention(case)
    blocks = find_residual_blocks(model, case.batch())
    full = model(**case.batch(), output_attentions=True)
    for dropped in (blocks[:1], blocks):
        with skip_blocks(dropped):
            output = model(**case.batch(), output_attentions=True)
        with skip_blocks(dropped):
            plain = model(**case.batch())
        assert torch.equal(output.logits, plain.logits)
        attentions = output.get("attentions")
        if not full.get("attentions"):
            assert not attentions
        elif case.model_type in _ONE_ENTRY_A_BLOCK | _ONE_ENTRY_A_STAGE:
            assert len(attentions) == len(full.attentions)
        elif case.model_type in _LAST_OF_A_STAGE:
            assert len(attentions) == (len(full.attentions) if len(dropped) == 1 else 0)
        else:
            assert len(attentions) == len(full.attentions) - len(dropped)


# transformers collects the hidden states of these with hooks on the blocks, which a skipped block does not run.
_FEWER_HIDDEN_STATES = {
    "beit",
    "clip",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "ijepa",
    "metaclip_2",
    "siglip",
    "siglip2",
    "vit",
    "vit_msn",
}


@each(tuple(case for case in SKIPPABLE if case.model_type != "shieldgemma2"))
def test_hidden_states_can_be_asked_for_while_a_block_is_skipped(case):
    model = case.build().eval()
    blocks = find_residual_blocks(model, case.batch())
    full = model(**case.batch(), output_hidden_states=True).hidden_states
    with skip_blocks(blocks[1:2]):
        states = model(**case.batch(), output_hidden_states=True).hidden_states
    assert len(states) == len(full) - (case.model_type in _FEWER_HIDDEN_STATES)


# Freezing


@each(WITH_BLOCKS)
def test_train_only_one_block(case):
    model = case.build()
    blocks = find_residual_blocks(model, case.batch())
    before = tiny_models.snapshot(model)
    for block in (blocks[0], blocks[-1]):
        model.zero_grad(set_to_none=True)
        frozen = {
            key: value.clone() for key, value in model.state_dict().items() if not key.startswith(f"{block.name}.")
        }
        with train_only(model, [block]):
            _, loss = objective(case, model)
            loss.backward()
        assert loss.isfinite()
        inside = {id(parameter) for parameter in block.module.parameters()}
        assert any(parameter.grad is not None for parameter in block.module.parameters())
        assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in inside)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
        assert tiny_models.snapshot(model) == before


# Costs


def counted(case: Architecture, model: PreTrainedModel, context: contextlib.AbstractContextManager) -> int:
    """Operations of a forward and backward inside a context."""
    model.zero_grad(set_to_none=True)
    # Each count fills the model's caches anew: LeViT's of attention biases would keep the graph of the one before.
    with undisturbed(model), context, flop_counter() as counter:
        model(**case.batch(1)).logits.sum().backward()
    return counter.get_total_flops()


@each(SKIPPABLE)
def test_costs_are_those_of_the_flop_counter(case):
    model = case.build()
    blocks = find_residual_blocks(model, case.batch(1))
    costs = measure_step_costs(model, blocks, case.batch(1))
    # A pooling head's query does not depend on the image, so no gradient flows through it when it is frozen, and
    # ShieldGemma2 runs the head for nothing. Neither is told apart, and in a model as small as this one the head
    # counts for much.
    rel = 0.06 if case.model_type in ("siglip", "siglip2", "shieldgemma2") else 0.02
    model.eval()
    assert costs.vanilla == counted(case, model, contextlib.nullcontext())
    for dropped in ((0,), tuple(range(len(blocks) // 2, len(blocks)))):
        chosen = [blocks[index] for index in dropped]
        skipped = counted(case, model, skip_blocks(chosen)) / costs.vanilla
        assert costs.share(StepPlan(DEPTH, dropped)) == pytest.approx(skipped, rel=0.02)
        frozen = counted(case, model, train_only(model, chosen)) / costs.vanilla
        assert costs.share(StepPlan(FREEZE, dropped)) == pytest.approx(frozen, rel=rel)


@each(tuple(case for case in SKIPPABLE if case.model_type == "levit"))
def test_costs_after_a_backward_in_eval_mode(case):
    # The cache of attention biases then keeps a graph that cannot be run again.
    model = case.build().eval()
    blocks = find_residual_blocks(model, case.batch(1))
    expected = measure_step_costs(model, blocks, case.batch(1))
    model(**case.batch(1)).logits.sum().backward()
    caches = [module.attention_bias_cache for module in model.modules() if "attention_bias_cache" in vars(module)]
    before = [dict(cache) for cache in caches]
    assert measure_step_costs(model, blocks, case.batch(1)) == expected
    assert find_residual_blocks(model, case.batch(1))
    assert all(cache[key] is value for cache, old in zip(caches, before, strict=True) for key, value in old.items())


# Models that keep keys and values. torch's counter sees eager attention on the CPU, and so how many keys there are.
@pytest.mark.parametrize("name", ["imagegpt", "shieldgemma2"])
def test_a_cache_of_keys_and_values_costs_nothing(name):
    case = next(case for case in ARCHITECTURES if case.name == name)
    model = with_eager_attention(case)
    without = {**case.batch(1), "use_cache": False}
    blocks = find_residual_blocks(model, without)
    costs = measure_step_costs(model, blocks, {**case.batch(1), "use_cache": True})
    assert costs == measure_step_costs(model, blocks, without)
    with skip_blocks(blocks[-1:]):
        skipped = counted(case, model, contextlib.nullcontext()) / costs.vanilla
    assert costs.share(StepPlan(DEPTH, (len(blocks) - 1,))) == pytest.approx(skipped, rel=0.02)


# The real trainer


def trainer_of(case: Architecture, folder) -> FeatureReuseTrainer:
    batch = case.labelled(8) if case.returns_loss else case.batch(8)
    data = [{key: value[index] for key, value in batch.items()} for index in range(8)]
    args = FeatureReuseConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        drop_rate=0.5,
        drop_rate_schedule="uniform",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return FeatureReuseTrainer(case.build(), args, train_dataset=data)


@each(tuple(case for case in SKIPPABLE if case.returns_loss))
def test_trainer_takes_alternating_steps(case, tmp_path):
    trainer = trainer_of(case, tmp_path)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [sorted(key for key in entry if key.startswith("loss/")) for entry in logs] == [
        ["loss/stochastic_depth"],
        ["loss/masked_freeze"],
    ] * 2
    assert all(torch.tensor(entry["loss"]).isfinite() for entry in logs)
    assert all(0 < entry["compute_share"] < 1 for entry in logs)
    assert [block.name for block in trainer.feature_reuse.blocks] == list(case.blocks)
    after = list(trainer.model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(parameter.isfinite().all() for parameter in after)


@each(tuple(case for case in SKIPPABLE if not case.returns_loss))
def test_a_missing_loss_is_the_error_of_trainer(case, tmp_path):
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer_of(case, tmp_path).train()


@each(tuple(case for case in ARCHITECTURES if case not in SKIPPABLE))
def test_trainer_says_why_it_cannot(case, tmp_path):
    with pytest.raises(BlockError, match="follows the addition" if case.blocks else "has no residual block"):
        trainer_of(case, tmp_path).train()
