"""Image files to arrays of one size: decoding that treats every kind of file on purpose, crops and resizing.

What decoding does, so that nobody has to guess:

- EXIF rotation is applied; then the mark is gone.
- Transparency (alpha channel, transparent palette entry) is laid over white.
- Palette and CMYK images become RGB; with ``channels=1`` everything becomes luma (ITU-R 601).
- 16-bit greys keep their upper eight bits (v // 256), as Pillow does for 16-bit RGB; floating-point and 32-bit
  files, which have no defined range, are refused.
- Of animations the first frame counts.
- Metadata that are broken (EXIF, colour profile, XMP, texts) are left out where the pixels are good; an EXIF block that
  cannot be read turns nothing. Colour profiles are not applied, good or broken.

With the extra ``simplejpeg`` installed, plain JPEG files (no EXIF or XMP block, colour or grey) are decoded by it, in
less than half the time. Both libraries run the same libjpeg-turbo arithmetic (accurate DCT, smooth upsampling), so the
pixels are equal bit for bit (a test compares them), and what it does not take without a warning goes to Pillow.
"""

import contextlib
import functools
import io
import logging
import math
import struct
import warnings
import zlib
from types import ModuleType
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from gen.data.metadata import without_metadata
from gen.errors import GenError

__all__ = ["CROPS", "FILTERS", "MAX_PIXELS", "Crop", "Filter", "adm_center_crop", "adm_random_crop", "center_crop"]
__all__ += ["decode", "decode_pixels", "encode_png", "fit", "random_flip", "squeeze", "treatments"]

MAX_PIXELS = 100_000_000  # of one image: 300 MB decoded; more is a mistake or an attack
MAX_SCANS = 200  # of a progressive JPEG; a file of many empty ones takes hours to decode
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "GIF", "TIFF", "AVIF")  # none of them runs a program
Crop = Literal["none", "adm", "center", "squeeze", "random"]
Filter = Literal["lanczos", "box", "bicubic"]
CROPS: tuple[str, ...] = ("none", "adm", "center", "squeeze", "random")
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
}
_CLEAR = ("RGBA", "LA", "PA", "RGBa", "La")  # modes with transparency
# Pillow warns of what is checked here, or of harmless metadata. Said once: changing filters is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it logs of damaged files is in the error as well


def decode(data: bytes, name: str, channels: int = 3) -> Image.Image:
    """Gives an image file's content as a Pillow image of mode RGB (channels 3) or L (1); see the module's rules.

    Args:
      data: the file's bytes: PNG, JPEG, WebP, AVIF, BMP, PPM, GIF or TIFF.
      name: what errors call it.
      channels: 3 or 1.

    Raises:
      GenError: not an image, cut off or damaged, more than `MAX_PIXELS` pixels, numbers of no defined range.
    """
    plain = _plain_jpeg(data)
    return _by_pillow(data, name, channels) if plain is None else _with_channels(Image.fromarray(plain), channels)


def decode_pixels(data: bytes, name: str, channels: int = 3) -> np.ndarray:
    """Gives what `decode` gives as an array (H, W, channels) uint8; raises what it raises."""
    plain = _plain_jpeg(data)
    if plain is None:
        plain = np.asarray(_by_pillow(data, name, channels))
    elif plain.ndim != channels:
        plain = np.asarray(_with_channels(Image.fromarray(plain), channels))
    return plain.reshape(*plain.shape[:2], channels)


def treatments(data: bytes) -> list[str]:
    """Gives what `decode` does to an image file besides decoding it to RGB, in words; reads its head only.

    Nothing for a plain file, and for one that cannot be opened.
    """
    image = None
    for part in (data, without_metadata(data)):
        with contextlib.suppress(Exception):  # whoever decodes it will say so
            image = Image.open(io.BytesIO(part), formats=FORMATS)
            break
    if image is None:
        return []
    turned, moving = _orientation(image), getattr(image, "is_animated", False)
    clear = image.mode in _CLEAR or "transparency" in image.info
    found = {
        "metadata broken, left out": part != data or turned is None,
        "turned as EXIF says": turned not in (None, 1),
        "transparency laid over white": clear,
        "palette to RGB": image.mode in ("P", "PA"),
        "CMYK to RGB": image.mode == "CMYK",
        "grey to RGB": image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I"),
        "16 bits to the upper 8": image.mode.startswith("I"),
        "first frame of an animation": moving,
    }
    return [name for name, done in found.items() if done]


