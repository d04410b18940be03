"""Random crops as a function of (seed, epoch, row); evaluation equal to the image processor."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    LevitImageProcessorPil,
    ViTImageProcessorPil,
)

from hf_featreuse.data.images import ImageCollator
from hf_featreuse.data.transforms import EvalTransform, TrainTransform, default_crop_scale, image_size
from hf_featreuse.errors import DataError


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ramp(height: int, width: int) -> Image.Image:
    """Red holds x, green holds y: a crop without resizing shows where it was taken."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None], np.arange(height)[:, None]
    return Image.fromarray(pixels)


def test_the_numbers_are_numpys_philox_of_seed_epoch_and_row():
    rows = np.array([7, 0, 2**40])
    for seed, epoch in ((0, 0), (5, 3)):
        found = TrainTransform((8, 8), seed=seed)._uniforms(rows, epoch)
        for row, numbers in zip(rows.tolist(), found, strict=True):
            philox = np.random.Philox(key=[seed, 0], counter=[0, row, epoch, 0])
            assert np.array_equal(numbers, np.random.Generator(philox).random(found.shape[1]))


def test_an_image_does_not_depend_on_its_batch():
    images = [noise(20 + i, 31 - i, i) for i in range(6)]
    transform = TrainTransform((16, 12), seed=3)
    together = transform.batch(images, np.arange(10, 16), epoch=2)
    for i, image in enumerate(images):
        assert torch.equal(together[i], transform(image, row=10 + i, epoch=2))
    assert together[0].shape == (3, 16, 12)
    assert together[0].dtype == torch.uint8


@pytest.mark.parametrize("change", [{"row": 1}, {"epoch": 1}, {"seed": 1}])
def test_row_epoch_and_seed_each_change_the_result(change):
    image, base = noise(32, 32), {"row": 0, "epoch": 0, "seed": 0}

    def transformed(row, epoch, seed):
        return TrainTransform((32, 32), seed=seed)(image, row=row, epoch=epoch)

    assert torch.equal(transformed(**base), transformed(**base))
    assert not torch.equal(transformed(**base), transformed(**{**base, **change}))


def test_no_global_generator_is_read_or_moved():
    transform, image = TrainTransform((16, 16)), noise(32, 32)

    def with_globals(seed):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        result = transform(image, row=4)
        assert random.getstate() == before[0]
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert torch.equal(torch.get_rng_state(), before[2])
        return result

    assert torch.equal(with_globals(0), with_globals(1))


def test_crops_lie_inside_and_follow_scale_ratio_and_flip():
    transform = TrainTransform((8, 8), scale=(0.25, 0.5), ratio=(0.5, 2.0), flip=0.3)
    rows = np.arange(4000)
    draws = transform._uniforms(rows, 0)
    boxes = np.array(transform._boxes(draws, np.tile([200, 100], (len(rows), 1))))
    left, top, right, bottom = boxes.T
    assert left.min() == top.min() == 0
    assert right.max() == 200
    assert bottom.max() == 100
    width, height = right - left, bottom - top
    part = width * height / 20000
    assert 0.24 < part.min() < 0.26
    assert 0.49 < part.max() < 0.51
    assert 0.48 < (width / height).min() < 0.52
    assert 1.9 < (width / height).max() < 2.1
    # Flips show in the direction of a ramp.
    flat = TrainTransform((8, 8), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.3)
    results = torch.stack(flat.batch([ramp(8, 8)] * len(rows), rows, 0)).float()
    flipped = (results[:, 0, 0, 0] > results[:, 0, 0, 7]).float().mean().item()
    assert abs(flipped - 0.3) < 0.03


def test_a_full_crop_without_flip_is_the_image():
    image = noise(16, 16)
    result = TrainTransform((16, 16), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)(image)
    assert np.array_equal(result.permute(1, 2, 0).numpy(), np.asarray(image))
    mirrored = TrainTransform((16, 16), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=1.0)(image)
    assert torch.equal(mirrored, result.flip(-1))


@pytest.mark.parametrize(("height", "width", "box"), [(10, 100, (44, 0, 57, 10)), (100, 10, (0, 44, 10, 57))])
def test_an_extreme_image_falls_back_to_the_largest_central_crop(height, width, box):
    transform = TrainTransform((8, 8), scale=(0.9, 1.0))
    assert transform._boxes(transform._uniforms(np.arange(1), 0), np.array([[width, height]])) == [box]


