"""From RGB images to uint8 tensors: random crops for training, the image processor's resizing for evaluation.

Augmentation is a function of (seed, epoch, row) through a counter-based generator, so it does not depend on workers,
resume and other random draws. Resizing uses Pillow; torchvision is not needed.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling, Transpose
from transformers import BaseImageProcessor

from hf_featreuse.data.images import to_tensors
from hf_featreuse.data.rand_augment import RandAugment
from hf_featreuse.data.seeded import SeededTransform
from hf_featreuse.errors import DataError

_ATTEMPTS = 10  # tries to fit a crop before the central one is taken, as in torchvision
_DRAWS = 2 * _ATTEMPTS + 4  # per image: areas, aspect ratios, top, left, flip, one unused; whole Philox blocks of 4


class ImageTransform:
    """Base of the transforms: an RGB image in, a uint8 tensor of shape (3, height, width) out.

    A subclass defines `__call__`; it may define `batch` if a whole batch can be done faster.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from hf_featreuse.data import to_tensors
        >>> from hf_featreuse.data import ImageTransform
        >>> class Halve(ImageTransform):
        ...     def __call__(self, image, row=0, epoch=0):
        ...         return to_tensors([image.reduce(2)])[0]
        >>> Halve().batch([Image.new("RGB", (8, 6))], np.array([0]), epoch=0)[0].shape
        torch.Size([3, 3, 4])
    """

    def __call__(self, image: Image.Image, row: int = 0, epoch: int = 0) -> torch.Tensor:
        """Transform one RGB image; `row` (its number in the data set) and `epoch` are for random transforms."""
        raise NotImplementedError

    def batch(self, images: Sequence[Image.Image], rows: np.ndarray, epoch: int) -> list[torch.Tensor]:
        """Transform images of the given rows; equal to calling the transform on each."""
        return [self(image, row, epoch) for image, row in zip(images, rows.tolist(), strict=True)]


def default_crop_scale(size: tuple[int, int]) -> tuple[float, float]:
    """Choose the area of random crops.

    A choice of this package: crops down to 8 % of the area, common for ImageNet, leave about 9 x 9 pixels of a 32 x 32
    image, so small images keep at least 60 %.

    Args:
        size (`tuple[int, int]`): height and width of the training images, in pixels.

    Returns:
        `tuple[float, float]`: smallest and largest fraction of the area, `(0.08, 1.0)` if the shorter edge has 128
            pixels or more, else `(0.6, 1.0)`.

    Example:
        >>> from hf_featreuse.data import default_crop_scale
        >>> default_crop_scale((224, 224)), default_crop_scale((32, 32))
        ((0.08, 1.0), (0.6, 1.0))
    """
    return (0.08, 1.0) if min(size) >= 128 else (0.6, 1.0)


class TrainTransform(ImageTransform):
    """Crop a random part of an image, resize it and flip it at random, as a function of only (seed, epoch, row).

    The random numbers of an image come from NumPy's counter-based Philox, keyed by the seed, its counter set to
    (row, epoch). No global generator is used.

    Args:
        size (`tuple[int, int]`): height and width of the result, in pixels.
        scale (`tuple[float, float]`, defaults to `(0.08, 1.0)`): smallest and largest part of the area to keep, both
            in (0, 1].
        ratio (`tuple[float, float]`, defaults to `(3 / 4, 4 / 3)`): smallest and largest width / height of the part,
            drawn log-uniformly.
        flip (`float`, defaults to 0.5): probability of a horizontal flip, in [0, 1].
        seed (`int`, defaults to 0): from 0 to 2**64 - 1.
        resample (`Resampling`, defaults to `Resampling.BILINEAR`): Pillow's filter.
        augment (`RandAugment` or `SeededTransform`, *optional*): further augmentation, applied last.

    Raises:
        DataError: an argument is out of range.

    Source: the sampling rule is that of the "Inception crop", Szegedy et al. 2015 (arXiv 1409.4842), with
    torchvision's ten attempts and central fallback.

    Example:
        >>> import torch
        >>> from PIL import Image
        >>> from hf_featreuse.data import TrainTransform
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
        augment: RandAugment | SeededTransform | None = None,
    ):
        if len(size) != 2 or min(size) < 1:
            raise DataError(f"size={size!r} is not (height, width) in whole pixels.")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise DataError(f"scale={scale!r} must be (smallest, largest) with 0 < smallest <= largest <= 1.")
        if not 0 < ratio[0] <= ratio[1]:
            raise DataError(f"ratio={ratio!r} must be (smallest, largest) with 0 < smallest <= largest.")
        if not 0 <= flip <= 1:
            raise DataError(f"flip={flip!r} is not a probability. Pass a number from 0 to 1.")
        if not 0 <= seed < 2**64:
            raise DataError(f"seed={seed!r} must be an integer from 0 to 2**64 - 1.")
        self.size, self.scale, self.ratio = tuple(size), scale, ratio
        self.flip, self.seed, self.resample, self.augment = flip, seed, resample, augment

    def __call__(self, image: Image.Image, row: int = 0, epoch: int = 0) -> torch.Tensor:
        """Transform one RGB image. See [`ImageTransform`]."""
        return self.batch([image], np.array([row]), epoch)[0]

    def batch(self, images: Sequence[Image.Image], rows: np.ndarray, epoch: int) -> list[torch.Tensor]:
        """Transform images of the given rows in one go. See [`ImageTransform`]."""
        draws = self._uniforms(rows, epoch)
        boxes = self._boxes(draws, np.array([image.size for image in images]))
        flips = (draws[:, 2 * _ATTEMPTS + 2] < self.flip).tolist()
        height, width = self.size
        results = []
        for image, box, flip in zip(images, boxes, flips, strict=True):
            # A gap of 3 has an effect only if an image shrinks six times or more; the difference is invisible.
            result = image.resize((width, height), self.resample, box, reducing_gap=3.0)
            results.append(result.transpose(Transpose.FLIP_LEFT_RIGHT) if flip else result)
        if self.augment is None:
            return to_tensors(results)
        augmented: list[Any] = list(self.augment(results, rows, epoch))
        if any(isinstance(result, torch.Tensor) for result in augmented):
            return [result if isinstance(result, torch.Tensor) else to_tensors([result])[0] for result in augmented]
        return to_tensors(augmented)

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


