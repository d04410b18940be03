"""Images of every format, whole, damaged and hostile: each decodes to its pixels or is an error that names its file.

A file is put into a class folder and read as in training. The table leaves out what no decoder of Pillow notices:
changed pixels in BMP and uncompressed TIFF, changed bytes in the middle of JPEG and WebP, which have no checksums, and
a PNG written with fewer rows than its header states.
"""

import io
import logging
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from hf_featreuse.data import load_image_data
from hf_featreuse.errors import BadImageError

pytestmark = pytest.mark.slow

ROWS, COLUMNS = np.mgrid[0:48, 0:64]
SMOOTH = Image.fromarray(np.stack([4 * COLUMNS, 5 * ROWS, 2 * (ROWS + COLUMNS)], 2).astype(np.uint8))
GRAY = SMOOTH.convert("L")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}
NO_FORMAT = "it is damaged, or not a JPEG, PNG, WebP, BMP, GIF or TIFF file"


@dataclass
class Good:
    """The file decodes to this image; to this mean difference, for lossy formats."""

    image: Image.Image
    difference: float = 0


@dataclass
class Bad:
    """Reading the file is an error with this reason."""

    reason: str


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """One chunk of a PNG file."""
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(
    *chunks: bytes, width: int = 64, height: int = 48, depth: int = 8, color: int = 2, pixels: bytes = b""
) -> bytes:
    """A PNG file by hand: other chunks, then the pixels if there are any."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(pixels)) if pixels else b""
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


def scanlines(image: Image.Image, wide: bool = False) -> bytes:
    """The pixels of an RGB image as PNG holds them, with 8 or 16 bits."""
    values = np.asarray(image)
    values = (values.astype(">u2") * 257).astype(">u2") if wide else values
    return b"".join(b"\0" + line.tobytes() for line in values)


CASES: dict[str, tuple[str, bytes, Good | Bad]] = {}  # by name: ending, content, verdict


def case(name: str, ending: str, content: bytes, verdict: Good | Bad) -> None:
    assert name not in CASES
    CASES[name] = (ending, content, verdict)


def whole_and_damaged() -> None:
    for format, ending in ENDINGS.items():
        data = encoded(SMOOTH, format)
        good = Good(SMOOTH, 0 if format in ("PNG", "BMP", "TIFF") else 12)
        case(f"{format}, whole", ending, data, good)
        case(f"{format}, ending in capitals", ending.upper(), data, good)
        case(f"{format}, ending of another format", "png" if format == "JPEG" else "jpg", data, good)
        case(f"{format}, with bytes behind its end", ending, data + b"\x01rest of a block" * 40, good)
        case(f"{format}, twice in a file", ending, data + data, good)
        noisy = encoded(NOISE, format)
        case(f"{format}, half", ending, noisy[: len(noisy) // 2], Bad(".+"))
        case(f"{format}, all but 30 bytes", ending, noisy[:-30], Bad(".+"))
        case(f"{format}, 20 bytes", ending, noisy[:20], Bad(".+"))
        case(f"{format}, two bytes", ending, noisy[:2], Bad(NO_FORMAT))
        case(f"{format}, shifted by a byte", ending, b"\0" + noisy, Bad(NO_FORMAT))
    for ending in ENDINGS.values():
        case(f"empty {ending}", ending, b"", Bad(NO_FORMAT))
        case(f"zeros as {ending}", ending, bytes(4096), Bad(NO_FORMAT))
    page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    case("a web page", "jpg", page, Bad(NO_FORMAT))
    case("a pointer of Git LFS", "png", pointer, Bad(NO_FORMAT))
    case("text", "gif", b"hello", Bad(NO_FORMAT))
    jpeg = encoded(NOISE, "JPEG")
    case("JPEG, second half zeros", "jpg", jpeg[:1500] + bytes(1500), Bad("filled up with zeros"))
    case("JPEG, padded behind its end", "jpg", encoded(SMOOTH, "JPEG") + bytes(4096), Good(SMOOTH, 12))
    case("JPEG without its end marker", "jpg", jpeg[:-2], Bad("truncated"))
    case("JPEG, only a header", "jpg", b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xd9", Bad(".+"))
    case("GIF, only a header", "gif", b"GIF89a\x08\0\x08\0\0\0\0;", Bad(".+"))


def foreign_formats() -> None:
    for format in ("EPS", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "PDF", "SGI", "DDS", "IM", "TGA", "ICNS"):
        name = f"{format} as jpg"
        if name not in CASES:
            case(name, "jpg", encoded(NOISE, format), Bad(NO_FORMAT))
    case("EPS as png", "png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n", Bad(NO_FORMAT))
    case(
        "EPS with a preview as tif",
        "tif",
        b"\xc5\xd0\xd3\xc6" + struct.pack("<7I", 30, 40, 0, 0, 0, 0, 0),
        Bad(NO_FORMAT),
    )
    case("SVG as png", "png", b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"/>', Bad(NO_FORMAT))
    case("Photoshop as png", "png", b"8BPS\0\1" + bytes(60), Bad(NO_FORMAT))
    case("FITS as tif", "tif", b"SIMPLE  =                    T".ljust(2880), Bad(NO_FORMAT))
    case("WMF as bmp", "bmp", b"\xd7\xcd\xc6\x9a" + bytes(80), Bad(NO_FORMAT))
    case("XBM as bmp", "bmp", encoded(SMOOTH.convert("1"), "XBM"), Bad(NO_FORMAT))
    case("a zip archive as png", "png", b"PK\x03\x04" + bytes(60), Bad(NO_FORMAT))
    case("a pickle as jpg", "jpg", b"\x80\x04cos\nsystem\n(S'true'\ntR.", Bad(NO_FORMAT))
    case(
        "MPO, the JPEG of cameras",
        "jpg",
        encoded(SMOOTH, "MPO", save_all=True, append_images=[GRAY.convert("RGB")]),
        Good(SMOOTH, 12),
    )


def modes() -> None:
    gray = GRAY.convert("RGB")
    case("1 bit", "png", encoded(GRAY.convert("1"), "PNG"), Good(GRAY.convert("1").convert("RGB")))
    case("gray", "png", encoded(GRAY, "PNG"), Good(gray))
    case("gray JPEG", "jpg", encoded(GRAY, "JPEG"), Good(gray, 12))
    case("gray with transparency", "png", encoded(GRAY.convert("LA"), "PNG"), Good(gray))
    clear = SMOOTH.convert("RGBA")
    clear.putalpha(GRAY)
    case("transparent", "png", encoded(clear, "PNG"), Good(SMOOTH))
    case("transparent TIFF", "tif", encoded(clear, "TIFF"), Good(SMOOTH))
    case("one transparent color", "png", encoded(SMOOTH, "PNG", transparency=(0, 0, 0)), Good(SMOOTH))
    palette = SMOOTH.quantize(64)
    case("palette", "png", encoded(palette, "PNG"), Good(palette.convert("RGB")))
    case("palette BMP", "bmp", encoded(palette, "BMP"), Good(palette.convert("RGB")))
    shades = bytes(range(64))
    case(
        "palette, each color transparent to a degree",
        "png",
        encoded(palette, "PNG", transparency=shades),
        Good(palette.convert("RGB")),
    )
    case(
        "palette, one color transparent",
        "gif",
        encoded(palette, "GIF", transparency=3),
        Good(palette.convert("RGB"), 1),
    )
    case("CMYK JPEG", "jpg", encoded(SMOOTH.convert("CMYK"), "JPEG"), Good(SMOOTH, 12))
    case("CMYK TIFF", "tif", encoded(SMOOTH.convert("CMYK"), "TIFF"), Good(SMOOTH, 1))
    case("YCbCr TIFF", "tif", encoded(SMOOTH.convert("YCbCr"), "TIFF"), Good(SMOOTH, 2))
    wide = np.asarray(GRAY).astype(np.uint16) * 257
    case("16-bit gray", "png", encoded(Image.fromarray(wide), "PNG"), Good(gray))
    case("16-bit gray TIFF", "tif", encoded(Image.fromarray(wide), "TIFF"), Good(gray))
    case(
        "16-bit gray TIFF, big-endian",
        "tif",
        encoded(Image.frombytes("I;16B", GRAY.size, wide.astype(">u2").tobytes()), "TIFF"),
        Good(gray),
    )
    case("16-bit color", "png", png(depth=16, pixels=scanlines(SMOOTH, wide=True)), Good(SMOOTH))
    case("32-bit gray of 16-bit values", "tif", encoded(Image.fromarray(wide.astype(np.int32)), "TIFF"), Good(gray))
    case(
        "32-bit gray beyond 16 bits",
        "tif",
        encoded(Image.fromarray(wide.astype(np.int32) * 9), "TIFF"),
        Bad("do not fit 16 bits"),
    )
    case("negative gray", "tif", encoded(Image.fromarray(-wide.astype(np.int32)), "TIFF"), Bad("do not fit 16 bits"))
    case(
        "floating-point gray", "tif", encoded(Image.fromarray(wide.astype(np.float32)), "TIFF"), Bad("floating-point")
    )
    case("progressive JPEG", "jpg", encoded(SMOOTH, "JPEG", progressive=True), Good(SMOOTH, 12))
    case("lossless WebP", "webp", encoded(SMOOTH, "WEBP", lossless=True), Good(SMOOTH))
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        exact = 0 if compression != "jpeg" else 12
        case(f"TIFF, {compression}", "tif", encoded(SMOOTH, "TIFF", compression=compression), Good(SMOOTH, exact))
    case(
        "one pixel",
        "png",
        encoded(Image.new("RGB", (1, 1), (7, 8, 9)), "PNG"),
        Good(Image.new("RGB", (1, 1), (7, 8, 9))),
    )
    thin = Image.new("RGB", (4000, 1), (7, 8, 9))
    case("one row", "png", encoded(thin, "PNG"), Good(thin))


def frames() -> None:
    more = [Image.new("RGB", SMOOTH.size, color) for color in ("red", "green")]
    animated = {"save_all": True, "append_images": more}
    case("animated GIF", "gif", encoded(SMOOTH, "GIF", **animated, duration=40), Good(SMOOTH, 12))
    case("animated PNG", "png", encoded(SMOOTH, "PNG", **animated), Good(SMOOTH))
    case("animated WebP", "webp", encoded(SMOOTH, "WEBP", **animated, lossless=True), Good(SMOOTH))
    case("TIFF of three pages", "tif", encoded(SMOOTH, "TIFF", **animated), Good(SMOOTH))


def exif() -> None:
    broken = {
        "garbage": b"Exif\0\0XXXXyyyy",
        "no end": b"Exif\0\0II*\0\xff\xff\xff\xff",
        "cut": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        "one byte": b"?",
        "a loop": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\0\0\0\0",
    }
    for format, ending in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        for name, block in broken.items():
            options = {"lossless": True} if format == "WEBP" else {}
            good = Good(SMOOTH, 12 if format == "JPEG" else 0)
            case(f"EXIF data, {name}, in {format}", ending, encoded(SMOOTH, format, exif=block, **options), good)
    turned = Image.Exif()
    turned[0x0112] = 6
    case(
        "turned by EXIF data",
        "png",
        encoded(SMOOTH, "PNG", exif=turned),
        Good(SMOOTH.transpose(Image.Transpose.ROTATE_270)),
    )


def structures() -> None:
    pixels = scanlines(SMOOTH)
    case("PNG by hand", "png", png(pixels=pixels), Good(SMOOTH))
    case(
        "PNG, wrong checksum of an optional chunk",
        "png",
        png(chunk(b"teST", b"x", checksum=1), pixels=pixels),
        Bad(NO_FORMAT),
    )
    case(
        "PNG, wrong checksum of the pixels",
        "png",
        png(chunk(b"IDAT", zlib.compress(pixels), checksum=1)),
        Good(SMOOTH),
    )
    case("PNG without pixels", "png", png(), Bad(".+"))
    case(
        "PNG, more pixels than its header says",
        "png",
        png(height=24, pixels=pixels),
        Good(SMOOTH.crop((0, 0, 64, 24))),
    )
    case("PNG of width 0", "png", png(width=0, pixels=pixels), Bad(".+"))
    case("PNG of an unknown kind", "png", png(depth=3, color=7, pixels=pixels), Bad(".+"))
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000)))
    case("PNG, text that unpacks to 50 MB", "png", png(text, pixels=pixels), Bad("text|Decompressed"))
    too_large = "exceeds limit|too large|[Uu]nsupported|decoder"
    case("PNG of 50000 x 50000", "png", png(width=50_000, height=50_000, pixels=pixels), Bad(too_large))
    case("PNG of 2**31 - 1 rows", "png", png(height=2**31 - 1, pixels=pixels), Bad(too_large))
    case(
        "GIF of 65535 x 65535",
        "gif",
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b"\x2c"
        + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
        + b"\x02\x02L\x01\0;",
        Bad(too_large),
    )
    bmp = bytearray(encoded(SMOOTH, "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    case("BMP of 60000 x 60000", "bmp", bytes(bmp), Bad(too_large))
    jpeg = bytearray(encoded(SMOOTH, "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    case("JPEG of 65500 x 65500", "jpg", bytes(jpeg), Bad(too_large))
    tiff = bytearray(encoded(SMOOTH, "TIFF"))
    for tag in (256, 257):
        at = next(
            tiff.index(struct.pack("<HHI", tag, kind, 1))
            for kind in (3, 4)
            if struct.pack("<HHI", tag, kind, 1) in tiff
        )
        tiff[at : at + 12] = struct.pack("<HHII", tag, 4, 1, 100_000)
    case("TIFF of 100000 x 100000", "tif", bytes(tiff), Bad(too_large))
    ring = encoded(SMOOTH, "TIFF")
    start = struct.unpack("<I", ring[4:8])[0]
    after = start + 2 + 12 * struct.unpack("<H", ring[start : start + 2])[0]
    case("TIFF whose next page is the first", "tif", ring[:after] + ring[4:8] + ring[after + 4 :], Good(SMOOTH))


for fill in (whole_and_damaged, foreign_formats, modes, frames, exif, structures):
    fill()


@pytest.fixture
def no_interpreters(tmp_path, monkeypatch):
    """Programs that Pillow could start leave a trace instead."""
    trace = tmp_path / "started"
    for name in ("gs", "gswin64c", "djpeg", "xv"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {trace}\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    yield
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", CASES)
def test_an_image_is_right_or_an_error_names_it(name, tmp_path, no_interpreters, caplog):
    ending, content, verdict = CASES[name]
    for label in ("ant", "bee"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "fine.png").write_bytes(encoded(SMOOTH, "PNG"))
    file = tmp_path / "data" / "ant" / f"odd.{ending}"
    file.write_bytes(content)
    options = {"train_dir": str(tmp_path / "data"), "train_val_split": None, "splits": ("train",)}
    split = load_image_data(**options).splits["train"]
    assert split.labels.tolist() == [0, 0, 1]
    if isinstance(verdict, Good):
        pixels = split[1]["pixel_values"].permute(1, 2, 0).numpy().astype(float)
        assert pixels.shape[:2] == verdict.image.size[::-1]
        assert np.abs(pixels - np.asarray(verdict.image)).mean() <= verdict.difference
        return
    with pytest.raises(BadImageError, match=rf"(?s)Cannot decode {file} .*: .*({verdict.reason}).*--skip_bad_images"):
        split[1]
    with caplog.at_level(logging.WARNING):
        kept = load_image_data(**options, skip_bad_images=True).splits["train"]
    assert (len(list(kept)), kept.num_skipped) == (2, 1)
    assert str(file) in caplog.text


def test_the_table_is_long_enough():
    assert len(CASES) >= 100
