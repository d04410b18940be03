"""A shortcut is exact only if it is certain to be the identity, in eval and in training mode."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import build, snapshot
from torch import nn
from transformers import CvtConfig, CvtForImageClassification, ViTConfig, ViTForImageClassification

from hf_featreuse import BlockError, ResidualBlock, find_residual_blocks, inspect_model, skip_blocks
from hf_featreuse.method import residual_graph
from hf_featreuse.method.blocks import check_exact

# Square, so that a transpose keeps the shape.
IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """A given form of shortcut, plus a convolution."""

    def __init__(self, form) -> None:
        super().__init__()
        self.form, self.conv, self.drop = form, nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.form(self, x, self.conv(x))


def blocks_of(*parts: nn.Module, inputs: torch.Tensor = IMAGES) -> list[ResidualBlock]:
    """The blocks of a stem and parts; none if the model is refused."""
    try:
        return find_residual_blocks(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(*parts)), inputs)
    except BlockError as error:
        assert "has no residual block" in str(error)
        return []


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """A channel shuffle out of views."""
    return x.reshape(2, 2, 2, 4, 4).transpose(1, 2).reshape(2, 4, 4, 4)


class Clone(torch.autograd.Function):
    """Twice its input, under the name that torch gives a copy."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


EXACT = {
    "x + f": lambda m, x, f: x + f,
    "f + x": lambda m, x, f: f + x,
    "x - f": lambda m, x, f: x - f,
    "x + 2 f by alpha": lambda m, x, f: torch.add(x, f, alpha=2),
    "x - 2 f by alpha": lambda m, x, f: torch.sub(x, f, alpha=2),
    "transposed there and back": lambda m, x, f: (x.transpose(2, 3) + f.transpose(2, 3)).transpose(2, 3),
    "channels last there and back": lambda m, x, f: (x.permute(0, 2, 3, 1) + f.permute(0, 2, 3, 1)).permute(
        0, 3, 1, 2
    ),
    "flattened and restored": lambda m, x, f: (x.flatten(1) + f.flatten(1)).view_as(x),
    "shuffled there and back": lambda m, x, f: shuffled(shuffled(x)) + f,
    "two additions": lambda m, x, f: (x + f) + torch.tanh(x + f),
    "dropout on the branch": lambda m, x, f: x + m.drop(f),
    "dropout of probability 0": lambda m, x, f: F.dropout(x, 0.0, m.training) + f,
    "cast up and down again": lambda m, x, f: (x.double() + f.double()).float(),
    "skips itself": lambda m, x, f: x if m.training and random.random() < 2 else x + f,
}
INEXACT = {
    "transpose": lambda m, x, f: x.transpose(2, 3) + f,
    "permute": lambda m, x, f: x.permute(0, 1, 3, 2) + f,
    "transpose by the last addition": lambda m, x, f: (x + f).transpose(2, 3),
    "channel shuffle by views": lambda m, x, f: shuffled(x) + f,
    "channel shuffle": lambda m, x, f: F.channel_shuffle(x, 2) + f,
    "another order of the values": lambda m, x, f: x.permute(0, 2, 3, 1).reshape(2, 4, 4, 4) + f,
    "dropout layer": lambda m, x, f: m.drop(x) + f,
    "dropout function": lambda m, x, f: F.dropout(x, 0.1, m.training) + f,
    "dropout of the sum": lambda m, x, f: m.drop(x + f),
    "dropout in training only": lambda m, x, f: (F.dropout(x, 0.1) if m.training else x) + f,
    "noise in training": lambda m, x, f: (x * torch.rand_like(x) if m.training else x) + f,
    "no shortcut in training": lambda m, x, f: f if m.training else x + f,
    "flip": lambda m, x, f: x.flip(3) + f,
    "roll": lambda m, x, f: x.roll(1, 2) + f,
    "slices put together": lambda m, x, f: torch.cat([x[:, 2:], x[:, :2]], 1) + f,
    "indexed": lambda m, x, f: x[:, [1, 0, 2, 3]] + f,
    "half": lambda m, x, f: 0.5 * x + f,
    "half by alpha": lambda m, x, f: torch.add(f, x, alpha=0.5),
    "twice": lambda m, x, f: x + x + f,
    "twice by alpha": lambda m, x, f: torch.add(x + f, x, alpha=1),
    "once and half by alpha": lambda m, x, f: torch.add(x + f, x, alpha=0.5),
    "f - x": lambda m, x, f: f - x,
    "x - x + f": lambda m, x, f: x + (f - x),
    "minus": lambda m, x, f: -x + f,
    "x and its transpose": lambda m, x, f: x + f + x.transpose(2, 3),
    "rounded": lambda m, x, f: x.bfloat16().float() + f,
    "a function of the user's that torch has, too": lambda m, x, f: Clone.apply(x) + f,
    "nothing added": lambda m, x, f: x.view_as(x),
}


