"""RandAugment: known answers of each operation, and draws that follow from (seed, epoch, row) alone."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from hf_featreuse import DataError
from hf_featreuse.data import RandAugment, TrainTransform, to_tensors
from hf_featreuse.data.rand_augment import OPERATIONS, apply_operation


def noise(size=(12, 8), seed=0):
    """A small RGB image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("autocontrast", "equalize")])
def test_an_operation_of_no_strength_changes_nothing(name):
    image = noise()
    # Solarize at level 0 inverts from 256 on, which no pixel reaches.
    assert np.array_equal(pixels(apply_operation(image, name, 0.0)), pixels(image))


def test_known_answers():
    image = noise()
    values = pixels(image)
    assert np.array_equal(pixels(apply_operation(image, "posterize", 4.0)), values & 0xF0)
    assert np.array_equal(pixels(apply_operation(image, "solarize", 1.0)), 255 - values)
    assert np.array_equal(
        pixels(apply_operation(image, "solarize", 0.5)), np.where(values < 128, values, 255 - values)
    )
    assert np.array_equal(pixels(apply_operation(image, "brightness", -1.0)), np.zeros_like(values))
    moved = pixels(apply_operation(image, "translate_x", 0.25))
    assert np.array_equal(moved[:, :9], values[:, 3:])
    assert (moved[:, 9:] == 128).all()
    moved = pixels(apply_operation(image, "translate_y", -0.25))
    assert np.array_equal(moved[2:], values[:6])
    turned = pixels(apply_operation(noise((9, 9)), "rotate", 90.0))
    assert np.array_equal(turned, np.rot90(pixels(noise((9, 9)))))
    gray = pixels(apply_operation(image, "color", -1.0))
    assert (gray[..., 0] == gray[..., 1]).all()


def test_a_sheared_image_keeps_its_center():
    image = Image.new("RGB", (11, 11))
    image.putpixel((5, 5), (255, 255, 255))
    for name in ("shear_x", "shear_y"):
        sheared = pixels(apply_operation(image, name, 0.3))[..., 0]
        assert sheared[5, 5] > 128
    bar = Image.new("RGB", (11, 11))
    bar.paste((255, 255, 255), (5, 0, 6, 11))
    # Row y of the result is row y of the image, moved left by 0.4 times its distance below the center.
    top, *_, bottom = pixels(apply_operation(bar, "shear_x", 0.4))[..., 0].argmax(1).tolist()
    assert (top, bottom) == (7, 3)


def test_all_operations_come_evenly_with_both_signs_and_the_magnitude_asked_for():
    drawn = [pair for row in range(2000) for pair in RandAugment(2, 15).draw(row, 0)]
    names = Counter(name for name, _ in drawn)
    assert set(names) == set(OPERATIONS)
    assert max(names.values()) < 1.25 * min(names.values())
    assert {level for name, level in drawn if name == "rotate"} == {-15.0, 15.0}
    assert {level for name, level in drawn if name == "posterize"} == {2.0}


def test_draws_follow_from_seed_epoch_and_row_alone():
    images, rows = [noise(seed=seed) for seed in range(6)], np.arange(10, 16)
    state = np.random.get_state()[1].copy()
    first = [pixels(image) for image in RandAugment(2, 20, seed=1)(images, rows, 3)]
    # One by one, and in another order.
    for index in (4, 0, 2):
        [again] = RandAugment(2, 20, seed=1)([images[index]], rows[[index]], 3)
        assert np.array_equal(pixels(again), first[index])
    plans = {(seed, epoch): str(RandAugment(2, 20, seed=seed).draw(10, epoch)) for seed in (1, 2) for epoch in (3, 4)}
    assert len(set(plans.values())) == 4
    assert np.array_equal(np.random.get_state()[1], state)


def test_it_leaves_crops_and_flips_as_they_were():
    image, rows = noise((40, 30)), np.array([7])
    plain = TrainTransform((16, 16), seed=5)
    augmented = TrainTransform((16, 16), seed=5, augment=RandAugment(2, 9, seed=5))
    cropped = Image.fromarray(plain(image, 7, 2).permute(1, 2, 0).numpy())
    expected = to_tensors(RandAugment(2, 9, seed=5)([cropped], rows, 2))[0]
    assert torch.equal(augmented(image, 7, 2), expected)
    changed = [not torch.equal(augmented(image, row, 2), plain(image, row, 2)) for row in range(20)]
    assert sum(changed) > 10


@pytest.mark.parametrize("options", [{"num_ops": 0}, {"magnitude": 31}, {"magnitude": -1}, {"seed": -1}])
def test_bad_arguments_are_named(options):
    (name,) = options
    with pytest.raises(DataError, match=f"{name}="):
        RandAugment(**options)
