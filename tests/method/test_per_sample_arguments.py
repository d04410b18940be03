"""What a block takes and returns besides its stream, when the samples of a batch are taken apart."""

import numpy as np
import pytest
import torch
from sample_checks import assert_same_gradients, gradients, sample_schedule
from scaling_reference import drop_path_around
from test_per_sample import CPU, random_masks
from tiny_models import build
from torch import nn

from hf_featreuse import BlockError, FeatureReuse, find_residual_blocks
from hf_featreuse.method.per_sample import skip_samples


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
    with drop_path_around(blocks, masks, [1.0] * 3):
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