@pytest.mark.parametrize("form", EXACT)
def test_identities_are_exact(form):
    blocks = blocks_of(Residual(EXACT[form]), Residual(EXACT[form]))
    assert [(block.name, block.exact, block.inexact) for block in blocks] == [("1.0", True, ""), ("1.1", True, "")]


@pytest.mark.parametrize("form", INEXACT)
def test_a_shortcut_that_changes_or_moves_values_is_not_exact(form):
    blocks = blocks_of(Residual(INEXACT[form]), Residual(EXACT["x + f"]))
    assert [block.name for block in blocks if block.exact] == ["1.1"]
    for block in blocks[:-1]:
        assert block.inexact
        with pytest.raises(BlockError, match=rf"Block 1\.0 \(Residual\) cannot be skipped exactly: {block.inexact}"):
            check_exact(blocks)


def test_a_transpose_is_seen_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(*(Residual(INEXACT["transpose"]) for _ in range(2))))
    blocks = find_residual_blocks(model, IMAGES.to("meta"))
    assert [block.exact for block in blocks] == [False, False]
    notes = " ".join(inspect_model(model, inputs=IMAGES.to("meta")).notes)
    assert "2 of 2 blocks cannot be skipped exactly: its shortcut moves, scales or rounds the values" in notes


@pytest.mark.parametrize("bounds", [(0.0, 6.0), (-1.0, 1.0)])
def test_an_activation_keeps_only_what_the_same_one_has_bounded(bounds):
    def clamped(m, x, f):
        return F.hardtanh(x + f, *bounds)

    stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6())
    blocks = find_residual_blocks(nn.Sequential(stem, nn.Sequential(Residual(clamped), Residual(clamped))), IMAGES)
    # The second block has the output of the first.
    assert [block.exact for block in blocks] == [bounds == (0.0, 6.0), True]


class Sums(nn.Module):
    """Adds a second argument, of the same shape in a batch of one, to its input; or only works with it."""

    def __init__(self, form) -> None:
        super().__init__()
        self.form, self.linear = form, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.form(x, other, self.linear)


class WithSecond(nn.Module):
    def __init__(self, form, keyword: bool) -> None:
        super().__init__()
        self.embed, self.head, self.keyword = nn.Linear(3, 8), nn.Linear(8, 2), keyword
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList([Sums(form), Sums(form)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, other=self.position) if self.keyword else block(x, self.position)
        return self.head(x.mean(1))


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize(
    ("form", "exact"),
    [
        (lambda x, other, f: x + other + f(x), False),
        (lambda x, other, f: f(x) + (other + x), False),
        (lambda x, other, f: x + f(x + other), True),
        (lambda x, other, f: x + f(x) * other, True),
    ],
)
def test_a_stream_among_several_summands_is_not_exact(form, exact, keyword):
    model = WithSecond(form, keyword)
    blocks = find_residual_blocks(model, torch.randn(1, 5, 3))
    assert [(block.exact, block.position) for block in blocks] == [(exact, 0)] * 2
    assert exact or "it is not certain which one is its residual stream" in blocks[0].inexact


def test_a_tensor_that_is_passed_twice_is_one_stream():
    class Pair(Sums):
        def forward(self, x: torch.Tensor, again: torch.Tensor) -> torch.Tensor:
            return again + self.linear(x)

    class Model(WithSecond):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x, x)
            return x

    model = Model(None, False)
    model.blocks = nn.ModuleList([Pair(None), Pair(None)])
    assert [block.exact for block in find_residual_blocks(model, torch.randn(1, 5, 3))] == [True, True]


