"""What trains outside the blocks in masked-freeze steps: the whole trunk, only the head, or nothing."""

import pytest
import torch
from architecture_checks import each, objective
from engine_checks import every_architecture
from sample_checks import assert_same_gradients, gradients, sample_schedule
from tiny_architectures import WITH_BLOCKS
from tiny_models import batch, build, examples
from torch import nn
from training_runs import RecordingTrainer, StepWatch, config, same_bits

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, StepKind, StepPlan, find_residual_blocks, train_only
from hf_featreuse.method.freezing import trunk_modules

FREEZE = StepKind.MASKED_FREEZE
WORDS = ("all", "head", "none")
# What the forward calls after the last block.
HEADS = {
    "vit": ("vit.layernorm.", "classifier."),
    "convnext": ("convnext.layernorm.", "classifier."),
    "resnet": ("classifier.",),
    "swin": ("swin.layernorm.", "classifier."),
}
SETS = [(0,), (3,), (1, 2), (0, 3), (0, 1, 2, 3)]


def bitwise(architecture: str) -> nn.Module:
    """A model whose kernels do not depend on what requires gradients: Swin's fused attention does."""
    model = build(architecture)
    if architecture == "swin":
        model.set_attn_implementation("eager")
    return model


class OneSet(FeatureReuseSchedule):
    """A masked-freeze step of one set D, over and over."""

    def __init__(self, num_blocks: int, dropped: tuple[int, ...]) -> None:
        super().__init__(num_blocks)
        self.dropped = dropped

    def plan(self, global_step: int, **samples) -> StepPlan:
        return StepPlan(FREEZE, self.dropped)


def freezing(model: nn.Module, dropped: tuple[int, ...], train_trunk: str) -> FeatureReuse:
    blocks = find_residual_blocks(model)
    return FeatureReuse(model, blocks, OneSet(len(blocks), dropped), train_trunk=train_trunk)


def backward(model: nn.Module, seed: int = 1) -> None:
    model.train()(**batch(seed=seed)).loss.backward()


def expected_to_train(architecture: str, reuse: FeatureReuse, dropped: tuple[int, ...], word: str) -> set[str]:
    names = {name for name, _ in reuse.model.named_parameters() if "mask_token" not in name}
    of_blocks = [tuple(name for name in names if name.startswith(f"{block.name}.")) for block in reuse.blocks]
    trunk = names.difference(*of_blocks)
    outside = {"all": trunk, "none": set(), "head": {name for name in trunk if name.startswith(HEADS[architecture])}}
    return outside[word].union(*(of_blocks[index] for index in dropped))


@every_architecture
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dropped", SETS)
def test_what_trains_has_the_gradients_of_a_full_step_and_the_rest_none(architecture, word, dropped):
    model, plain = bitwise(architecture), bitwise(architecture)
    reuse = freezing(model, dropped, word)
    wanted = expected_to_train(architecture, reuse, dropped, word)
    with reuse.step(0) as plan:
        active = {id(parameter) for parameter in reuse.active_parameters(plan)}
        backward(model)
    backward(plain)
    whole = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert torch.equal(parameter.grad, whole[name].grad), name
            assert id(parameter) in active, name
        else:
            assert parameter.grad is None, name
            assert id(parameter) not in active or "mask_token" in name, name
        assert parameter.requires_grad


@every_architecture
@pytest.mark.parametrize("word", ["head", "none"])
@pytest.mark.parametrize("dropped", [(0,), (2,), (1, 3), (3,)])
def test_backward_ends_in_the_lowest_block_of_the_set(architecture, word, dropped):
    model = build(architecture)
    reuse = freezing(model, dropped, word)
    streams: dict[int, bool] = {}
    visited: list[str] = []
    for index, block in enumerate(reuse.blocks):
        block.module.register_forward_pre_hook(
            lambda _module, args, kwargs, index=index, block=block: streams.update(
                {index: block.stream(args, kwargs).requires_grad}
            ),
            with_kwargs=True,
        )
    for name, module in model.named_modules():
        if not list(module.children()):

            def watch(_module, _args, output, name=name):
                if isinstance(output, torch.Tensor) and output.requires_grad:
                    output.register_hook(lambda _gradient: visited.append(name))

            module.register_forward_hook(watch)
    with reuse.step(0):
        backward(model)
    lowest = min(dropped)
    assert streams == {index: index > lowest for index in range(4)}
    assert visited
    # Between the blocks too: downsampling above the lowest block is visited, below it is not.
    order = called(build(architecture))
    first = min(index for index, name in enumerate(order) if name.startswith(f"{reuse.blocks[lowest].name}."))
    assert set(visited) <= set(order[first:])
    # The counterpart: with the whole trunk, the gradient reaches the first block.
    model.zero_grad(set_to_none=True)
    with freezing(model, dropped, "all").step(0):
        backward(model)
    assert streams == dict.fromkeys(range(4), True)


