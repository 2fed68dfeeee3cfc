"""Where media come from: paths, bytes, data URIs, Pillow images and arrays become upright RGB pictures or open files.

Knows containers' headers, orientation, colour modes and limits; knows no model sizes, no video streams and no prompts.
Everything read here may be hostile. A picture's declared size meets the limits before a decoder sees a byte of it, decoders
are shown only the parts of a file they need, and whatever a damaged file makes them raise leaves as a MediaError.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import os
import stat
import struct
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor

from saccade.base.errors import MediaError, OptionError
from saccade.inputs.options import MediaLimits as MediaLimits
from saccade.inputs.options import MediaOptions as MediaOptions

Pixels = NDArray[np.uint8]  # [H, W, 3] unless said otherwise


# --- encoded media ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A file's bytes, open at their start. `label` names the source in messages and never holds content."""

    stream: BinaryIO
    num_bytes: int
    label: str


def open_encoded(source: object, max_bytes: int, limits: MediaLimits) -> Encoded:
    """Opens a path, file URI, data URI, bytes or binary stream; the caller closes the stream.

    Local files must be regular files. Raises MediaError when the source is refused, absent, empty or above `max_bytes`.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
        if isinstance(source, bytes):
            source = os.fsdecode(source)
        return _open_file(str(source), max_bytes, limits)
    if isinstance(source, str):
        scheme = source[:16].partition(":")[0].lower()
        if scheme == "data":
            return _in_memory(_decode_data_uri(source, max_bytes), "data URI", max_bytes)
        if scheme in ("http", "https", "ftp", "s3"):
            raise MediaError(
                f"{_shorten(source)} is on the network, which is not read; download it first and pass the path"
            )
        if scheme == "file":
            return _open_file(_path_of_file_uri(source), max_bytes, limits)
        return _open_file(source, max_bytes, limits)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if memoryview(source).nbytes > max_bytes:
            raise _too_large("bytes", memoryview(source).nbytes, max_bytes)
        return _in_memory(bytes(source), "bytes", max_bytes)
    if hasattr(source, "read"):
        try:
            data = source.read(max_bytes + 1)
        except (OSError, ValueError) as error:
            raise MediaError("the stream cannot be read; open it in binary mode and leave it open") from error
        if not isinstance(data, bytes):
            raise MediaError("the stream yields text; open it in binary mode")
        return _in_memory(data, "stream", max_bytes)
    raise MediaError(
        f"a {type(source).__name__} is no medium; pass a path, bytes, a data URI, a Pillow image or an array"
    )


def _open_file(path: str, max_bytes: int, limits: MediaLimits) -> Encoded:
    label = _shorten(path)
    if not limits.allow_local_paths:
        raise MediaError(f"local path {label}: reading files is switched off here; send the bytes as a data URI")
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no such file"
        raise MediaError(f"cannot open {label}: {reason}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise MediaError(f"{label} is not a regular file")
    stream = os.fdopen(descriptor, "rb")
    if status.st_size == 0 or status.st_size > max_bytes:
        stream.close()
        raise _too_large(label, status.st_size, max_bytes) if status.st_size else MediaError(f"{label} is empty")
    return Encoded(stream, status.st_size, label)


def _path_of_file_uri(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{_shorten(uri)} names another machine; copy the file here and pass its path")
    # Published examples write file:// before paths that were never percent-encoded, '#' and '?' included.
    return unquote(uri[len("file:") :].removeprefix("//" + parts.netloc) if uri[5:7] == "//" else uri[len("file:") :])


def _decode_data_uri(uri: str, max_bytes: int) -> bytes:
    """The bytes of a base64 data URI; the subtype may be missing (`data:image;base64,`)."""
    comma = uri.find(",", 0, 1024)
    if comma < 0 or not uri[:comma].lower().endswith(";base64"):
        raise MediaError("the data URI is not base64; write it as data:image/png;base64,...")
    if (len(uri) - comma) * 3 // 4 > max_bytes * 1.05 + 1024:  # room for line breaks
        raise _too_large("data URI", (len(uri) - comma) * 3 // 4, max_bytes)
    try:
        text = b"".join(uri[comma + 1 :].encode("ascii").split()).translate(bytes.maketrans(b"-_", b"+/"))
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        raise MediaError("the data URI holds characters that are not base64; encode it again") from error


def _in_memory(data: bytes, label: str, max_bytes: int) -> Encoded:
    if not data:
        raise MediaError(f"{label}: empty")
    if len(data) > max_bytes:
        raise _too_large(label, len(data), max_bytes)
    return Encoded(io.BytesIO(data), len(data), label)


def _too_large(label: str, num_bytes: int, max_bytes: int) -> MediaError:
    return MediaError(
        f"{label}: {num_bytes} bytes exceed the limit of {max_bytes}; send a smaller file or raise the limit"
    )


def _shorten(text: str) -> str:
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A decoded picture: upright, RGB, 8 bits, at its original size."""

    image: Image.Image
    source: str
    sha256: str  # of the encoded bytes when there were any, else of the pixels and their shape
    orientation: int = 1  # EXIF orientation that was applied
    notes: tuple[str, ...] = ()

    @property
    def pixels(self) -> Pixels:
        return np.asarray(self.image)


