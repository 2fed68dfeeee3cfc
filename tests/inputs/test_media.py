"""Pictures from everywhere: each source, format, colour mode and orientation, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from saccade.base.errors import MediaError
from saccade.inputs.media import MediaLimits, open_picture

LIMITS = MediaLimits()


def photo(width: int = 40, height: int = 30) -> Image.Image:
    """A smooth picture with three different channels, so that lossy codecs stay close and no flip looks like another."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x + 2 * y) * 80 // (width + height)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(source: object) -> np.ndarray:
    return np.asarray(open_picture(source, LIMITS).image).astype(int)


# --- sources ---------------------------------------------------------------------------------------------------------


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    image = photo()
    data = encode(image, "PNG")
    path = tmp_path / "a picture#1.png"
    path.write_bytes(data)
    array = np.asarray(image)
    text = base64.b64encode(data).decode()
    sources = [
        str(path),
        path,
        path.as_uri(),
        f"file://{path}",
        data,
        bytearray(data),
        memoryview(data),
        io.BytesIO(data),
        f"data:image/png;base64,{text}",
        f"data:image;base64,{text}",
        f"DATA:image/png;charset=x;base64,{text[:20]}\n{text[20:]}",
        image,
        array,
        array.transpose(2, 0, 1),
        array[::-1, ::-1][::-1, ::-1],
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        torch.from_numpy(array / np.float32(255)),
        torch.from_numpy(array / np.float64(255)),
        array.astype(np.uint16) << 8,
    ]
    for source in sources:
        np.testing.assert_array_equal(pixels(source), array)


def test_grey_arrays_may_leave_out_the_channel() -> None:
    grey = np.arange(600, dtype=np.uint8).reshape(20, 30)
    expected = np.stack([grey] * 3, axis=-1)
    for source in (grey, grey[:, :, None], grey[None]):
        np.testing.assert_array_equal(pixels(source), expected)


@pytest.mark.parametrize("shape", [(3, 20, 3), (5, 20, 20), (20, 20, 2), (20,), (2, 3, 20, 20), (0, 20, 3), (20, 0)])
def test_arrays_of_unclear_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MediaError):
        open_picture(np.zeros(shape, np.uint8), LIMITS)


@pytest.mark.parametrize(
    "array", [np.full((8, 8), 3.0), np.full((8, 8), np.nan), np.zeros((8, 8), np.int64), np.zeros((8, 8), object)]
)
def test_arrays_of_unclear_range_are_refused(array: np.ndarray) -> None:
    with pytest.raises(MediaError):
        open_picture(array, LIMITS)


def test_the_receipt_hashes_the_encoded_bytes() -> None:
    data = encode(photo(), "PNG")
    assert open_picture(data, LIMITS).sha256 == hashlib.sha256(data).hexdigest()


def test_equal_bytes_of_another_shape_have_another_hash() -> None:
    a, b = (open_picture(np.zeros(shape, np.uint8), LIMITS).sha256 for shape in ((20, 30), (30, 20)))
    assert a != b


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/a.png", "https://example.com/a.png", "HTTPS://example.com", "ftp://x/y"]
)
def test_the_network_is_not_read_and_the_answer_says_what_to_do(url: str) -> None:
    with pytest.raises(MediaError, match="download it first"):
        open_picture(url, LIMITS)


def test_local_paths_can_be_switched_off(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(photo(), "PNG"))
    closed = MediaLimits(allow_local_paths=False)
    for source in (path, str(path), path.as_uri()):
        with pytest.raises(MediaError, match="switched off"):
            open_picture(source, closed)
    open_picture(path.read_bytes(), closed)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "missing.png",
        "a\0b",
        "x" * 5000,
        "file://elsewhere/a.png",
        "/",
        None,
        7,
        object(),
        b"",
        b"text",
        io.StringIO("text"),
        "data:image/png,abc",
        "data:image/png;base64,@@@@",
        "data:image/png;base64,",
        "data:",
    ],
)
def test_what_is_no_picture_is_refused_in_words(source: object) -> None:
    with pytest.raises(MediaError) as caught:
        open_picture(source, LIMITS)
    assert len(str(caught.value)) < 400
    assert "0x" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_or_device_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(MediaError, match="regular file"):
            open_picture(path, LIMITS)