def called(model: nn.Module) -> list[str]:
    """The modules without children, in the order in which the forward first calls them."""
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_, name=name: found.setdefault(name))
    model(**batch())
    return list(found)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state |= {f"{name}|{key}": value.clone() for key, value in optimizer.state.get(parameter, {}).items()}
    return state


@every_architecture
@pytest.mark.parametrize("word", WORDS)
def test_what_is_frozen_does_not_move_under_a_warmed_optimizer(architecture, word):
    """Weights, running statistics and moments, with momentum and weight decay there to move them."""
    model = build(architecture)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def update(seed: int) -> None:
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for seed in range(2):
        update(seed)
    for dropped in ((2,), (0, 3)):
        reuse = freezing(model, dropped, word)
        before = state_of(model, optimizer)
        with reuse.step(0):
            update(7)
        changed = {name for name, value in state_of(model, optimizer).items() if not torch.equal(before[name], value)}
        wanted = expected_to_train(architecture, reuse, dropped, word)
        assert wanted <= changed
        assert {f"{name}|exp_avg" for name in wanted} <= changed
        moved_modules = {name.rpartition(".")[0] for name in wanted}
        assert {name.partition("|")[0].rpartition(".")[0] for name in changed} == moved_modules


# The head


@each(WITH_BLOCKS)
def test_in_every_architecture_the_head_trains_and_the_gradient_ends_in_the_lowest_block(case):
    model = case.build()
    blocks = find_residual_blocks(model, case.batch())
    last, streams = blocks[-1], []
    last.module.register_forward_pre_hook(
        lambda _module, args, kwargs: streams.append(last.stream(args, kwargs).requires_grad), with_kwargs=True
    )
    objective(case, model)[1].backward()
    whole, found = gradients(model), {}
    for word in ("head", "none"):
        streams.clear()
        schedule = OneSet(len(blocks), (len(blocks) - 1,))
        with FeatureReuse(model, blocks, schedule, train_trunk=word, allow_inexact_skip=True).step(0):
            objective(case, model)[1].backward()
        found[word] = {name: gradient for name, gradient in gradients(model).items() if gradient is not None}
        assert streams[0] is False
    inside = {name for name in found["none"] if name.startswith(f"{last.name}.")}
    assert set(found["none"]) == inside == {name for name in found["head"] if name.startswith(f"{last.name}.")}
    head = set(found["head"]) - inside
    assert head
    assert not any(name.startswith(f"{block.name}.") for block in blocks for name in head)
    assert_same_gradients(found["head"], {name: whole[name] for name in found["head"]})
    assert_same_gradients(found["none"], {name: whole[name] for name in inside})


