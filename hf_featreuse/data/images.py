"""From image files to batches: decode to 8-bit RGB, copy to tensors, normalize a whole batch at once.

The work per image stays in 8 bits; floats appear only in `ImageCollator`.
"""

import contextlib
import io
import os
import stat
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers import BaseImageProcessor

from hf_featreuse.errors import DataError

# Others are not tried: Pillow would start Ghostscript for EPS, and its readers of rare formats are less tested.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ZEROS = bytes(64)


def decode_image(source: Mapping[str, Any]) -> Image.Image:
    """Decode one JPEG, PNG, WebP, BMP, GIF or TIFF image completely, upright and in RGB.

    Of several frames or pages the first is taken. The EXIF orientation is applied if it can be read. 16-bit gray is
    scaled to 8 bits, not clipped. Transparency is dropped, as Hugging Face pipelines do at inference.

    Args:
        source (`Mapping[str, Any]`): what a `datasets.Image(decode=False)` column holds,
            `{"bytes": bytes | None, "path": str | None}`. The file at the path is read only if there are no bytes.

    Returns:
        `PIL.Image.Image`: of mode `RGB`.

    Raises:
        Exception: whatever Pillow raises for a missing, corrupt, truncated or oversized file; `ImageSplit` turns it
            into a `BadImageError` that names the image.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from hf_featreuse.data import decode_image
        >>> file = io.BytesIO()
        >>> Image.new("L", (4, 3), 7).save(file, "PNG")
        >>> image = decode_image({"bytes": file.getvalue(), "path": None})
        >>> image.mode, image.size, image.getpixel((0, 0))
        ('RGB', (4, 3), (7, 7, 7))
    """
    data, path = source["bytes"], source["path"]
    if data is None and path is None:
        raise ValueError("the row holds no image")
    with _open_regular(path) if data is None else io.BytesIO(data) as file:
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            _check_end(file, image.format)
            orientation = None
            with contextlib.suppress(
                Exception
            ):  # of broken EXIF data, that of a camera or an editor, the pixels are good
                orientation = image.getexif().get(ExifTags.Base.Orientation)
            if isinstance(orientation, int) and orientation in _UPRIGHT:
                return _to_rgb(image.transpose(_UPRIGHT[orientation]))
            return _to_rgb(image)


def _open_regular(path: str) -> IO[bytes]:
    """Open a file, but neither wait for a pipe nor read from a device."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")
    return open(path, "rb")


def _check_end(file: IO[bytes], image_format: str | None) -> None:
    """Raise for a JPEG file whose end was replaced by zeros, which decoders turn into pixels."""
    if image_format not in ("JPEG", "MPO") or file.seek(0, os.SEEK_END) < len(_ZEROS):
        return
    file.seek(-len(_ZEROS), os.SEEK_END)
    if file.read() == _ZEROS:
        file.seek(0)
        if b"\xff\xd9" not in _scan_data(file.read()):
            raise ValueError("its end is missing: the file is filled up with zeros")


def _scan_data(jpeg: bytes) -> bytes:
    """Return what follows the header of a JPEG file; a thumbnail in the header has its own end marker."""
    position = 2
    while position + 4 <= len(jpeg) and jpeg[position] == 0xFF and jpeg[position + 1] != 0xDA:
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
    return jpeg[position:]


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of fixed range to RGB; wide integers are taken as 16 bits."""
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.float64)  # astype: `I;16B` is not in native byte order
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"its values, from {wide.min():.0f} to {wide.max():.0f}, do not fit 16 bits")
        return Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range to convert from")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise Pillow warns
    return image.convert("RGB")


def to_tensors(images: Sequence[Image.Image]) -> list[torch.Tensor]:
    """Copy RGB images into tensors.

    Args:
        images (`Sequence[PIL.Image.Image]`): of mode `RGB`, at least one; their sizes may differ.

    Returns:
        `list[torch.Tensor]`: for each image, uint8 of shape (3, height, width).

    Example:
        >>> from PIL import Image
        >>> from hf_featreuse.data import to_tensors
        >>> to_tensors([Image.new("RGB", (4, 3), (7, 8, 9))])[0].shape
        torch.Size([3, 3, 4])
    """
    if len({image.size for image in images}) > 1:
        return [tensor for image in images for tensor in to_tensors([image])]
    width, height = images[0].size
    pixels = np.empty((len(images), 3, height, width), np.uint8)
    if len(images) > 1 and height * width <= 128 * 128:
        # Pillow's calls cost more than small images do: paste these into one sheet and read that once.
        sheet = Image.new("RGB", (width, height * len(images)))
        for i, image in enumerate(images):
            sheet.paste(image, (0, i * height))
        for plane, band in enumerate("RGB"):
            pixels[:, plane] = np.frombuffer(sheet.tobytes("raw", band), np.uint8).reshape(-1, height, width)
    else:
        for i, image in enumerate(images):
            for plane, band in enumerate("RGB"):
                pixels[i, plane] = np.frombuffer(image.tobytes("raw", band), np.uint8).reshape(height, width)
    return list(torch.from_numpy(pixels))