# --- formats and colour ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("TIFF", {"compression": "tiff_adobe_deflate"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 20),
        ("JPEG", {"quality": 95}, 20),
        ("JPEG", {"quality": 95, "progressive": True}, 20),
        ("GIF", {}, 40),
    ],
)
def test_each_format_is_read(format: str, options: dict[str, Any], tolerance: int) -> None:
    image = photo()
    assert np.abs(pixels(encode(image, format, **options)) - np.asarray(image)).max() <= tolerance


def test_transparency_is_white_in_every_mode() -> None:
    rgba = photo().convert("RGBA")
    rgba.putalpha(Image.fromarray(np.linspace(0, 255, 40 * 30).astype(np.uint8).reshape(30, 40)))
    expected = np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    for source in (
        rgba,
        encode(rgba, "PNG"),
        encode(rgba, "WEBP", lossless=True, exact=True),
        encode(rgba, "TIFF"),
        np.asarray(rgba),
    ):
        np.testing.assert_array_equal(pixels(source), expected)
    grey = rgba.convert("LA")
    assert (pixels(encode(grey, "PNG"))[0, :3] == 255).all()  # alpha 0 in the first pixels
    palette = photo().convert("P", palette=Image.Palette.ADAPTIVE)
    first = palette.getpixel((0, 0))
    data = encode(palette, "PNG", transparency=first)
    assert (pixels(data)[0, 0] == 255).all()
    assert (pixels(encode(palette, "GIF", transparency=first))[0, 0] == 255).all()


def test_palette_grey_and_one_bit_pictures_become_rgb() -> None:
    for mode in ("P", "L", "1"):
        image = photo().convert(mode)
        np.testing.assert_array_equal(pixels(encode(image, "PNG")), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_is_converted_as_pillow_does() -> None:
    data = encode(photo().convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(pixels(data) - np.asarray(photo())).mean() < 10


def test_16_bit_grey_keeps_its_high_byte_and_says_so() -> None:
    values = np.arange(0, 65536, 50, dtype=np.uint16)[:1200].reshape(30, 40)
    for format in ("PNG", "TIFF"):
        picture = open_picture(encode(Image.fromarray(values), format), LIMITS)
        np.testing.assert_array_equal(np.asarray(picture.image)[:, :, 0], values >> 8)
        assert "16-bit" in picture.notes[0]


def test_only_the_first_frame_of_an_animation_counts() -> None:
    frames = [photo(), *(Image.new("RGB", (40, 30), colour) for colour in ("red", "green"))]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert np.abs(pixels(data) - np.asarray(photo())).max() <= 40


# --- orientation -----------------------------------------------------------------------------------------------------

TO_STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TO_STORED)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photo_is_turned_upright(format: str, orientation: int) -> None:
    upright = photo()
    transpose = TO_STORED[orientation]
    stored = upright if transpose is None else upright.transpose(transpose)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    picture = open_picture(encode(stored, format, exif=exif, **options), LIMITS)
    assert picture.orientation == orientation
    assert picture.image.size == upright.size
    assert np.abs(np.asarray(picture.image).astype(int) - np.asarray(upright)).max() <= 12


def test_a_decoded_pillow_image_is_left_as_its_owner_turned_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encode(photo(), "JPEG", exif=exif)))
    picture = open_picture(image, LIMITS)
    assert picture.image.size == (40, 30)
    assert picture.orientation == 1


def test_a_pillow_image_that_turns_out_truncated_is_refused() -> None:
    data = encode(photo(200, 150), "PNG")
    with pytest.raises(MediaError, match="PIL image"):
        open_picture(Image.open(io.BytesIO(data[:-200])), LIMITS)


def test_unreadable_exif_costs_the_orientation_and_nothing_else() -> None:
    data = encode(photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert open_picture(data, LIMITS).orientation == 1


# --- hostile files ---------------------------------------------------------------------------------------------------


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *extra: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(min(height, 50) * (1 + 3 * min(width, 50))))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def tiff_with(entries: list[tuple[int, int, int, int]], size: int) -> bytes:
    body = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    body += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return body + bytes(size)