def open_picture(source: object, limits: MediaLimits) -> Picture:
    """A picture from any source: path, file or data URI, bytes, binary stream, Pillow image, NumPy array or torch tensor.

    Orientation is applied to what is decoded here, not to a Pillow image, whose owner may have done so (section 5.3);
    transparency is composited on white. Arrays are [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4, in uint8, uint16
    (high byte) or floats in 0..1. Raises MediaError.
    """
    if isinstance(source, Image.Image):
        _check_area(source.size, "PIL image", limits)
        with _decoding("PIL image"):  # it may not have been read from its file yet
            image, notes = _to_rgb(source, "PIL image")
            return Picture(image, "PIL image", pixel_digest(np.asarray(image)), 1, notes)
    if isinstance(source, (np.ndarray, Tensor)):
        label = "NumPy array" if isinstance(source, np.ndarray) else "torch tensor"
        image, notes = _image_of_array(source, label, limits)
        return Picture(image, label, pixel_digest(np.asarray(image)), 1, notes)
    encoded = open_encoded(source, limits.max_image_bytes, limits)
    with encoded.stream, _decoding(encoded.label):
        data = encoded.stream.read(limits.max_image_bytes + 1)
        image, orientation, notes = _decode(data, encoded.label, limits)
        return Picture(image, encoded.label, hashlib.sha256(data).hexdigest(), orientation, notes)


def pixel_digest(pixels: NDArray[np.uint8]) -> str:
    """SHA-256 of raw pixels and their shape: equal bytes in another shape are another picture."""
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turns a stored raster [H, W, C] upright by its EXIF orientation (1 to 8). Returns a view."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


class _decoding:
    """Turns whatever a decoder raises on a damaged file into a MediaError, without the decoder's words.

    Pillow's plugins raise many types (OSError, SyntaxError, ValueError, struct.error, IndexError, ...) and some messages hold
    memory addresses, so all of them are answered here, with a text of our own.
    """

    def __init__(self, label: str) -> None:
        self.label = label

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (MediaError, OptionError)):
            raise MediaError(
                f"{self.label}: the picture is damaged, truncated or of an unsupported kind; save it anew, as PNG or JPEG"
            ) from error


def _decode(data: bytes, label: str, limits: MediaLimits) -> tuple[Image.Image, int, tuple[str, ...]]:
    """Decodes the first picture of a file. Returns (upright RGB image, orientation applied, notes)."""
    orientation, size = 1, (0, 0)
    reader: type[ImageFile.ImageFile]
    if data.startswith(b"\xff\xd8\xff"):
        data, orientation = _lean_jpeg(data, label)
        reader = JpegImagePlugin.JpegImageFile
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        data, orientation = _lean_png(data)
        reader = PngImagePlugin.PngImageFile
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _check_area(_webp_size(data), label, limits)
        reader = WebPImagePlugin.WebPImageFile
    elif data.startswith((b"GIF87a", b"GIF89a")):
        size = _gif_size(data, label)
        _check_area(size, label, limits)
        reader = GifImagePlugin.GifImageFile
    elif data.startswith(b"BM"):
        reader = BmpImagePlugin.BmpImageFile
    elif data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        _check_tiff(data, label)
        orientation = exif_orientation(data)
        reader = TiffImagePlugin.TiffImageFile
    else:
        raise MediaError(f"{label}: not a picture of a known format; use JPEG, PNG, WebP, GIF, BMP or TIFF")
    # The plugin's class is called directly: Image.open would first apply Pillow's own, global size limit and warn on stderr.
    with _unwarned(size):
        image = reader(io.BytesIO(data))
    with image:
        _check_area(image.size, label, limits)
        with _unwarned(image.size):
            image.load()
        if reader is WebPImagePlugin.WebPImageFile:
            orientation = exif_orientation(image.info.get("exif", b""))
        rgb, notes = _to_rgb(image, label)
    if orientation != 1 and reader is not TiffImagePlugin.TiffImageFile:  # Pillow turns TIFF pictures upright by itself
        rgb = Image.fromarray(np.ascontiguousarray(upright(np.asarray(rgb), orientation)))
    return rgb, orientation, notes


