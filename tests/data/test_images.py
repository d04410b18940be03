"""Decoding to RGB, copying into tensors, normalizing batches."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import (
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    MobileViTImageProcessorPil,
    ViTImageProcessorPil,
)

from hf_featreuse.data.images import ImageCollator, decode_image, to_tensors
from hf_featreuse.errors import DataError


def stored(image: Image.Image, format: str = "PNG", **options) -> dict:
    file = io.BytesIO()
    image.save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("mode", "color", "wanted"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 9, (9, 9, 9)),
        ("LA", (9, 0), (9, 9, 9)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (1, 2, 3, 128), (1, 2, 3)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 40, (40, 40, 40)),
    ],
)
def test_every_mode_becomes_rgb(mode, color, wanted):
    image = decode_image(stored(Image.new(mode, (5, 4), color)))
    assert image.mode == "RGB"
    assert image.size == (5, 4)
    assert image.getpixel((2, 2)) == wanted


def test_wide_integers_are_scaled_as_16_bits_and_big_endian_ones_too():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    little, big = Image.fromarray(ramp), Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes())
    wide = Image.fromarray(ramp.astype(np.int32))
    assert wide.mode == "I"
    for image in (little, big, wide):
        gray = np.asarray(decode_image(stored(image, "TIFF")))[..., 0]
        assert np.array_equal(gray.ravel(), np.arange(256))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255])])
def test_palette_images_keep_their_colors_without_a_warning(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    decoded = decode_image(stored(image, **options))
    assert [decoded.getpixel((x, 0)) for x in range(3)] == [(10, 20, 30), (40, 50, 60), (70, 80, 90)]


def test_cmyk_is_converted():
    decoded = decode_image(stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = decoded.getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60


def test_floating_point_pixels_are_refused():
    with pytest.raises(ValueError, match="no fixed range"):
        decode_image(stored(Image.new("F", (4, 4), 0.5), "TIFF"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(format):
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    decoded = decode_image(stored(image, format, exif=exif))
    assert decoded.size == (8, 16)
    assert decoded.getpixel((4, 2))[0] > 250
    assert decoded.getpixel((4, 13))[0] < 5


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0XXXXyyyy", b"Exif\0\0II*\0\xff\xff\xff\xff", b"?"])
def test_broken_exif_data_is_ignored(format, exif):
    image = noise(16, 8)
    decoded = decode_image(stored(image, format, exif=exif, **({"lossless": True} if format == "WEBP" else {})))
    assert decoded.size == (8, 16)
    assert format == "JPEG" or np.array_equal(np.asarray(decoded), np.asarray(image))


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_means_nothing_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode_image(stored(noise(16, 8), "JPEG", exif=exif)).size == (8, 16)


def test_every_orientation_turns_the_image_upright():
    """Against Pillow's own rule, which also rewrites EXIF data and so fails where these are broken."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        source = stored(noise(16, 8), "PNG", exif=exif)
        wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(source["bytes"])))
        assert np.array_equal(np.asarray(decode_image(source)), np.asarray(wanted))


@pytest.mark.parametrize("format", ["EPS", "PPM", "TGA", "ICO", "PCX", "JPEG2000", "PDF"])
def test_other_formats_are_not_tried(format):
    with pytest.raises(UnidentifiedImageError):
        decode_image(stored(noise(16, 16), format))


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        decode_image({"bytes": None, "path": str(path)})


def test_a_jpeg_that_is_filled_up_with_zeros_is_refused():
    data = stored(noise(64, 64), "JPEG")["bytes"]
    with pytest.raises(ValueError, match="filled up with zeros"):
        decode_image({"bytes": data[: len(data) // 2] + bytes(len(data) // 2), "path": None})
    assert decode_image({"bytes": data + bytes(512), "path": None}).size == (64, 64)  # padded behind its end


def test_integers_beyond_16_bits_are_refused_not_clipped():
    wide = Image.fromarray(np.array([[0, 70000]], np.int32))
    with pytest.raises(ValueError, match="from 0 to 70000, do not fit 16 bits"):
        decode_image(stored(wide, "TIFF"))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_truncated_file_fails(format):
    source = stored(noise(40, 40), format)
    source["bytes"] = source["bytes"][: len(source["bytes"]) // 2]
    with pytest.raises(OSError, match="truncated"):
        decode_image(source)


def test_a_row_without_an_image_fails():
    with pytest.raises(ValueError, match="no image"):
        decode_image({"bytes": None, "path": None})


@pytest.mark.parametrize("sizes", [[(8, 6)], [(8, 6)] * 3, [(200, 150)] * 2, [(8, 6), (6, 8)]])
def test_tensors_hold_the_pixels(sizes):
    images = [noise(height, width) for height, width in sizes]
    for image, tensor in zip(images, to_tensors(images), strict=True):
        assert tensor.dtype == torch.uint8
        assert tensor.is_contiguous()
        assert np.array_equal(tensor.permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(),
        ViTImageProcessorPil(do_normalize=False),
        ViTImageProcessorPil(do_rescale=False, do_normalize=False),
        ViTImageProcessorPil(do_rescale=False, image_mean=[120, 110, 100], image_std=[60, 50, 40]),
        ViTImageProcessorPil(rescale_factor=1 / 127.5, image_mean=[1, 1, 1], image_std=[1, 1, 1]),
        ConvNextImageProcessorPil(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
        CLIPImageProcessorPil(),
        EfficientNetImageProcessorPil(),  # divides by the standard deviation twice
        MobileViTImageProcessorPil(),  # wants BGR
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_the_collator_equals_the_processor(processor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    wanted = processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    batch = ImageCollator.from_processor(processor)([{"pixel_values": to_tensors([image])[0], "labels": 4}])
    assert batch["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(batch["pixel_values"], wanted.float(), rtol=1e-6, atol=1e-6)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [4]


def test_a_processor_that_is_not_a_line_is_refused():
    class Squaring(ViTImageProcessorPil):
        def normalize(self, image, mean, std, **kwargs):
            return image**2

    with pytest.raises(DataError, match="Squaring changes pixel values"):
        ImageCollator.from_processor(Squaring())


def test_images_of_different_size_cannot_be_collated():
    features = [{"pixel_values": torch.zeros(3, side, side, dtype=torch.uint8), "labels": 0} for side in (4, 5)]
    with pytest.raises(DataError, match=r"differ in shape.*with_transform"):
        ImageCollator((0, 0, 0), (1, 1, 1))(features)


@pytest.mark.parametrize(("mean", "std"), [((0, 0), (1, 1, 1)), ((0, 0, 0), (1, 0, 1))])
def test_bad_statistics_are_refused(mean, std):
    with pytest.raises(DataError, match="three numbers"):
        ImageCollator(mean, std)