class EvalTransform(ImageTransform):
    """Resize and crop bit-identically to a Hugging Face image processor, without its rescaling and normalization.

    Fixed sizes, `shortest_edge`, center crops and ConvNeXt's `crop_pct` are done by Pillow directly. At construction
    the result is compared with that of the processor on two images of noise; if they differ (padding, torchvision's
    filters, other rules), the processor itself is called for each image. Padding by a processor is then black before
    normalization, not zero after it.

    Args:
        processor (`BaseImageProcessor`): such as `AutoImageProcessor.from_pretrained` returns.

    Raises:
        DataError: the processor returns something other than one uint8 image of three channels.

    Example:
        >>> from PIL import Image
        >>> from transformers import CLIPImageProcessorPil
        >>> from hf_featreuse.data import EvalTransform
        >>> transform = EvalTransform(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32))
        >>> transform(Image.new("RGB", (60, 40))).shape
        torch.Size([3, 32, 32])
    """

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor
        self._settings = processor.to_dict()
        noise = np.random.Generator(np.random.Philox(0))
        probes = [Image.fromarray(noise.integers(0, 256, shape, np.uint8)) for shape in ((61, 97, 3), (600, 450, 3))]
        self._direct = all(self._equals_processor(probe) for probe in probes)

    def __call__(self, image: Image.Image, row: int = 0, epoch: int = 0) -> torch.Tensor:
        """Transform one RGB image; `row` and `epoch` are ignored. See [`ImageTransform`]."""
        return to_tensors([self._resize(image)])[0] if self._direct else _by_processor(self.processor, image)

    def batch(self, images: Sequence[Image.Image], rows: np.ndarray, epoch: int) -> list[torch.Tensor]:
        """Transform several images. See [`ImageTransform`]."""
        if self._direct:
            return to_tensors([self._resize(image) for image in images])
        return [_by_processor(self.processor, image) for image in images]

    def _equals_processor(self, image: Image.Image) -> bool:
        """Return whether Pillow alone gives the same result as the processor for this image."""
        size = self._settings.get("size") or {}
        if self._settings.get("do_resize") and set(size) not in ({"height", "width"}, {"shortest_edge"}):
            return False
        return torch.equal(to_tensors([self._resize(image)])[0], _by_processor(self.processor, image))

    def _resize(self, image: Image.Image) -> Image.Image:
        """Apply the processor's resize and center crop with Pillow."""
        crop_size = self._settings["crop_size"] if self._settings.get("do_center_crop") else None
        if self._settings.get("do_resize"):
            size, edge = self._settings["size"], self._settings["size"].get("shortest_edge")
            if edge is None:
                height, width = size["height"], size["width"]
            elif self._settings.get("crop_pct") and edge >= 384:
                height, width = edge, edge
            elif self._settings.get("crop_pct"):
                height, width = _with_shortest_edge(image, int(edge / self._settings["crop_pct"]))
                crop_size = {"height": edge, "width": edge}
            else:
                height, width = _with_shortest_edge(image, edge)
            image = image.resize((width, height), self._settings["resample"])
        if crop_size is not None:
            left, top = (image.width - crop_size["width"]) // 2, (image.height - crop_size["height"]) // 2
            image = image.crop((left, top, left + crop_size["width"], top + crop_size["height"]))
        return image