def _unwarned(size: tuple[int, int]) -> AbstractContextManager[object]:
    """Keeps Pillow's warning about large pictures off stderr. Filters are the whole process's: touched only when needed."""
    if size[0] * size[1] <= (Image.MAX_IMAGE_PIXELS or math.inf):
        return nullcontext()
    return warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)


def _check_area(size: tuple[int, int], label: str, limits: MediaLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{label}: picture of {width} x {height} pixels has no area")
    if width * height > limits.max_pixels_per_image:
        raise MediaError(
            f"{label}: picture of {width} x {height} pixels exceeds the limit of {limits.max_pixels_per_image}; shrink it first"
        )


# --- headers: what a decoder need not see, and sizes that must be known before it starts ------------------------------

_MAX_JPEG_SCANS = 500  # each costs a pass over the whole picture; real progressive files have about ten
_MAX_GIF_PREAMBLE = 1 << 20  # bytes before the first picture


def _lean_jpeg(data: bytes, label: str) -> tuple[bytes, int]:
    """A JPEG file without comments and application segments, but for JFIF and Adobe's (which tell the colour space).

    Metadata such as EXIF can name the same bytes thousands of times over, and Pillow expands it when it opens a file.
    Returns (file, EXIF orientation).
    """
    if data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise MediaError(
            f"{label}: JPEG with {data.count(bytes((0xFF, 0xDA)))} scans; save it again as a baseline JPEG"
        )
    kept = [b"\xff\xd8"]
    orientation = 1
    at = 2
    while 0 <= at < len(data) - 3:
        marker = data[at + 1]
        if data[at] != 0xFF:  # bytes between segments mean nothing
            at = data.find(b"\xff", at)
            continue
        if marker == 0xFF:
            at += 1
            continue
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # no content
            at += 2
            continue
        if marker == 0xDA:  # the scan: from here on, pixels
            kept.append(data[at:])
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and orientation == 1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = exif_orientation(data[at + 10 : end])
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at:end])
        at = end
    return b"".join(kept), orientation


def _lean_png(data: bytes) -> tuple[bytes, int]:
    """A PNG file with only the chunks its first picture needs; text and profiles may inflate without end.

    Returns (file, EXIF orientation).
    """
    kept = [data[:8]]
    orientation = 1
    at = 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[at:end])
        elif name == b"eXIf":
            orientation = exif_orientation(data[at + 8 : end - 4])
        if name == b"IEND":
            break
        at = end
    return b"".join(kept), orientation


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas size (width, height) from the first chunk. Raises struct.error on a short file."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _gif_size(data: bytes, label: str) -> tuple[int, int]:
    """Size (width, height) of the screen and the first picture together. Raises IndexError or struct.error on a short file."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while data[at] != 0x2C and at < _MAX_GIF_PREAMBLE:  # up to the first picture
        if data[at] == 0x21:
            at += 2
            while data[at] and at < _MAX_GIF_PREAMBLE:
                at += data[at] + 1
        at += 1
    if at >= _MAX_GIF_PREAMBLE:
        raise MediaError(f"{label}: GIF with over {_MAX_GIF_PREAMBLE} bytes before its first picture; save it again")
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
    return max(width, left + frame_width), max(height, top + frame_height)


_TIFF_TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_TIFF_SUBDIRECTORIES = (34665, 34853, 40965)  # EXIF, GPS, interoperability: Pillow reads them with the picture
_MAX_TILE_PIXELS = 1 << 24


def _check_tiff(data: bytes, label: str) -> None:
    """Refuses a TIFF whose tags point at more bytes than it has (the same ones, many times), or with tiles out of proportion."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    entry = struct.Struct(order + ("HHQ8s" if is_big else "HHI4s"))
    count = struct.Struct(order + ("Q" if is_big else "H"))
    offset = struct.Struct(order + ("Q" if is_big else "I"))
    directories = [offset.unpack_from(data, 8 if is_big else 4)[0]]
    tile = {322: 1, 323: 1}
    num_bytes = 0
    for directory in directories:  # grows while we walk
        (num_entries,) = count.unpack_from(data, directory)
        if num_entries > 65535 or len(directories) > 16:
            raise MediaError(f"{label}: TIFF directory with {num_entries} entries; save it again")
        for index in range(num_entries):
            tag, kind, number, value = entry.unpack_from(data, directory + count.size + index * entry.size)
            size = number * _TIFF_TYPE_BYTES.get(kind, 0)
            num_bytes += size if size > len(value) else 0
            if num_bytes > 2 * len(data):
                raise MediaError(f"{label}: TIFF whose tags hold more than the file does; save it again")
            if tag in _TIFF_SUBDIRECTORIES and kind in (4, 13, 16, 18):
                directories.append(offset.unpack(value)[0])
            if tag in tile and number == 1 and kind in (3, 4):
                (tile[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), value)
    if tile[322] * tile[323] > _MAX_TILE_PIXELS:
        raise MediaError(f"{label}: TIFF with tiles of {tile[322]} x {tile[323]} pixels; save it with smaller tiles")


