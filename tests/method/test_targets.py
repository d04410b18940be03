"""Blocks that are not in a list, and modules that `target_blocks` names although they were not found."""

import pytest
import torch
from tiny_models import build
from torch import nn

from hf_featreuse import (
    BlockError,
    FeatureReuse,
    FeatureReuseSchedule,
    StepKind,
    find_residual_blocks,
    inspect_model,
    skip_blocks,
    train_only,
)

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def names(blocks) -> list[str]:
    return [block.name for block in blocks]


class Block(nn.Module):
    """Like a block of RegNet: the first of a stage has a projection, a ReLU follows the addition."""

    def __init__(self, width: int, out: int, residual: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, padding=1)
        self.project = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.conv(x) + self.project(x) if self.residual else self.conv(x)).relu()


class Stage(nn.Module):
    """Like a stage of timm's RegNet: its blocks are attributes."""

    def __init__(self, width: int, out: int, depth: int, residual: bool = True) -> None:
        super().__init__()
        for index in range(depth):
            self.add_module(f"b{index + 1}", Block(out if index else width, out, residual))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.children():
            x = block(x)
        return x


class Rows(nn.Module):
    """A stem, stages as attributes, a head; the last stage has a single block."""

    def __init__(self, residual: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.s1, self.s2, self.s3 = (Stage(*sizes, residual) for sizes in ((4, 4, 2), (4, 6, 3), (6, 6, 1)))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.s3(self.s2(self.s1(self.stem(x)))).mean((2, 3)))


# Rows that are not lists


def test_blocks_that_are_attributes_of_a_stage_are_found():
    blocks = find_residual_blocks(Rows(), IMAGES)
    assert names(blocks) == ["s1.b1", "s1.b2", "s2.b2", "s2.b3", "s3.b1"]
    assert all(block.exact and block.activation == "Relu" for block in blocks)


def test_dropping_all_of_them_leaves_the_rest():
    model = Rows()
    with skip_blocks(find_residual_blocks(model, IMAGES)):
        logits = model(IMAGES)
    assert torch.equal(logits, model.head(model.s2.b1(model.stem(IMAGES)).mean((2, 3))))


def test_a_row_without_shortcuts_is_refused():
    with pytest.raises(BlockError, match="Rows has no residual block"):
        find_residual_blocks(Rows(residual=False), IMAGES)


def test_a_plain_stack_of_convolutions_is_refused():
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True))]
    with pytest.raises(BlockError, match="has no residual block"):
        find_residual_blocks(nn.Sequential(nn.Sequential(*layers), nn.Conv2d(3, 2, 8)), IMAGES)