def bombs() -> dict[str, bytes]:
    screen = struct.pack("<HHBBB", 60000, 60000, 0, 0, 0)
    descriptor = b"\x2c" + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0)
    jpeg = bytearray(encode(photo(), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    baseline = encode(photo(), "JPEG", progressive=True)
    bmp = bytearray(encode(photo(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60000, 60000)
    webp = b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\x3f\0" * 2
    small = [(256, 3, 1, 40), (257, 3, 1, 30), (262, 3, 1, 1), (273, 4, 1, 200), (279, 4, 1, 1200)]
    return {
        "PNG of 60000 x 60000": png(60000, 60000),
        "JPEG of 60000 x 60000": bytes(jpeg),
        "JPEG of thousands of scans": baseline[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0\0" * 5000 + b"\xff\xd9",
        "GIF screen": b"GIF89a" + screen + descriptor,
        "GIF frame beyond its screen": b"GIF89a"
        + struct.pack("<HHBBB", 9, 9, 0, 0, 0)
        + b"!\xf9\4\x08\0\0\0\0"
        + descriptor,
        "GIF of comments": b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b"!\xfe\1a\0" * 500_000,
        "BMP of 60000 x 60000": bytes(bmp),
        "WebP canvas": webp,
        "TIFF tags that share one megabyte": tiff_with([(tag, 7, 1 << 20, 0) for tag in range(300, 5000)], 1 << 20),
        "TIFF tile": tiff_with([*small, (322, 4, 1, 60000), (323, 4, 1, 60000)], 4000),
    }


BOMB_ANSWERS = "exceeds the limit|scans|before its first picture|more than the file does|tiles of"


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_and_costs_nothing(name: str) -> None:
    data = bombs()[name]
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(MediaError, match=BOMB_ANSWERS):
                open_picture(data, LIMITS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(data) + (1 << 20)


def test_metadata_that_inflates_is_never_inflated() -> None:
    text = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200 << 20)))
    profile = png_chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(200 << 20)))
    tracemalloc.start()
    try:
        assert open_picture(png(50, 50, text, profile), LIMITS).image.size == (50, 50)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_exif_that_names_the_same_bytes_many_times_is_never_expanded() -> None:
    exif = struct.pack(">2sHIH", b"MM", 42, 8, 4000) + b"".join(
        struct.pack(">HHII", tag, 7, 60_000, 0) for tag in range(4000)
    )
    data = encode(photo(), "JPEG", exif=b"Exif\0\0" + exif.ljust(60_000, b"\0"))
    tracemalloc.start()
    try:
        open_picture(data, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused(format: str) -> None:
    data = encode(photo(200, 150), format)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(MediaError):
            open_picture(data[: int(len(data) * share)], LIMITS)


def test_the_limits_on_bytes_hold_for_every_source(tmp_path: Path) -> None:
    data = encode(photo(), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    tight = MediaLimits(max_image_bytes=len(data) - 1)
    exact = MediaLimits(max_image_bytes=len(data))
    for source in (data, path, f"data:image/png;base64,{base64.b64encode(data).decode()}"):
        open_picture(source, exact)
        with pytest.raises(MediaError, match=r"limit|exceed"):
            open_picture(source, tight)
    with pytest.raises(MediaError, match="exceed"):
        open_picture(io.BytesIO(data), tight)


def test_the_limit_on_pixels_is_ours_and_exact() -> None:
    data = encode(photo(40, 30), "PNG")
    open_picture(data, MediaLimits(max_pixels_per_image=1200))
    for source in (data, photo(40, 30), np.asarray(photo(40, 30))):
        with pytest.raises(MediaError, match="1199"):
            open_picture(source, MediaLimits(max_pixels_per_image=1199))


def test_pillows_own_warning_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
            assert open_picture(encode(photo(), format), LIMITS).image.size == (40, 30)


def test_a_picture_whose_numbers_say_nothing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "numbers.tif"
    Image.fromarray(np.full((8, 8), 70_000, dtype=np.int32)).save(path)
    with pytest.raises(MediaError, match=r"numbers\.tif: values outside 0..65535"):
        open_picture(path, MediaLimits())
