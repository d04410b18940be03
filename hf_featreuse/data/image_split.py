"""One split of labeled images as a `torch.utils.data.Dataset`, with the handling of images that cannot be decoded.

A split records the row of each image in its source, so that augmentation depends only on the image, and errors name
the image.
"""

import copy
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from hf_featreuse.data.images import decode_image, to_tensors
from hf_featreuse.data.transforms import ImageTransform
from hf_featreuse.errors import BadImageError, DataError
from hf_featreuse.text import one_line, printable

logger = logging.getLogger(__name__)

_CHECK_CHUNK = 64  # images a thread decodes at a time when looking for bad ones


class ImageSplit(torch.utils.data.Dataset):
    """Images and labels of one split, decoded when asked for.

    Items are `{"pixel_values": uint8 tensor of shape (3, height, width), "labels": int}`; with several labels per
    image `labels` is a list of zeros and ones, in a regression a float. As this is not a `datasets.Dataset`, Trainer's
    `remove_unused_columns` does not change it.

    Args:
        images (`datasets.Dataset`): its only column holds `datasets.Image(decode=False)`.
        rows (`numpy.ndarray`): row numbers in `images` that make up the split, int64 of shape (n,).
        labels (`numpy.ndarray`): class ids in the order of `rows`, int64 of shape (n,); zeros and ones, float32 of
            shape (n, classes); or values, float32 of shape (n,).
        name (`str`): what messages call the split: its name in the source, such as `"train"`.
        source (`str`): what messages call the source, such as `"data set 'beans'"`.
        transform (`Callable`, *optional*): an `ImageTransform`, or a function from an RGB PIL image to a uint8 tensor.

    Attributes:
        rows (`numpy.ndarray`): as passed.
        labels (`numpy.ndarray`): as passed.
        num_skipped (`int`): how many images `skip_bad_images` left out.

    Raises:
        BadImageError: an item is read whose image cannot be decoded.

    Example:
        >>> from hf_featreuse.data import load_image_data
        >>> split = load_image_data().splits["train"]
        >>> len(split), split[0]["pixel_values"].shape
        (1437, torch.Size([3, 8, 8]))
    """

    def __init__(
        self,
        images: datasets.Dataset,
        rows: np.ndarray,
        labels: np.ndarray,
        name: str,
        source: str,
        transform: Callable[..., torch.Tensor] | None = None,
    ):
        assert len(rows) == len(labels)
        self.rows, self.labels, self.num_skipped = rows, labels, 0
        self._images, self._name, self._source = images.with_format("arrow"), name, source
        self._transform = transform
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it too

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Read several items with one access to the data; `torch.utils.data.DataLoader` calls this by itself."""
        rows = self.rows[list(indices)]
        images = [self._decode(row, stored) for row, stored in zip(rows.tolist(), self._read(rows), strict=True)]
        if self._transform is None:
            pixels = to_tensors(images)
        elif isinstance(self._transform, ImageTransform):
            pixels = self._transform.batch(images, rows, int(self._epoch))
        else:
            pixels = [self._transform(image) for image in images]
        labels = self.labels[list(indices)].tolist()
        return [{"pixel_values": p, "labels": label} for p, label in zip(pixels, labels, strict=True)]

    def with_transform(self, transform: Callable[..., torch.Tensor] | None) -> "ImageSplit":
        """Return the same split with another transform.

        Args:
            transform (`Callable`, *optional*): as in the constructor; `None` for none.

        Example:
            >>> from hf_featreuse.data import load_image_data
            >>> from hf_featreuse.data import TrainTransform
            >>> train = load_image_data().splits["train"].with_transform(TrainTransform((16, 16)))
            >>> train[0]["pixel_values"].shape
            torch.Size([3, 16, 16])
        """
        split = copy.copy(self)
        split._transform, split._epoch = transform, self._epoch.clone().share_memory_()
        return split

    def with_class_ids(self, class_ids: Sequence[int], num_classes: int | None = None) -> "ImageSplit":
        """Return the same split with other class ids.

        Args:
            class_ids (`Sequence[int]`): the new id of each class, in the order of the present ids.
            num_classes (`int`, *optional*): of the new classes, for several labels per image; by default as many as
                there are ids.

        Example:
            >>> from hf_featreuse.data import load_image_data
            >>> train = load_image_data().splits["train"]
            >>> train.with_class_ids(range(10, 20))[0]["labels"] - train[0]["labels"]
            10
        """
        split = copy.copy(self)
        if self.labels.ndim > 1:
            split.labels = np.zeros((len(self.labels), num_classes or len(class_ids)), self.labels.dtype)
            split.labels[:, list(class_ids)] = self.labels
        elif np.issubdtype(self.labels.dtype, np.integer):
            split.labels = np.asarray(class_ids, dtype=np.int64)[self.labels]
        return split

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of random transforms; `FeatureReuseTrainer` calls this before every epoch, your own loop must.

        The data loaders of accelerate 1.15 also call it, but not with several processes, nor in the epoch of a resume.

        Args:
            epoch (`int`): number of the epoch, from 0.
        """
        self._epoch.fill_(epoch)

    def file_names(self, indices: Sequence[int]) -> list[str]:
        """Return the name of each image: its file if the source has one, else its row there.

        Args:
            indices (`Sequence[int]`): positions in the split.

        Example:
            >>> from hf_featreuse.data import load_image_data
            >>> [name] = load_image_data().splits["train"].file_names([0])
            >>> name.startswith("row ")
            True
        """
        rows = self.rows[list(indices)]
        return [stored["path"] or f"row {row}" for row, stored in zip(rows.tolist(), self._read(rows), strict=True)]

    def without_bad_images(self) -> "ImageSplit":
        """Decode every image once and return the split without those that fail, which are counted and logged.

        Progress is shown by a bar; `datasets.disable_progress_bars()` turns it off.

        Raises:
            DataError: no image is left.
        """
        chunks = [range(i, min(i + _CHECK_CHUNK, len(self))) for i in range(0, len(self), _CHECK_CHUNK)]
        bad: dict[int, str] = {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(self._failures, chunks)
            for failures in datasets.utils.tqdm(found, total=len(chunks), desc=f"Checking images of {self._name}"):
                bad |= failures
        if len(bad) == len(self):
            raise DataError(
                f"None of the {len(self)} images of split '{self._name}' of {self._source} can be decoded; the first: "
                f"{bad[0]}. Check `image_column_name` (--image_column_name) and the files."
            )
        split = copy.copy(self)
        if bad:
            kept = np.setdiff1d(np.arange(len(self)), list(bad))
            split.rows, split.labels, split.num_skipped = self.rows[kept], self.labels[kept], len(bad)
            listed = "".join(f"\n  {bad[i]}" for i in sorted(bad)[:10]) + ("\n  ..." if len(bad) > 10 else "")
            template = "Left out %d of %d images of split '%s' of %s that cannot be decoded:%s"
            logger.warning(template, len(bad), len(self), self._name, self._source, listed)
        return split

    def _read(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Fetch the stored bytes and paths of some rows."""
        table: Any = self._images[rows.tolist()]
        return [stored or {"bytes": None, "path": None} for stored in table.column(0).to_pylist()]

    def _decode(self, row: int, stored: dict[str, Any]) -> Image.Image:
        """Decode one image; the error names it."""
        try:
            return decode_image(stored)
        except Exception as error:  # decoders raise almost anything on broken files
            raise BadImageError(
                f"Cannot decode {self._describe(row, stored, error)}. Fix or remove it, or pass "
                "`skip_bad_images=True` (--skip_bad_images) to skip such images."
            ) from None

    def _describe(self, row: int, stored: dict[str, Any], error: Exception) -> str:
        """Name an image by its file if it has one, and by its row."""
        where = f"row {row} of split '{self._name}' of {self._source}"
        path = printable(stored["path"] or "")
        file = f"{path} ({where})" if path and stored["bytes"] is None else f"the image in {where}"
        if isinstance(error, Image.UnidentifiedImageError):
            return f"{file}: it is damaged, or not a JPEG, PNG, WebP, BMP, GIF or TIFF file"
        return f"{file}: {one_line(error).rstrip('.')}"

    def _failures(self, positions: range) -> dict[int, str]:
        """Try to decode the images at some positions; return those that fail, described."""
        rows = self.rows[positions.start : positions.stop]
        bad = {}
        for position, row, stored in zip(positions, rows.tolist(), self._read(rows), strict=True):
            try:
                decode_image(stored)
            except Exception as error:
                bad[position] = self._describe(row, stored, error)
        return bad