def test_rows_do_not_count_if_there_are_lists():
    class Both(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(Block(3, 4), Block(4, 4))

    assert names(find_residual_blocks(Both(), IMAGES)) == ["stem.1"]


class Minus(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.linear(x)
        if self.kind == "x - branch":
            return x - branch
        if self.kind == "x + 2 branch":
            return torch.add(x, branch, alpha=2)
        return branch - x if self.kind == "branch - x" else torch.add(branch, x, alpha=2)


@pytest.mark.parametrize(
    ("kind", "found"), [("x - branch", 2), ("x + 2 branch", 2), ("branch - x", 0), ("branch + 2 x", 0)]
)
def test_only_an_input_with_factor_one_is_a_shortcut(kind, found):
    model = nn.Sequential(Minus(kind), Minus(kind), nn.Linear(4, 2))
    if found:
        assert len(find_residual_blocks(model, ROWS)) == found
    else:
        with pytest.raises(BlockError, match="has no residual block"):
            find_residual_blocks(model, ROWS)


# Streams


class ClassAttention(nn.Module):
    """Like CaiT: patches first, the class token, which is the stream, second."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, patches: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return token + self.linear(torch.cat([token, patches], 1)).mean(1, keepdim=True)


class Cait(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.token = nn.Linear(4, 4), nn.Parameter(torch.ones(1, 1, 4))
        self.body = nn.ModuleList([ClassAttention(), ClassAttention()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # One patch, so that both arguments have the same shape.
        patches, token = self.stem(x)[:, None], self.token.expand(len(x), -1, -1)
        for block in self.body:
            token = block(patches, token)
        return token[:, 0]


def test_stream_at_the_second_argument():
    model = Cait()
    blocks = find_residual_blocks(model, ROWS)
    assert [(block.name, block.position) for block in blocks] == [("body.0", 1), ("body.1", 1)]
    with skip_blocks(blocks):
        assert torch.equal(model(ROWS), model.token[0].expand(2, -1))


class TwoStreams(nn.Module):
    """Like TNT and MViT: a second stream, and the size of the grid, are passed on."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.first, self.second, self.hidden = nn.Linear(4, 4), nn.Linear(4, 3), hidden

    def forward(self, x: torch.Tensor, y: torch.Tensor, size: list[int]):
        kept = torch.cat([y[:, :1], y[:, 1:]], 1) if self.hidden else y
        return x + self.first(x), kept + self.second(x), size, None


class Two(nn.Module):
    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(4, 3), nn.ModuleList(TwoStreams(hidden) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, size = self.stem(x), [2, 2]
        for block in self.body:
            x, y, size, _ = block(x, y, size)
        return torch.cat([x, y], 1) * size[0]


@pytest.mark.parametrize("hidden", [False, True])
def test_second_streams_are_passed_on(hidden):
    model = Two(hidden)
    blocks = find_residual_blocks(model, ROWS)
    assert [(block.name, block.passed_on) for block in blocks] == [(f"body.{i}", (1, 2, None)) for i in range(2)]
    # After a concatenation the graph does not show that the second stream is kept.
    assert [block.exact for block in blocks] == [not hidden] * 2
    with skip_blocks(blocks, allow_inexact=hidden):
        assert torch.equal(model(ROWS), torch.cat([ROWS, model.stem(ROWS)], 1) * 2)


# Modules that are named


class Scaled(nn.Module):
    """Like CAFormer: the shortcut has a scale that trains. In the second form it is plain."""

    def __init__(self, scaled: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 0.5))
        self.norm, self.branch, self.widen = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 8)
        self.scaled, self.unused = scaled, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.branch(self.norm(x)) + 0 * self.widen(x).mean()
        return (self.scale * x if self.scaled else x) + self.scale * branch


class Sum(nn.Module):
    """Takes two tensors of the shape of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.linear(x * y)


class Named(nn.Module):
    """A network whose blocks are not in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.early, self.middle = nn.Linear(4, 4), Scaled(), Scaled(scaled=False)
        self.late, self.sum, self.body_norm, self.head = Scaled(), Sum(), nn.Identity(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.early(self.stem(x)))
        return self.head(self.body_norm(self.sum(self.late(x), x)))


@pytest.mark.parametrize("target", [["late", "middle", "early"], r"early|middle|late"])
def test_named_modules_become_blocks_in_forward_order(target):
    blocks = find_residual_blocks(Named(), ROWS, target)
    assert [(block.name, block.exact) for block in blocks] == [("early", False), ("middle", True), ("late", False)]
    assert {(block.position, block.keyword, block.activation, block.num_outputs) for block in blocks} == {
        (0, None, None, None)
    }


def test_without_a_target_nothing_is_found():
    with pytest.raises(BlockError, match="name its blocks in `target_blocks`"):
        find_residual_blocks(Named(), ROWS)


def test_the_user_must_confirm_twice():
    model = Named()
    blocks = find_residual_blocks(model, ROWS, ["early", "middle"])
    schedule = FeatureReuseSchedule(2, drop_rate=0.5, drop_rate_schedule="uniform", seed=0)
    with pytest.raises(
        BlockError, match=r"Block early .*does not show all that it returns.*`allow_inexact_skip=True`"
    ):
        FeatureReuse(model, blocks, schedule)
    reuse = FeatureReuse(model, blocks, schedule, allow_inexact_skip=True, train_trunk=False)
    kinds = set()
    for step in range(8):
        with reuse.step(step) as plan:
            model(ROWS).square().sum().backward()
        kinds.add(plan.kind)
        dropped = {blocks[index].name for index in plan.dropped}
        for name, parameter in model.named_parameters():
            inside = name.split(".")[0] in dropped
            trains = {StepKind.STOCHASTIC_DEPTH: not inside, StepKind.MASKED_FREEZE: inside}.get(plan.kind, True)
            assert (parameter.grad is not None) == (trains and "unused" not in name), (step, name)
        model.zero_grad(set_to_none=True)
    assert kinds >= {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE}


def test_a_named_block_that_is_dropped_gives_its_input():
    model = Named()
    blocks = find_residual_blocks(model, ROWS, ["early"])
    with skip_blocks(blocks, allow_inexact=True):
        x = model.middle(model.stem(ROWS))
        assert torch.equal(model(ROWS), model.head(model.sum(model.late(x), x)))
    with train_only(model, blocks):
        model(ROWS).sum().backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"early"}


