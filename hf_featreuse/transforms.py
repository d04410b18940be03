"""From image files to batches: decode, augment or resize in uint8, normalise a whole batch at once.

The work per image stays in 8-bit Pillow; floats appear only in [`ImageCollator`]. Augmentation is a function of
(seed, epoch, row) through a counter-based generator, so workers, resume and other users of randomness cannot move it.
torchvision is never needed.
"""

import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Resampling
from transformers import BaseImageProcessor

from .errors import DataError

logger = logging.getLogger(__name__)

_ATTEMPTS = 10  # tries to fit a crop before the central one is taken, as in torchvision
_DRAWS = 2 * _ATTEMPTS + 4  # per image: areas, aspect ratios, top, left, flip, one unused; whole Philox blocks of 4


def decode_image(source: Mapping[str, Any]) -> Image.Image:
    """Decode one image completely, upright and in RGB.

    The EXIF orientation is applied. 16-bit grey is scaled to 8 bits, not clipped. Transparency is dropped, as Hugging
    Face pipelines do at inference.

    Args:
        source: What a `datasets.Image(decode=False)` column holds: `{"bytes": bytes | None, "path": str | None}`.
            The bytes win; without them the file at the path is read.

    Returns:
        A PIL image of mode `RGB`.

    Raises:
        Exception: Whatever Pillow raises for a missing, corrupt, truncated or oversized file;
            [`ImageSplit`][hf_featreuse.data.ImageSplit] turns it into a `BadImageError` that names the image.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from hf_featreuse.transforms import decode_image
        >>> file = io.BytesIO()
        >>> Image.new("L", (4, 3), 7).save(file, "PNG")
        >>> image = decode_image({"bytes": file.getvalue(), "path": None})
        >>> image.mode, image.size, image.getpixel((0, 0))
        ('RGB', (4, 3), (7, 7, 7))
    """
    data, path = source["bytes"], source["path"]
    if data is None and path is None:
        raise ValueError("the row holds no image")
    with Image.open(path if data is None else io.BytesIO(data)) as image:
        image.load()
        # Reading EXIF costs as much as decoding a small PNG; only TIFF keeps orientation outside `info`.
        if image.format == "TIFF" or any(key in image.info for key in ("exif", "xmp", "Raw profile type exif")):
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of fixed range to RGB; wide integers are taken as 16 bits."""
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.float64)  # astype: `I;16B` is not in native byte order
        return Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range to convert from")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise Pillow warns
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Turn an RGB image into a uint8 tensor of shape (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ImageTransform:
    """Base of the transforms: an RGB image in, a uint8 tensor of shape (3, height, width) out.

    A subclass defines `__call__`; it may define `batch` where a whole batch can be done faster.
    """

    def __call__(self, image: Image.Image, row: int = 0, epoch: int = 0) -> torch.Tensor:
        """Transform one RGB image; `row` (its number in the data set) and `epoch` are for random transforms."""
        raise NotImplementedError

    def batch(self, images: Sequence[Image.Image], rows: np.ndarray, epoch: int) -> list[torch.Tensor]:
        """Transform images of the given rows; equal to calling the transform on each."""
        return [self(image, row, epoch) for image, row in zip(images, rows.tolist(), strict=True)]


def default_crop_scale(size: tuple[int, int]) -> tuple[float, float]:
    """Choose how much of an image a random crop keeps.

    A choice of this package: crops down to 8 % of the area, common for ImageNet, leave about 9 x 9 pixels of a 32 x 32
    image, so small images keep at least 60 %.

    Args:
        size: Height and width of the training images, in pixels.

    Returns:
        Smallest and largest fraction of the area: `(0.08, 1.0)` if the shorter edge has 128 pixels or more, else
        `(0.6, 1.0)`.

    Example:
        >>> from hf_featreuse.transforms import default_crop_scale
        >>> default_crop_scale((224, 224)), default_crop_scale((32, 32))
        ((0.08, 1.0), (0.6, 1.0))
    """
    return (0.08, 1.0) if min(size) >= 128 else (0.6, 1.0)


class TrainTransform(ImageTransform):
    """Crop a random part of an image, resize it and flip it at random, as a function of (seed, epoch, row) alone.

    The random numbers of an image come from NumPy's counter-based Philox, keyed by the seed, its counter set to
    (row, epoch). No global generator is read or moved.

    Args:
        size: Height and width of the result, in pixels.
        scale: Smallest and largest part of the area to keep, both in (0, 1]. Default `(0.08, 1.0)`.
        ratio: Smallest and largest width / height of the part, drawn log-uniformly. Default `(3/4, 4/3)`.
        flip: Probability of a horizontal flip, in [0, 1]. Default `0.5`.
        seed: Non-negative integer below 2**64. Default `0`.
        resample: Pillow's filter. Default bilinear.

    Raises:
        DataError: An argument lies outside its range.

    Source:
        The sampling rule is that of the "Inception crop" (Szegedy et al. 2015, arXiv 1409.4842), with torchvision's
        ten attempts and central fallback.

    Example:
        >>> import torch
        >>> from PIL import Image
        >>> from hf_featreuse.transforms import TrainTransform
        >>> image = Image.radial_gradient("L").convert("RGB")
        >>> transform = TrainTransform((32, 32), seed=1)
        >>> transform(image, row=3, epoch=0).shape
        torch.Size([3, 32, 32])
        >>> torch.equal(transform(image, row=3, epoch=0), transform(image, row=3, epoch=1))
        False
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        seed: int = 0,
        resample: Resampling = Resampling.BILINEAR,
    ):
        if len(size) != 2 or min(size) < 1:
            raise DataError(f"size={size!r} is not (height, width) in whole pixels.")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise DataError(f"scale={scale!r} must be (smallest, largest) with 0 < smallest <= largest <= 1.")
        if not 0 < ratio[0] <= ratio[1]:
            raise DataError(f"ratio={ratio!r} must be (smallest, largest) with 0 < smallest <= largest.")
        if not 0 <= flip <= 1:
            raise DataError(f"flip={flip!r} is no probability; pass a number from 0 to 1.")
        if not 0 <= seed < 2**64:
            raise DataError(f"seed={seed!r} must be an integer from 0 to 2**64 - 1.")
        self.size, self.scale, self.ratio = tuple(size), scale, ratio
        self.flip, self.seed, self.resample = flip, seed, resample

    def __call__(self, image: Image.Image, row: int = 0, epoch: int = 0) -> torch.Tensor:
        """Transform one RGB image. See [`ImageTransform`]."""
        return self.batch([image], np.array([row]), epoch)[0]

    def batch(self, images: Sequence[Image.Image], rows: np.ndarray, epoch: int) -> list[torch.Tensor]:
        """Transform images of the given rows in one go. See [`ImageTransform`]."""
        draws = self._uniforms(rows, epoch)
        boxes = self._boxes(draws, np.array([image.size for image in images]))
        height, width = self.size
        pixels = b"".join(
            # A gap of 3 only comes into play where an image shrinks six times or more; the difference is invisible.
            image.resize((width, height), self.resample, box, reducing_gap=3.0).tobytes()
            for image, box in zip(images, boxes, strict=True)
        )
        batch = np.frombuffer(pixels, np.uint8).reshape(len(images), height, width, 3)
        flipped = (draws[:, 2 * _ATTEMPTS + 2] < self.flip)[:, None, None, None]
        batch = np.where(flipped, batch[:, :, ::-1], batch)
        return list(torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous())

    def _uniforms(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Draw uniform numbers of shape (rows, `_DRAWS`), each row's from its own stretch of the Philox sequence."""
        counter = np.array([0, 0, epoch, 0], np.uint64)
        philox = np.random.Philox(key=np.array([self.seed, 0], np.uint64), counter=counter)
        # Moving one generator is five times cheaper than building one for each row, and gives the same numbers.
        state: Any = philox.state
        state["state"]["counter"] = counter
        raw = np.empty((len(rows), _DRAWS), np.uint64)
        for i, row in enumerate(rows.tolist()):
            counter[1] = row
            philox.state = state
            raw[i] = philox.random_raw(_DRAWS)
        return (raw >> np.uint64(11)) * 2.0**-53

    def _boxes(self, draws: np.ndarray, sizes: np.ndarray) -> list[tuple[int, int, int, int]]:
        """Choose (left, top, right, bottom) for images of sizes (n, 2), width first."""
        full_width, full_height = sizes[:, :1], sizes[:, 1:]
        area = (full_width * full_height) * _between(draws[:, :_ATTEMPTS], *self.scale)
        ratio = np.exp(_between(draws[:, _ATTEMPTS : 2 * _ATTEMPTS], math.log(self.ratio[0]), math.log(self.ratio[1])))
        width = np.sqrt(area * ratio).round().astype(np.int64)
        height = np.sqrt(area / ratio).round().astype(np.int64)
        # The last candidate, used when no attempt fits, is the largest central box of an allowed aspect ratio.
        width = np.hstack([width, np.minimum(full_width, (full_height * self.ratio[1]).round().astype(np.int64))])
        height = np.hstack([height, np.minimum(full_height, (full_width / self.ratio[0]).round().astype(np.int64))])
        width[:, -1:], height[:, -1:] = width[:, -1:].clip(1), height[:, -1:].clip(1)
        fits = (width > 0) & (width <= full_width) & (height > 0) & (height <= full_height)
        chosen = fits.argmax(1)[:, None]
        width, height = np.take_along_axis(width, chosen, 1), np.take_along_axis(height, chosen, 1)
        place = np.where(chosen == _ATTEMPTS, 0.5, draws[:, 2 * _ATTEMPTS : 2 * _ATTEMPTS + 2])
        top = (place[:, :1] * (full_height - height + 1)).astype(np.int64)
        left = (place[:, 1:] * (full_width - width + 1)).astype(np.int64)
        return [tuple(box) for box in np.hstack([left, top, left + width, top + height]).tolist()]


def _between(draws: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map uniform numbers on [0, 1) to [low, high)."""
    return low + (high - low) * draws