class Tied(nn.Module):
    """A network whose last layer has the weight of its first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 8, norm_first=True) for _ in range(2))
        self.head.weight = self.stem.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def test_a_layer_that_shares_a_weight_with_the_stem_is_not_part_of_the_head():
    model, x = Tied(), torch.randn(2, 3, 4)
    blocks = find_residual_blocks(model, x)
    with FeatureReuse(model, blocks, OneSet(2, (1,)), train_trunk="head").step(0):
        model(x).square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name in trained if not name.startswith("blocks.1.")} == {"norm.weight", "norm.bias"}


def test_the_head_is_what_follows_the_last_block():
    for architecture, head in HEADS.items():
        model = build(architecture)
        blocks = find_residual_blocks(model)
        names = {module: name for name, module in model.named_modules()}
        found = {f"{names[module]}." for module in trunk_modules(model, blocks)[1]}
        # ResNet's classifier is a sequence, whose linear layer holds the parameters.
        assert all(name.startswith(head) for name in found)
        assert len(found) == len(head)


def test_blocks_that_do_not_take_part_belong_to_the_head_if_they_come_last():
    model = build("vit")
    blocks = find_residual_blocks(model, target_blocks=["layers.1", "layers.2"])
    with train_only(model, blocks[:1], train_trunk="head", all_blocks=blocks):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = ("vit.layers.3.", "vit.layernorm.", "classifier.")
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(("vit.layers.1.", *head))}


def test_what_the_user_froze_in_the_head_stays_frozen():
    model = build("vit")
    model.classifier.requires_grad_(False)
    reuse = freezing(model, (2,), "head")
    with reuse.step(0):
        backward(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name in trained if not name.startswith("vit.layers.2.")} == {
        "vit.layernorm.weight",
        "vit.layernorm.bias",
    }
    assert not any(parameter.requires_grad for parameter in model.classifier.parameters())


def test_the_head_alone_can_train():
    model = build("vit")
    with train_only(model, [], train_trunk="head", all_blocks=find_residual_blocks(model)):
        backward(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(HEADS["vit"])}


# The option


@pytest.mark.parametrize(("given", "word"), [(True, "all"), (False, "none"), *((word, word) for word in WORDS)])
def test_words_and_booleans(given, word):
    model = build("vit")
    assert freezing(model, (0,), given).train_trunk == word
    blocks = find_residual_blocks(model)
    found = []
    for option in (given, word):
        with train_only(model, blocks[2:3], train_trunk=option, all_blocks=blocks):
            found.append([parameter.requires_grad for parameter in model.parameters()])
    assert found[0] == found[1]
    assert any(found[0])
    assert not all(found[0])


# Per sample


@pytest.mark.parametrize("architecture", ["vit", "convnext", "swin"])
def test_with_sets_per_sample_the_head_learns_from_every_sample(architecture):
    model = build(architecture).eval()
    blocks, inputs = find_residual_blocks(model), batch(6)
    model(**inputs).loss.backward()
    whole, found = gradients(model), {}
    for word in WORDS:
        reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)), train_trunk=word)
        with reuse.step(1, batch_size=6) as plan:
            assert plan.kind is FREEZE
            model(**inputs).loss.backward()
        found[word] = gradients(model)
    head = {name for name in whole if name.startswith(HEADS[architecture])}
    expected = {name: whole[name] if name in head else gradient for name, gradient in found["none"].items()}
    assert_same_gradients(found["head"], expected)
    assert all(found["none"][name] is None and found["head"][name] is not None for name in head)


# In training


class HeadWatch(StepWatch):
    """Compares weights and moments before and after every step of a run that trains the head."""

    def on_step_end(self, args, state, control, **kwargs):
        reuse, after = self.trainer.feature_reuse, self.take(**kwargs)
        plan = reuse.plan(state.global_step - 1)
        self.kinds.add(plan.kind)
        moved = [name for name in after if not same_bits(self.before[name], after[name])]
        dropped = tuple(f"{reuse.blocks[index].name}." for index in plan.dropped)
        if plan.kind is FREEZE:
            assert [name for name in moved if not name.startswith((*dropped, *HEADS["vit"]))] == []
            assert all(any(name.startswith(prefix) for name in moved) for prefix in (*dropped, *HEADS["vit"]))


def test_training_with_the_head(tmp_path):
    watch = HeadWatch()
    arguments = config(tmp_path, max_steps=8, weight_decay=0.1, train_trunk="head")
    watch.trainer = RecordingTrainer(build("vit"), arguments, train_dataset=examples(), callbacks=[watch])
    watch.trainer.train()
    assert {StepKind.STOCHASTIC_DEPTH, FREEZE} <= watch.kinds
    shares = {}
    for word in WORDS:
        arguments = config(tmp_path, max_steps=8, train_trunk=word)
        trainer = RecordingTrainer(build("vit"), arguments, train_dataset=examples())
        trainer.train()
        logged = [entry["compute_share"] for entry in trainer.state.log_history if "compute_share" in entry]
        shares[word] = sum(logged) / len(logged)
    assert shares["none"] < shares["head"] < shares["all"]
