"""Any random transform as a function of (seed, epoch, row): equal in any order, in workers and on resume."""

import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_featreuse.data import (
    ImageCollator,
    RandAugment,
    SeededTransform,
    TrainTransform,
    augmentation,
    load_image_data,
)
from hf_featreuse.data.seeded import AUGMENTATIONS
from hf_featreuse.errors import DataError


class Shaken:
    """Stands in for a transform of torchvision: draws from all three global generators, any number of times."""

    def __call__(self, image):
        pixels = np.asarray(image).astype(np.int64)
        pixels = np.roll(pixels, int(torch.randint(8, ())), 0) + np.random.randint(0, 40) + random.randrange(40)
        while torch.rand(()) < 0.5:
            pixels = pixels[::-1]
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class Erased(Shaken):
    """The same, to a tensor."""

    def __call__(self, image):
        return torch.from_numpy(np.asarray(super().__call__(image)).copy()).permute(2, 0, 1)


IMAGES = [Image.fromarray(np.random.default_rng(i).integers(0, 200, (8, 8, 3), np.uint8)) for i in range(6)]
ROWS = np.arange(10, 16)


def pixels(images):
    return [np.asarray(image).tolist() for image in images]


def test_an_image_depends_on_seed_epoch_and_row_alone():
    transform = SeededTransform(Shaken(), seed=1)
    whole = pixels(transform(IMAGES, ROWS, 3))
    for i in (4, 0, 2):
        assert pixels(transform([IMAGES[i]], ROWS[[i]], 3)) == [whole[i]]
    same = [IMAGES[0]] * 6
    drawn = pixels(transform(same, ROWS, 3))
    assert len({str(image) for image in drawn}) == 6, "rows"
    assert pixels(transform(same, ROWS, 4)) != drawn, "epochs"
    assert pixels(SeededTransform(Shaken(), seed=2)(same, ROWS, 3)) != drawn, "seeds"


def states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_global_generators_stay_where_they_are_also_after_an_error():
    before = states()
    SeededTransform(Shaken())(IMAGES, ROWS, 0)
    assert states() == before

    def fails(image):
        torch.rand(3)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        SeededTransform(fails)(IMAGES, ROWS, 0)
    assert states() == before


@pytest.mark.parametrize("transform", [Shaken(), Erased()])
def test_workers_give_the_same_images(transform):
    seeded = pickle.loads(pickle.dumps(SeededTransform(transform, seed=4)))
    split = load_image_data(max_train_samples=20).splits["train"].with_transform(
        TrainTransform((8, 8), seed=3, augment=seeded)
    )  # fmt: skip
    split.set_epoch(2)
    batches = []
    for workers in (0, 2):
        collate = ImageCollator((0, 0, 0), (1, 1, 1))
        options = {"multiprocessing_context": "spawn"} if workers else {}
        loader = DataLoader(split, batch_size=5, collate_fn=collate, num_workers=workers, **options)
        torch.rand(workers + 1)  # Wherever the global generator is.
        batches.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert torch.equal(*batches)
    split.set_epoch(3)
    assert not torch.equal(torch.stack([split[i]["pixel_values"] for i in range(20)]).float() / 255, batches[0])


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (lambda image: image.convert("L"), "returned an image of mode L"),
        (lambda image: torch.zeros(3, 8, 8), r"returned a tensor of torch\.float32"),
        (lambda image: torch.zeros(8, 8, dtype=torch.uint8), r"returned a tensor of torch\.uint8 and shape \(8, 8\)"),
        (lambda image: None, "returned NoneType"),
    ],
)
def test_other_results_are_refused(result, match):
    with pytest.raises(DataError, match=match):
        SeededTransform(result)(IMAGES, ROWS, 0)


# By name


def test_without_torchvision_it_is_named_and_rand_augment_is_ours(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    assert isinstance(augmentation("rand_augment", seed=3), RandAugment)
    with pytest.raises(DataError, match="`augmentation='trivial_augment'` needs torchvision"):
        augmentation("trivial_augment")
    with pytest.raises(DataError, match=r"`random_erasing=0\.25` needs torchvision"):
        augmentation("rand_augment", random_erasing=0.25)


def test_with_torchvision_the_steps_are_its_own(monkeypatch):
    """Of a stand-in with its names; the real library is tested where it is installed."""

    class Compose:
        def __init__(self, steps):
            self.steps = steps

        def __call__(self, image):
            for step in self.steps:
                image = step(image)
            return image

    made = []

    def erasing(probability):
        made.append(probability)
        return lambda tensor: tensor * 0

    v2 = types.SimpleNamespace(
        AutoAugment=Shaken, RandAugment=Shaken, TrivialAugmentWide=Shaken, Compose=Compose, RandomErasing=erasing,
        PILToTensor=lambda: lambda image: torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1),
    )  # fmt: skip
    package = types.ModuleType("torchvision.transforms")
    package.v2 = v2
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", package)
    transform = augmentation("trivial_augment", seed=1)
    assert pixels(transform(IMAGES, ROWS, 0)) == pixels(SeededTransform(Shaken(), seed=1)(IMAGES, ROWS, 0))
    erased = augmentation("auto_augment", seed=1, random_erasing=0.25)
    assert made == [0.25]
    assert torch.stack(erased(IMAGES, ROWS, 0)).sum() == 0
    assert augmentation(None, random_erasing=0.1).transform.steps


@pytest.mark.parametrize(("options", "match"), [
    ({"name": "mixup"}, "`augmentation='mixup'` is unknown"),
    ({"name": None, "random_erasing": 1.5}, r"`random_erasing=1\.5`"),
])  # fmt: skip
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(DataError, match=match):
        augmentation(**options)
    with pytest.raises(DataError, match="`seed=-1`"):
        SeededTransform(Shaken(), seed=-1)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("erasing", [0.0, 1.0])
def test_the_real_transforms_of_torchvision(name, erasing):
    """In the CI job that has a torchvision for its torch."""
    try:
        from torchvision.transforms import v2  # noqa: F401
    except Exception as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    transform = pickle.loads(pickle.dumps(augmentation(name, seed=1, random_erasing=erasing)))
    before = states()
    whole = [np.asarray(image) for image in transform(IMAGES, ROWS, 0)]
    assert np.array_equal(np.asarray(transform(IMAGES[3:4], ROWS[3:4], 0)[0]), whole[3])
    assert states() == before
    assert any(
        not np.array_equal(image.reshape(-1), np.asarray(IMAGES[i]).reshape(-1)) for i, image in enumerate(whole)
    )