def test_inexact_inputs_are_refused_in_the_second_stream_too():
    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + self.first(x), y.transpose(1, 2) + self.second(y)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList([Streams(), Streams()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x[:, None].expand(-1, 4, -1)
            for block in self.body:
                x, y = block(x, y)
            return x + y.mean(1)

    blocks = find_residual_blocks(Model(), torch.randn(2, 4))
    assert [block.exact for block in blocks] == [False, False]


# The run in training mode


def test_own_drop_path_after_the_addition_only_warns():
    config = CvtConfig(
        embed_dim=[8, 16, 16], num_heads=[1, 2, 2], depth=[1, 2, 3], drop_path_rate=[0.0, 0.0, 0.1], num_labels=3
    )
    assert all(block.exact for block in find_residual_blocks(CvtForImageClassification(config)))


def test_dropout_everywhere_and_large_blocks_stay_exact():
    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=1536,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.5,
        attention_probs_dropout_prob=0.5,
    )
    model = ViTForImageClassification(config)
    model.set_attn_implementation("eager")
    before = snapshot(model)
    assert [block.exact for block in find_residual_blocks(model)] == [True, True]
    assert snapshot(model) == before


@pytest.mark.parametrize("form", ["x + f", "dropout layer"])
def test_blocks_that_read_values_are_examined(form):
    class Branches(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if float(x.detach().mean()) < 1e9 else self.conv(x)

    blocks = blocks_of(*(Branches({**EXACT, **INEXACT}[form]) for _ in range(2)))
    assert [block.exact for block in blocks] == [form in EXACT] * 2


def test_identical_blocks_are_run_once_and_others_separately(monkeypatch):
    looked = []
    real = residual_graph._calls_in_training

    def look(module, arguments):
        looked.append(module)
        return real(module, arguments)

    monkeypatch.setattr(residual_graph, "_calls_in_training", look)
    shuffled, kept = INEXACT["dropout layer"], EXACT["x + f"]
    parts = [Residual(kept), Residual(kept), Residual(shuffled), Residual(kept), Residual(shuffled)]
    parts[3].drop = nn.Dropout(0.25)  # The same class with another setting.
    blocks = blocks_of(*parts)
    assert [block.exact for block in blocks] == [True, True, False, True, False]
    assert looked == [parts[0], parts[2], parts[3]]


def test_a_setting_that_differs_between_blocks_of_one_class_is_seen():
    class Dropping(Residual):
        def __init__(self, rate: float) -> None:
            super().__init__(EXACT["x + f"])
            self.rate = rate

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, self.rate, self.training) + self.conv(x)

    assert [block.exact for block in blocks_of(Dropping(0.0), Dropping(0.5), Dropping(0.0))] == [True, False, True]


def test_a_block_that_cannot_train_on_the_batch_is_judged_in_eval_mode():
    def picky(m, x, f):
        if m.training:
            raise ValueError("more samples")
        return x + f

    assert [block.exact for block in blocks_of(Residual(picky), Residual(picky))] == [True, True]


def test_norms_that_need_more_samples_do_not_matter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(Normed() for _ in range(2))))
    before = snapshot(model)
    assert [block.exact for block in find_residual_blocks(model, torch.randn(1, 4))] == [False, False]
    assert snapshot(model) == before


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x) + self.linear(self.norm(x))


def test_the_run_in_training_mode_leaves_no_trace():
    class Cached(Residual):
        def __init__(self) -> None:
            super().__init__(self.cached)
            self._cache: dict[int, torch.Tensor] = {}
            self.steps = 0

        def cached(self, _module, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] not in self._cache:
                self._cache[x.shape[-1]] = torch.ones(x.shape[-1], device=x.device)
            self.steps += 1
            noise = random.random() + np.random.rand() + torch.rand(())
            return x + f * self._cache[x.shape[-1]] * float(noise)

    parts = [Cached(), Cached()]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(*parts))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert len(find_residual_blocks(model, IMAGES)) == 2
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert [(part._cache, part.steps, part.training) for part in parts] == [({}, 0, True)] * 2


# Inference mode


def test_blocks_are_found_in_inference_mode():
    model = build("vit")
    expected = [block.name for block in find_residual_blocks(model)]
    with torch.inference_mode():
        assert [block.name for block in find_residual_blocks(model)] == expected
        batch = {"pixel_values": torch.randn(1, 3, 32, 32)}
        assert [block.name for block in find_residual_blocks(model, batch)] == expected
        report = inspect_model(model)
        assert torch.is_inference_mode_enabled()
    assert report.costs == inspect_model(model).costs
    model(torch.randn(1, 3, 32, 32)).logits.sum().backward()


@pytest.mark.parametrize("part", ["weight", "buffer"])
def test_a_model_that_was_built_in_inference_mode_is_refused(part):
    with torch.inference_mode():
        inside = nn.Conv2d(3, 4, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Residual(EXACT["x + f"])))
    if part == "weight":
        model[0] = inside
    else:
        model[0].register_buffer("weight_of_before", inside.weight.detach())
    with pytest.raises(BlockError, match=r"`0\.weight.* is an inference tensor.*outside `torch\.inference_mode\(\)`"):
        find_residual_blocks(model, IMAGES)


def test_skipping_a_block_that_was_found_in_inference_mode_gives_its_input():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Residual(EXACT["x + f"])))
    with torch.inference_mode():
        blocks = find_residual_blocks(model, torch.randn(2, 3, 4, 4))
    with skip_blocks(blocks):
        assert torch.equal(model(IMAGES), model[0](IMAGES))
