"""Mixup and CutMix: known mixtures, the loss against soft labels, and draws that follow from seed and step alone."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from hf_featreuse import BatchMixer, ConfigurationError, mix_losses
from hf_featreuse.recipe.mixing import classification_loss


def images(count: int = 4, size: int = 16) -> torch.Tensor:
    """Image i is i everywhere."""
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, 3, size, size).clone()


def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator), torch.randint(5, (6,), generator=generator)


def test_mixup_is_the_weighted_mean_with_the_image_before():
    data = images()
    mixed, share = BatchMixer(mixup_alpha=1.0, seed=3)(data, 0)
    assert 0.01 < share < 0.99
    expected = [share * own + (1 - share) * other for own, other in zip((0, 1, 2, 3), (3, 0, 1, 2), strict=True)]
    torch.testing.assert_close(mixed[:, 0, 0, 0], torch.tensor(expected))
    assert torch.equal(mixed, mixed[:, :1, :1, :1].expand_as(mixed))
    assert torch.equal(data, images())


def test_cutmix_pastes_one_rectangle_whose_area_is_the_partners_share():
    seen = set()
    for step in range(60):
        mixed, share = BatchMixer(cutmix_alpha=1.0)(images(), step)
        pasted = mixed[1, 0] == 0
        assert set(mixed[1].unique().tolist()) <= {0.0, 1.0}
        assert share == pytest.approx(1 - pasted.float().mean().item())
        if pasted.any():
            rows, columns = pasted.any(1).nonzero(), pasted.any(0).nonzero()
            box = pasted[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.all()
            seen.add((bool(rows.min() == 0), bool(rows.max() == 15)))
    assert len(seen) >= 3, "rectangles touch the edges at times"


def test_rectangles_have_the_area_that_was_drawn_where_they_do_not_stick_out():
    # Away from the edges the area is 1 - lambda: with alpha large, lambda is a half.
    shares = [BatchMixer(cutmix_alpha=1e6, seed=1)(images(2, 64), step)[1] for step in range(200)]
    assert min(shares) == pytest.approx(0.5, abs=0.03)
    assert max(shares) < 0.9


def test_shares_of_mixup_are_distributed_as_beta():
    shares = np.array([BatchMixer(mixup_alpha=0.4)(images(2, 1), step)[1] for step in range(3000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.05)


def test_with_both_each_batch_takes_either_evenly():
    mixed = [BatchMixer(0.8, 1.0)(images(), step)[0][1] for step in range(400)]
    cut = [bool(((image == 0) | (image == 1)).all()) for image in mixed]
    assert 160 < sum(cut) < 240


def test_draws_follow_from_seed_step_and_position_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    mixer = BatchMixer(0.8, 1.0, seed=7)
    first = [mixer(images(), step, position) for step in range(3) for position in range(2)]
    again = [BatchMixer(0.8, 1.0, seed=7)(images(), step, position) for step in range(3) for position in range(2)]
    assert all(torch.equal(a, b) and x == y for (a, x), (b, y) in zip(first, again, strict=True))
    assert len({share for _, share in first}) == 6
    assert BatchMixer(0.8, 1.0, seed=8)(images(), 0)[1] != first[0][1]
    assert torch.equal(before, torch.get_rng_state())


def test_the_share_of_a_micro_batch_is_pinned_by_seed_step_and_position():
    # Step and position are not interchangeable: a swap would change the draws of every run that is resumed.
    counter = np.array([0, 1, 2, 0], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=np.array([7, 0x6D6978], np.uint64), counter=counter))
    generator.random()
    assert BatchMixer(0.8, seed=7)(images(), global_step=2, position=1)[1] == generator.beta(0.8, 0.8)


def test_off_gives_the_batch_itself():
    data = images()
    mixed, share = BatchMixer()(data, 0)
    assert mixed is data
    assert share == 1


def test_a_share_of_one_is_bit_identical_to_cross_entropy():
    logits, labels = logits_and_labels()
    assert torch.equal(
        mix_losses(lambda labels: cross_entropy(logits, labels), labels, 1.0), cross_entropy(logits, labels)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_loss_is_cross_entropy_against_soft_labels(share, smoothing):
    logits, labels = logits_and_labels()
    soft = share * one_hot(labels, 5) + (1 - share) * one_hot(labels.roll(1), 5)
    expected = cross_entropy(logits, soft.float(), label_smoothing=smoothing)
    found = mix_losses(lambda labels: classification_loss(logits, labels, None, smoothing), labels, share)
    torch.testing.assert_close(found, expected)
    summed = mix_losses(lambda labels: classification_loss(logits, labels, 12, smoothing), labels, share)
    torch.testing.assert_close(summed, expected * 6 / 12)


def test_gradients_are_those_of_soft_labels():
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    soft = 0.3 * one_hot(labels, 5) + 0.7 * one_hot(labels.roll(1), 5)
    (expected,) = torch.autograd.grad(cross_entropy(logits, soft.float()), logits)
    (found,) = torch.autograd.grad(mix_losses(lambda y: classification_loss(logits, y), labels, 0.3), logits)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["mixup_alpha", "cutmix_alpha"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "0.8"])
def test_a_bad_alpha_is_named(name, value):
    with pytest.raises(ConfigurationError, match=f"`{name}="):
        BatchMixer(**{name: value})