class ImageCollator:
    """Stack uint8 images into a batch and normalize the whole batch at once: `(x * rescale_factor - mean) / std`.

    Args:
        mean (`Sequence[float]`): mean of each channel, in units of the rescaled values.
        std (`Sequence[float]`): standard deviation of each channel, in the same units; not zero.
        rescale_factor (`float`, defaults to `1 / 255`): factor applied to the 8-bit values first.
        flip_channels (`bool`, defaults to `False`): whether to turn RGB into BGR at the end, as MobileViT needs.

    Raises:
        DataError: `mean` and `std` do not have three values each, or `std` holds a zero; when called: the images
            differ in size.

    Example:
        >>> import torch
        >>> from hf_featreuse.data import ImageCollator
        >>> collator = ImageCollator(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> image = torch.full((3, 2, 2), 255, dtype=torch.uint8)
        >>> batch = collator([{"pixel_values": image, "labels": 3}])
        >>> batch["pixel_values"].dtype, batch["pixel_values"].unique(), batch["labels"]
        (torch.float32, tensor([1.]), tensor([3]))
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        rescale_factor: float = 1 / 255,
        flip_channels: bool = False,
    ):
        if len(mean) != 3 or len(std) != 3 or 0 in std:
            raise DataError(f"mean={mean!r} and std={std!r} must hold three numbers each, std no zero.")
        self.mean = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
        self.rescale_factor, self.flip_channels = rescale_factor, flip_channels

    @classmethod
    def from_processor(cls, processor: BaseImageProcessor) -> "ImageCollator":
        """Build the collator that equals a processor's rescaling and normalization, within 1e-6.

        Args:
            processor (`BaseImageProcessor`): its `do_rescale`, `do_normalize` and channel flips are applied.

        Raises:
            DataError: what the processor does to pixel values is not a linear function for each channel.

        Example:
            >>> from transformers import ViTImageProcessorPil
            >>> from hf_featreuse.data import ImageCollator
            >>> ImageCollator.from_processor(ViTImageProcessorPil()).mean.flatten()
            tensor([0.5000, 0.5000, 0.5000])
        """
        settings = processor.to_dict()
        normalize = settings.get("do_normalize")
        collator = cls(
            mean=settings["image_mean"] if normalize else (0.0, 0.0, 0.0),
            std=settings["image_std"] if normalize else (1.0, 1.0, 1.0),
            rescale_factor=settings["rescale_factor"] if settings.get("do_rescale") else 1.0,
            flip_channels=bool(settings.get("do_flip_channel_order")),
        )
        # Check all 256 values, each channel in another order.
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
        probe = torch.from_numpy(np.stack([ramp, ramp.T, 255 - ramp]))
        image = Image.fromarray(np.moveaxis(probe.numpy(), 0, -1))
        shape_kept: dict[str, Any] = {"do_resize": False, "do_center_crop": False, "do_pad": False}
        wanted = torch.from_numpy(np.array(processor(image, return_tensors="np", **shape_kept)["pixel_values"][0]))
        if wanted.shape != probe.shape:
            raise DataError(f"{type(processor).__name__} returns no image of three channels. Pass another processor.")
        for candidate in (collator, cls._fit(probe, wanted, collator.flip_channels)):
            found = candidate([{"pixel_values": probe, "labels": 0}])["pixel_values"][0]
            if torch.allclose(found, wanted.float(), rtol=1e-6, atol=1e-6):
                return candidate
        raise DataError(
            f"{type(processor).__name__} changes pixel values in a way that is not a mean and a standard deviation "
            "for each channel. Build `ImageCollator(mean, std)` yourself, or pass another processor."
        )

    @classmethod
    def _fit(cls, probe: torch.Tensor, wanted: torch.Tensor, flip_channels: bool) -> "ImageCollator":
        """Fit mean and std of each channel to the results for 0 and 255, for processors with other rules."""
        wanted = (wanted.flip(0) if flip_channels else wanted).double()
        low = torch.stack([wanted[c][probe[c] == 0][0] for c in range(3)])
        high = torch.stack([wanted[c][probe[c] == 255][0] for c in range(3)])
        std = 1 / (high - low)
        return cls((-low * std).tolist(), std.tolist(), 1 / 255, flip_channels)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate items of an `ImageSplit`.

        Args:
            features (`Sequence[Mapping[str, Any]]`): items with `pixel_values`, uint8 of shape (3, height, width), and
                `labels`, an integer, a list of zeros and ones, or a float.

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values`, float32 of shape (batch, 3, height, width), and `labels`, int64
                of shape (batch,), or float32 of shape (batch, classes) or (batch,).
        """
        shapes = {tuple(feature["pixel_values"].shape) for feature in features}
        if len(shapes) > 1:
            raise DataError(
                f"The images of a batch differ in shape: {sorted(shapes)[:3]}. Set a transform to a fixed size with "
                "`split.with_transform(...)`."
            )
        pixels = torch.stack([feature["pixel_values"] for feature in features]).to(torch.float32)
        # Dividing by 255 rounds as transformers does, multiplying by 1 / 255 in float32 does not.
        pixels = pixels.div_(1 / self.rescale_factor).sub_(self.mean).div_(self.std)
        labels = [feature["labels"] for feature in features]
        labels = torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], list | float) else torch.int64)
        return {"pixel_values": pixels.flip(1) if self.flip_channels else pixels, "labels": labels}
