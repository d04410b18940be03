"""Hiera keeps one layer in every stage but the first: the one that pools and widens and has no identity shortcut."""

import pytest
import torch
from transformers import HieraConfig, HieraForImageClassification

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    StepKind,
    StepPlan,
    find_residual_blocks,
    skip_blocks,
)

DEPTHS = (2, 2, 3, 2)
KEPT = [f"hiera.encoder.stages.{stage}.layers.0" for stage in (1, 2, 3)]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1])


def hiera(checkpointing: bool = False) -> HieraForImageClassification:
    torch.manual_seed(0)
    config = HieraConfig(
        image_size=[64, 64], embed_dim=8, depths=list(DEPTHS), num_heads=[1, 2, 2, 2], drop_path_rate=0.0, num_labels=3
    )
    model = HieraForImageClassification(config)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def layers(model: HieraForImageClassification) -> list[str]:
    return [
        f"hiera.encoder.stages.{stage}.layers.{index}"
        for stage, depth in enumerate(model.config.depths)
        for index in range(depth)
    ]


class Fixed(FeatureReuseSchedule):
    """One kind of step with one set D, in every step."""

    def __init__(self, num_blocks: int, kind: StepKind, dropped: tuple[int, ...]) -> None:
        super().__init__(num_blocks)
        self.fixed = StepPlan(kind, dropped)

    def plan(self, global_step: int) -> StepPlan:
        return self.fixed


def test_default_configuration_keeps_three_of_24_layers():
    with torch.device("meta"):
        model = HieraForImageClassification(HieraConfig())
    found = [block.name for block in find_residual_blocks(model)]
    assert (len(layers(model)), len(found)) == (24, 21)
    assert [name for name in layers(model) if name not in found] == KEPT


def stage_sets() -> list[tuple[int, ...] | None]:
    """The blocks of each stage, as indices, and `None` for all."""
    counts = [depth - (stage > 0) for stage, depth in enumerate(DEPTHS)]
    return [tuple(range(sum(counts[:stage]), sum(counts[: stage + 1]))) for stage in range(len(DEPTHS))] + [None]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", [StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE])
@pytest.mark.parametrize("dropped", stage_sets(), ids=["stage0", "stage1", "stage2", "stage3", "all"])
def test_every_block_of_a_stage_or_of_all_may_be_dropped(kind, dropped, checkpointing):
    # Checkpointing sits at the stage here, so what was skipped is run again, and skipped again, in backward.
    model = hiera(checkpointing)
    blocks = find_residual_blocks(model)
    chosen = range(len(blocks)) if dropped is None else dropped
    called: set[str] = set()
    for name in layers(model):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    reuse = FeatureReuse(model, blocks, Fixed(len(blocks), kind, tuple(chosen)), train_trunk=False)
    with reuse.step(0):
        loss = model(IMAGES, labels=LABELS).loss
        loss.backward()
    assert loss.isfinite()
    inside = tuple(f"{blocks[index].name}." for index in chosen)
    depth = kind is StepKind.STOCHASTIC_DEPTH
    assert called == {name for name in layers(model) if not (depth and f"{name}." in inside)}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name.startswith(inside) != depth), name


@pytest.mark.parametrize("stage", [0, 3])
def test_states_and_attentions_keep_their_number_where_a_stage_is_dropped(stage):
    model = hiera().eval()
    model.set_attn_implementation("eager")
    blocks = find_residual_blocks(model)
    full = model(IMAGES, output_hidden_states=True, output_attentions=True)
    with skip_blocks([blocks[index] for index in stage_sets()[stage]]):
        output = model(IMAGES, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [state.shape for state in full.hidden_states]
    assert len(output.attentions) == len(full.attentions)
