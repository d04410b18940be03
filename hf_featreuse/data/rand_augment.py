"""RandAugment with Pillow, as a function of (seed, epoch, row).

This package has its own implementation because those of timm and torchvision need torchvision, and draw from global
generators, whose states a resumed run could not restore in each worker.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Resampling, Transform

from hf_featreuse.errors import DataError

MAX_MAGNITUDE = 30
# Second word of the key: crops and flips of the same seed use another.
_STREAM = 0x72616E64
_GRAY = (128, 128, 128)


def _shear_x(image: Image.Image, level: float) -> Image.Image:
    # About the center, so that the content stays in place.
    return _affine(image, (1, level, -level * image.height / 2, 0, 1, 0))


def _shear_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1, 0, 0, level, 1, -level * image.width / 2))


def _translate_x(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1, 0, level * image.width, 0, 1, 0))


def _translate_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, level * image.height))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Transform.AFFINE, matrix, Resampling.BILINEAR, fillcolor=_GRAY)


def _rotate(image: Image.Image, level: float) -> Image.Image:
    return image.rotate(level, Resampling.BILINEAR, fillcolor=_GRAY)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, level: kind(image).enhance(1 + level)


# Name: (operation, its level at the greatest magnitude, whether the sign is drawn).
_OPERATIONS: dict[str, tuple[Callable[[Image.Image, float], Image.Image], float, bool]] = {
    "identity": (lambda image, level: image, 0.0, False),
    "shear_x": (_shear_x, 0.3, True),
    "shear_y": (_shear_y, 0.3, True),
    "translate_x": (_translate_x, 150 / 331, True),
    "translate_y": (_translate_y, 150 / 331, True),
    "rotate": (_rotate, 30.0, True),
    "brightness": (_enhance(ImageEnhance.Brightness), 0.9, True),
    "color": (_enhance(ImageEnhance.Color), 0.9, True),
    "contrast": (_enhance(ImageEnhance.Contrast), 0.9, True),
    "sharpness": (_enhance(ImageEnhance.Sharpness), 0.9, True),
    "posterize": (lambda image, level: ImageOps.posterize(image, 8 - round(level)), 4.0, False),
    "solarize": (lambda image, level: ImageOps.solarize(image, round(256 * (1 - level))), 1.0, False),
    "autocontrast": (lambda image, level: ImageOps.autocontrast(image), 0.0, False),
    "equalize": (lambda image, level: ImageOps.equalize(image), 0.0, False),
}
OPERATIONS = tuple(_OPERATIONS)


class RandAugment:
    """Apply a few operations, drawn from fourteen, to each training image, all at one magnitude.

    Args:
        num_ops (`int`, defaults to 2): operations per image, at least 1.
        magnitude (`int`, defaults to 9): strength, from 0 to 30.
        seed (`int`, defaults to 0): from 0 to 2**64 - 1.

    Raises:
        DataError: an argument is out of range.

    Source: Cubuk et al. 2019 (arXiv 1909.13719); the operations and their greatest levels are those of torchvision.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from hf_featreuse.data import RandAugment
        >>> image = Image.radial_gradient("L").convert("RGB")
        >>> [augmented] = RandAugment(seed=1)([image], np.array([3]), epoch=0)
        >>> augmented.size
        (256, 256)
    """

    def __init__(self, num_ops: int = 2, magnitude: int = 9, seed: int = 0):
        if num_ops < 1:
            raise DataError(f"num_ops={num_ops!r} must be at least 1; leave RandAugment out for none.")
        if not 0 <= magnitude <= MAX_MAGNITUDE:
            raise DataError(f"magnitude={magnitude!r} must be from 0 to {MAX_MAGNITUDE}.")
        if not 0 <= seed < 2**64:
            raise DataError(f"seed={seed!r} must be an integer from 0 to 2**64 - 1.")
        self.num_ops, self.magnitude, self.seed = num_ops, magnitude, seed

    def __call__(self, images: Sequence[Image.Image], rows: np.ndarray, epoch: int) -> list[Image.Image]:
        """Augment RGB images of the given rows of the data set."""
        return [self._augment(image, row, epoch) for image, row in zip(images, rows.tolist(), strict=True)]

    def draw(self, row: int, epoch: int) -> list[tuple[str, float]]:
        """Return the operations of an image, by name, with their levels."""
        counter = np.array([0, row, epoch, 0], np.uint64)
        words = np.random.Philox(key=np.array([self.seed, _STREAM], np.uint64), counter=counter)
        chosen = words.random_raw(2 * self.num_ops)
        drawn = []
        for which, sign in zip(chosen[::2], chosen[1::2], strict=True):
            name = OPERATIONS[int(which) % len(OPERATIONS)]
            _, greatest, signed = _OPERATIONS[name]
            level = greatest * self.magnitude / MAX_MAGNITUDE
            drawn.append((name, -level if signed and int(sign) >> 63 else level))
        return drawn

    def _augment(self, image: Image.Image, row: int, epoch: int) -> Image.Image:
        for name, level in self.draw(row, epoch):
            image = apply_operation(image, name, level)
        return image


def apply_operation(image: Image.Image, name: str, level: float) -> Image.Image:
    """Apply one operation to an RGB image.

    Args:
        image (`PIL.Image.Image`): of mode `RGB`.
        name (`str`): one of `OPERATIONS`.
        level (`float`): degrees for `rotate`, bits removed for `posterize`, a fraction for all others.
    """
    return _OPERATIONS[name][0](image, level)