def encode_png(image: Image.Image) -> bytes:
    """Gives an RGB or L image as a PNG file of unfiltered, uncompressed rows: large, and quickest to write and to read.

    A quarter of the time that Pillow takes without compression, which tries every filter on every row.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), np.uint8)  # each begins with its filter: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b""))
    out = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(out)


def _by_pillow(data: bytes, name: str, channels: int) -> Image.Image:
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_SCANS:
        raise GenError(f"{name} has more than {MAX_SCANS} JPEG scans; save it again or leave it out")
    try:
        return _loaded(data, name, channels)
    except GenError:
        raise
    except MemoryError:
        raise GenError(f"{name} does not fit in memory; make it smaller or leave it out") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        bare = without_metadata(data)
        if bare != data:
            with contextlib.suppress(Exception):  # what is wrong with the whole file is said
                return _loaded(bare, name, channels)
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        if "cannot identify" in reason:
            reason = f"no known image format among {', '.join(FORMATS)}"
        raise GenError(f"{name} is not a readable image ({reason}); repair it or leave it out") from None


def _loaded(data: bytes, name: str, channels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise GenError(
            f"{name} is {image.width} x {image.height}; expected at most {MAX_PIXELS} pixels, "
            "make it smaller or leave it out"
        )
    image.load()
    if _orientation(image) not in (None, 1):  # otherwise every image is copied, turned or not
        ImageOps.exif_transpose(image, in_place=True)
    return _converted(image, name, channels)


def _orientation(image: Image.Image) -> int | None:
    """The EXIF mark of how the image is turned, 1 for not at all; None when the block cannot be read."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # its entries may point anywhere
        return None


def _plain_jpeg(data: bytes) -> np.ndarray | None:
    """(H, W, 3) or (H, W) uint8 of a JPEG that needs no treatment; None for all else and without simplejpeg."""
    library = _simplejpeg()
    if library is None or data[:3] != b"\xff\xd8\xff" or b"Exif\0" in data or b"http://ns.adobe.com/xap" in data:
        return None
    try:
        height, width, space, _ = library.decode_jpeg_header(data)
        if space not in ("YCbCr", "Gray") or height * width > MAX_PIXELS or data.count(b"\xff\xda") > MAX_SCANS:
            return None
        pixels: np.ndarray = library.decode_jpeg(data, "RGB" if space == "YCbCr" else "GRAY", strict=True)
    except ValueError:  # damaged, or merely odd: Pillow judges
        return None
    return pixels if space == "YCbCr" else pixels[..., 0]


@functools.cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    module: ModuleType = simplejpeg
    return module


def _converted(image: Image.Image, name: str, channels: int) -> Image.Image:
    if image.mode in ("I", "F"):
        # Pillow has 16-bit PNG greys as I;16; what it opens as I or F has 32 bits, except for PPM's 16-bit greys.
        if not (image.mode == "I" and image.format == "PPM"):
            raise GenError(f"{name} has 32-bit pixels of no defined range; expected 8 or 16 bits, convert it")
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    elif image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, np.uint16) // 256).astype(np.uint8))
    if image.mode in _CLEAR or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _with_channels(image, channels)


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    """RGB or L; an image that is it already is not copied."""
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def _resized(image: Image.Image, width: int, height: int, filter: Filter) -> Image.Image:
    if width * height > MAX_PIXELS:
        raise GenError(
            f"an image of {image.width} x {image.height} would become {width} x {height}; its sides are too unequal "
            "to be cropped to a square, leave it out"
        )
    return image.resize((max(1, width), max(1, height)), FILTERS[filter])


def _halved(image: Image.Image, size: int) -> Image.Image:
    """Halves both sides by averaging while the short one is at least twice `size`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), FILTERS["box"])
    return image


def _short_side(image: Image.Image, short: int) -> Image.Image:
    """Bicubic, so that the short side is `short`; keeps the aspect ratio up to rounding."""
    scale = short / min(image.size)
    return _resized(image, round(image.width * scale), round(image.height * scale), "bicubic")


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Gives the centre square at `size`: box halving, bicubic to the short side, crop with floored offsets.

    As in ADM (Dhariwal and Nichol, 2021), which DiT, SiT, EDM2 and their followers prepare ImageNet with.
    """
    image = _short_side(_halved(image, size), size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def adm_random_crop(rng: np.random.Generator, image: Image.Image, size: int) -> Image.Image:
    """Gives a random square at `size`: the short side is resized to a uniform number from size to size / 0.8 (ADM)."""
    short = int(rng.integers(size, math.ceil(size / 0.8) + 1))
    image = _short_side(_halved(image, short), short)
    top, left = int(rng.integers(image.height - size + 1)), int(rng.integers(image.width - size + 1))
    return image.crop((left, top, left + size, top + size))


def center_crop(image: Image.Image, size: int, filter: Filter = "lanczos") -> Image.Image:
    """Gives the largest centre square, resized to `size` in one go (EDM's and StyleGAN's "center-crop")."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return _resized(image.crop((left, top, left + side, top + side)), size, size, filter)


def squeeze(image: Image.Image, size: int, filter: Filter = "lanczos") -> Image.Image:
    """Resizes the whole image to size x size; the aspect ratio is lost."""
    return _resized(image, size, size, filter)


def random_flip(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Gives image (H, W, C) uint8, mirrored left to right with probability 1/2."""
    if rng.random() >= 0.5:
        return image
    flipped = np.empty_like(image)
    for channel in range(image.shape[-1]):  # all at once, the innermost loop would be over a pixel's channels
        flipped[..., channel] = image[:, ::-1, channel]
    return flipped


def fit(image: Image.Image, crop: Crop, size: int | None, filter: Filter = "lanczos") -> Image.Image:
    """Applies one of the crops that need no chance, by name; "none" (and "random", which comes later) leaves the image
    as it is.
    """
    if size is None or crop in ("none", "random"):
        return image
    if crop == "adm":
        return adm_center_crop(image, size)
    return center_crop(image, size, filter) if crop == "center" else squeeze(image, size, filter)