def test_an_image_of_one_pixel_works():
    assert TrainTransform((4, 4))(Image.new("RGB", (1, 1), (7, 8, 9))).unique().tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": (0, 4)}, "size"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(DataError, match=f"^{named}="):
        TrainTransform(**{"size": (4, 4), **options})


def test_default_crop_scale_spares_small_images():
    assert default_crop_scale((128, 200)) == (0.08, 1.0)
    assert default_crop_scale((127, 200)) == (0.6, 1.0)


PROCESSORS = {
    "vit": ViTImageProcessorPil(size={"height": 32, "width": 40}),
    "vit, no resize": ViTImageProcessorPil(do_resize=False),
    "convnext, crop_pct": ConvNextImageProcessorPil(size={"shortest_edge": 56}),
    "convnext, 384": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "deit": DeiTImageProcessorPil(size={"height": 64, "width": 64}, crop_size={"height": 56, "width": 56}),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    "clip, odd crop": CLIPImageProcessorPil(size={"shortest_edge": 57}, crop_size={"height": 32, "width": 45}),
    "clip, crop pads": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 45, "width": 50}),
    "clip, no crop": CLIPImageProcessorPil(size={"shortest_edge": 40}, do_center_crop=False),
    "nearest": ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=0),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_evaluation_equals_the_processor(name):
    processor = PROCESSORS[name]
    transform, collate = EvalTransform(processor), ImageCollator.from_processor(processor)
    assert transform._direct
    for i, (height, width) in enumerate([(50, 70), (71, 41), (57, 57), (20, 90)]):
        image = noise(height, width, i)
        resized = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(transform(image), resized)
        wanted = processor(image, return_tensors="pt")["pixel_values"]
        found = collate([{"pixel_values": transform(image), "labels": 0}])["pixel_values"]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_batches_of_evaluation_equal_single_images():
    transform = EvalTransform(PROCESSORS["clip, no crop"])
    images = [noise(50, 70), noise(70, 50)]
    for image, found in zip(images, transform.batch(images, np.arange(2), 0), strict=True):
        assert torch.equal(found, transform(image))


def test_a_processor_with_rules_of_its_own_is_called_itself_without_a_warning(caplog):
    """Those of torchvision resize by other filters, which their users can do nothing about."""
    processor = LevitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transform = EvalTransform(processor)
    assert not transform._direct
    for seed in range(2):
        image = noise(40, 60, seed)
        wanted = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(transform.batch([image], np.arange(1), 0)[0], wanted)
    assert not caplog.records


@pytest.mark.parametrize(
    "settings",
    [
        {"do_pad": True, "pad_size": {"height": 64, "width": 64}},
        {"size": {"shortest_edge": 32, "longest_edge": 40}},
    ],
)
def test_padding_and_unknown_sizes_are_left_to_the_processor(settings):
    processor = ViTImageProcessorPil(**{"size": {"height": 32, "width": 32}, **settings})
    transform, image = EvalTransform(processor), noise(40, 90)
    assert not transform._direct
    wanted = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(transform(image), wanted)


def test_a_processor_that_returns_no_single_image_is_refused():
    class Twice(ViTImageProcessorPil):
        def _preprocess(self, images, **kwargs):
            output = super()._preprocess(images, **kwargs)
            return type(output)({"pixel_values": [np.stack([image] * 2) for image in output["pixel_values"]]})

    with pytest.raises(DataError, match=r"Twice without rescaling returns uint8 of shape \(2, 3"):
        EvalTransform(Twice())


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (PROCESSORS["vit"], (32, 40)),
        (PROCESSORS["convnext, crop_pct"], (56, 56)),
        (PROCESSORS["deit"], (56, 56)),
        (PROCESSORS["clip, odd crop"], (32, 45)),
        (PROCESSORS["clip, no crop"], (40, 40)),
        (PROCESSORS["vit, no resize"], (224, 224)),
    ],
)
def test_image_size(processor, size):
    assert image_size(processor) == size


def test_image_size_needs_a_size():
    with pytest.raises(DataError, match="neither resizes nor crops"):
        image_size(CLIPImageProcessorPil(do_resize=False, do_center_crop=False))
