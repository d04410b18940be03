"""Make any random transform a function of (seed, epoch, row), and torchvision's augmentations by name.

The transforms of torchvision, and most others, draw from the global generators of torch, NumPy and Python. To resume a
run exactly, each worker would have to save them, and one draw more or less would change all later ones. Here they are
seeded for each image and restored afterwards.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_featreuse.data.rand_augment import RandAugment
from hf_featreuse.errors import DataError

AUGMENTATIONS = ("auto_augment", "rand_augment", "trivial_augment")
# Second word of the key: crops, RandAugment and Mixup of the same seed use others.
_STREAM = 0x72616E74


class SeededTransform:
    """Apply a random transform to each training image, as a function of only (seed, epoch, row).

    torch's CPU generator, NumPy's global one and Python's are seeded for each image and restored afterwards. It is
    called like [`RandAugment`], so `TrainTransform(size, augment=SeededTransform(...))` applies it last. The overhead
    is about 0.02 ms per image. With workers that are not forked, the transform must be picklable.

    Args:
        transform (`Callable`): from an RGB PIL image to one, or to a uint8 tensor of shape (3, height, width), such as
            `torchvision.transforms.v2.AutoAugment()`; it draws from the global generators on the CPU.
        seed (`int`, defaults to 0): from 0 to 2**64 - 1.

    Raises:
        DataError: `seed` is out of range; when called: the transform returns something else.

    Example:
        >>> import numpy as np, torch
        >>> from PIL import Image
        >>> from hf_featreuse.data import SeededTransform
        >>> def turn(image):
        ...     return image.rotate(360 * torch.rand(()).item())
        >>> images = [Image.radial_gradient("L").convert("RGB").crop((0, 0, 64, 32))] * 2
        >>> first, second = SeededTransform(turn, seed=1)(images, np.array([3, 4]), epoch=0)
        >>> first == second, first == SeededTransform(turn, seed=1)(images[:1], np.array([3]), epoch=0)[0]
        (False, True)
    """

    def __init__(self, transform: Callable[[Image.Image], Any], seed: int = 0):
        if not 0 <= seed < 2**64:
            raise DataError(f"`seed={seed!r}` is not an integer from 0 to 2**64 - 1. Pass one, such as 0.")
        self.transform, self.seed = transform, seed

    def __call__(
        self, images: Sequence[Image.Image], rows: np.ndarray, epoch: int
    ) -> list[Image.Image | torch.Tensor]:
        """Transform RGB images of the given rows of the data set."""
        key, results = np.array([self.seed, _STREAM], np.uint64), []
        with _kept_generators():
            for image, row in zip(images, rows.tolist(), strict=True):
                counter = np.array([0, row, epoch, 0], np.uint64)
                draw = int(np.random.Philox(key=key, counter=counter).random_raw())
                # Not `torch.manual_seed`, which would also seed the generators of other devices.
                torch.default_generator.manual_seed(draw >> 1)
                np.random.seed(draw & 0xFFFFFFFF)
                random.seed(draw)
                results.append(self._checked(self.transform(image)))
        return results

    def _checked(self, result: Any) -> Image.Image | torch.Tensor:
        if isinstance(result, Image.Image) and result.mode == "RGB":
            return result
        if isinstance(result, torch.Tensor) and result.dtype == torch.uint8 and result.ndim == 3 and len(result) == 3:
            # A plain tensor, as torchvision's subclass for images would be kept in the batch.
            return result.as_subclass(torch.Tensor)
        found = type(result).__name__
        if isinstance(result, Image.Image):
            found = f"an image of mode {result.mode}"
        elif isinstance(result, torch.Tensor):
            found = f"a tensor of {result.dtype} and shape {tuple(result.shape)}"
        name = type(self.transform).__name__
        raise DataError(
            f"The transform `{name}` returned {found}, but must return an RGB image or a uint8 tensor of shape "
            "(3, height, width). Leave conversion to floats and normalization to the collator."
        )


@contextlib.contextmanager
def _kept_generators() -> Iterator[None]:
    """Restore the global CPU generators at exit."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def augmentation(name: str | None, seed: int = 0, random_erasing: float = 0.0) -> SeededTransform | RandAugment | None:
    """Create an augmentation by name, that of torchvision if it is installed.

    Args:
        name (`"auto_augment"`, `"rand_augment"` or `"trivial_augment"`, *optional*): by default none. Without
            torchvision `"rand_augment"` is [`RandAugment`].
        seed (`int`, defaults to 0): from 0 to 2**64 - 1.
        random_erasing (`float`, defaults to 0.0): probability of erasing a rectangle of an image, after the rest.

    Returns:
        `SeededTransform` or `RandAugment`: for `TrainTransform(augment=...)`; `None` if there is nothing to do.

    Raises:
        DataError: the name is unknown, a value is out of range, or torchvision is needed and cannot be imported.

    Example:
        >>> from hf_featreuse.data import augmentation
        >>> augmentation(None) is None
        True
    """
    if name is not None and name not in AUGMENTATIONS:
        raise DataError(f"`augmentation={name!r}` is unknown. Pass one of {AUGMENTATIONS}.")
    if isinstance(random_erasing, bool) or not 0 <= random_erasing <= 1:
        raise DataError(f"`random_erasing={random_erasing!r}` is not a probability. Pass a value from 0 to 1.")
    if name is None and not random_erasing:
        return None
    try:
        from torchvision.transforms import v2  # pyright: ignore[reportMissingImports]
    except Exception as error:  # A build that does not fit torch raises `RuntimeError`.
        if name == "rand_augment" and not random_erasing:
            return RandAugment(seed=seed)
        option = f"random_erasing={random_erasing!r}" if random_erasing else f"augmentation={name!r}"
        raise DataError(
            f"`{option}` needs torchvision, which cannot be imported here: {str(error).splitlines()[0]}. Install the "
            'build of torchvision that fits your torch, or pass `augmentation="rand_augment"`, which works without.'
        ) from error
    classes = {
        "auto_augment": v2.AutoAugment,
        "rand_augment": v2.RandAugment,
        "trivial_augment": v2.TrivialAugmentWide,
    }
    steps: list[Any] = [] if name is None else [classes[name]()]
    if random_erasing:
        steps += [v2.PILToTensor(), v2.RandomErasing(random_erasing)]
    return SeededTransform(v2.Compose(steps), seed)
