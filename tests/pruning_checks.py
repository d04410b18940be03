"""A pruned model against the one that skips the same blocks."""

import torch

from hf_featreuse import (
    find_residual_blocks,
    skip_blocks,
)


def assert_is_the_skipping_model(model, pruned, drop: list[str], inputs) -> None:
    blocks = [block for block in find_residual_blocks(model, inputs) if block.name in drop]
    assert len(blocks) == len(drop)
    model.eval()
    pruned.eval()
    with torch.no_grad(), skip_blocks(blocks, allow_inexact=True):
        expected = model(**inputs)[0]
    with torch.no_grad():
        assert torch.equal(pruned(**inputs)[0], expected)