def _by_processor(processor: BaseImageProcessor, image: Image.Image) -> torch.Tensor:
    """Resize and crop with the processor; `ImageCollator` rescales and normalizes."""
    off: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
    off |= dict.fromkeys({"do_flip_channel_order", "include_top", "rescale_offset"} & set(processor.to_dict()), False)
    pixels = np.asarray(processor(image, return_tensors="np", **off)["pixel_values"][0])
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) != 3:
        raise DataError(
            f"{type(processor).__name__} without rescaling returns {pixels.dtype} of shape {pixels.shape}; "
            "one uint8 image of shape (3, height, width) is needed. Pass another image processor."
        )
    return torch.from_numpy(pixels.copy())


def _with_shortest_edge(image: Image.Image, edge: int) -> tuple[int, int]:
    """Compute (height, width) for a shorter edge of `edge` pixels, rounding as transformers does."""
    longer = int(edge * max(image.size) / min(image.size))
    return (longer, edge) if image.width <= image.height else (edge, longer)


def image_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Return the size of the images that a processor passes to the model.

    Args:
        processor (`BaseImageProcessor`): image processor of transformers.

    Returns:
        `tuple[int, int]`: height and width in pixels; for `shortest_edge` without a crop, those of a square image.

    Raises:
        DataError: the processor neither resizes nor crops, and names no size.

    Example:
        >>> from transformers import ViTImageProcessorPil
        >>> from hf_featreuse.data import image_size
        >>> image_size(ViTImageProcessorPil(size={"height": 32, "width": 48}))
        (32, 48)
    """
    settings = processor.to_dict()
    if settings.get("do_resize") or settings.get("do_center_crop"):
        height, width = _by_processor(processor, Image.new("RGB", (64, 64))).shape[1:]
        return height, width
    size = settings.get("size") or {}
    if {"height", "width"} <= set(size):
        return size["height"], size["width"]
    raise DataError(
        f"{type(processor).__name__} neither resizes nor crops and its size is {size}: "
        "set `do_resize=True` and a `size` with height and width."
    )