def test_inspection_reports_named_blocks():
    report = inspect_model(Named(), inputs=ROWS, target_blocks=["early", "middle"])
    assert [(block.name, block.exact) for block in report.blocks] == [("early", False), ("middle", True)]
    assert any("1 of 2 blocks cannot be skipped exactly: the graph" in note for note in report.notes)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (["erly"], ["`target_blocks='erly'` matches no residual block of Named.", "None is found by structure"]),
        (["early", "mid"], ["`target_blocks='mid'`"]),
        (r"stages\..*", [r"`target_blocks='stages\\..*'` matches"]),
        (["early.widen"], ["early.widen (Linear), which returns torch.float32 of shape (2, 8)", "shapes [(2, 4)]"]),
        (["early.unused"], ["early.unused (Linear), which has no parameters or is not called in the forward"]),
        (["body_norm"], ["body_norm (Identity), which has no parameters or is not called"]),
        (["sum"], ["sum (Sum), which takes 2 inputs of the shape of its output (arguments 0, 1)"]),
        (r"late.*", ["late (Scaled), which contains late.branch: name that one"]),
        (["late", "late.branch"], ["names late and late.branch, which is a part of it. Name one of the two."]),
    ],
)
def test_what_cannot_be_a_block_is_refused_with_the_reason(target, words):
    with pytest.raises(BlockError) as caught:
        find_residual_blocks(Named(), ROWS, target)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_module_that_differs_from_call_to_call_is_refused():
    class Differs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sum, self.linear = Sum(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.sum(self.sum(self.linear(x), torch.ones(4)), y=torch.ones(4)) + self.sum(
                torch.ones(4), self.linear(x)
            )

    with pytest.raises(BlockError, match="takes its stream from a different argument in each call"):
        find_residual_blocks(Differs(), ROWS, ["sum"])


# Next to blocks that were found


def test_a_named_module_joins_blocks_that_were_found():
    model = build("vit")
    blocks = find_residual_blocks(model, target_blocks=["layers.2", "layers.0.mlp", "vit.layernorm"])
    assert [(block.name, block.exact) for block in blocks] == [
        ("vit.layers.0.mlp", False),
        ("vit.layers.2", True),
        ("vit.layernorm", False),
    ]


@pytest.mark.parametrize("target", ["vit", "vit.layers", r"vit\.layers"])
def test_a_module_that_contains_found_blocks_is_refused(target):
    with pytest.raises(BlockError, match=r"contains vit\.layers\.0: name that one\. Candidates: vit\.layers\.0,"):
        find_residual_blocks(build("vit"), target_blocks=target if "\\" in target else [target])


def test_an_entry_that_matches_found_blocks_selects_no_other_module():
    blocks = find_residual_blocks(build("vit"), target_blocks=r"vit\.layers\.0.*")
    assert names(blocks) == ["vit.layers.0"]