def exif_orientation(exif: bytes) -> int:
    """Orientation (1 to 8) in an EXIF block or a TIFF file; 1 when it is absent or unreadable."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or exif[2:4] in (b"+\0", b"\0+"):
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (num_entries,) = struct.unpack_from(order + "H", exif, directory)
        for index in range(num_entries):
            tag, kind = struct.unpack_from(order + "HH", exif, directory + 2 + index * 12)
            if tag == 0x0112 and kind in (3, 4):
                (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), exif, directory + 10 + index * 12)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


# --- colour ----------------------------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image, label: str) -> tuple[Image.Image, tuple[str, ...]]:
    """8-bit RGB on white (section 5.3). Returns (image, notes). Raises MediaError for modes that have no such form."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey, note = _to_8_bits(values, f"{image.mode} grey", label)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey = np.where(values == transparent, np.uint8(255), grey)
        return Image.fromarray(grey).convert("RGB"), (note,)
    image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB"), ()
    return (image if image.mode == "RGB" else image.convert("RGB")), ()


def _to_8_bits(values: NDArray[Any], what: str, label: str) -> tuple[Pixels, str]:
    """Numbers of more than 8 bits as uint8, and a note saying how. Raises MediaError when their range says nothing."""
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise MediaError(f"{label}: values outside 0..1; scale them to 0..1 or convert them to 8 bits")
        return np.rint(values.astype(np.float32) * 255).astype(np.uint8), f"{what} scaled from 0..1 to 8 bits"
    if values.min() < 0 or values.max() > 65535:
        raise MediaError(f"{label}: values outside 0..65535; convert them to 8 or 16 bits")
    return (values >> 8).astype(np.uint8), f"16-bit {what} scaled to 8 bits"


def _image_of_array(
    array: NDArray[Any] | Tensor, label: str, limits: MediaLimits
) -> tuple[Image.Image, tuple[str, ...]]:
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    shape = tuple(array.shape)
    if array.ndim == 2:
        array = array[:, :, None]
    channels_first, channels_last = (array.ndim == 3 and array.shape[axis] in (1, 3, 4) for axis in (0, 2))
    if channels_first and channels_last and len(shape) == 3:
        raise MediaError(
            f"{label} of shape {shape}: height x width x channels or channels first? pass a Pillow image instead"
        )
    if not (channels_first or channels_last):
        raise MediaError(f"{label} of shape {shape} is no picture; pass [H, W], [H, W, 3] or [3, H, W]")
    if channels_first and not channels_last:
        array = array.transpose(1, 2, 0)
    _check_area((array.shape[1], array.shape[0]), label, limits)
    notes: tuple[str, ...] = ()
    if array.dtype.kind == "f" or array.dtype == np.uint16:
        array, note = _to_8_bits(array, label, label)
        notes = (note,)
    elif array.dtype != np.uint8:
        raise MediaError(f"{label} of {array.dtype}: pass uint8, uint16 or floats in 0..1")
    pixels = np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array)
    return _to_rgb(Image.fromarray(pixels), label)[0], notes
