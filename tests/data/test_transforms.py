import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from gen.data import transforms
from gen.data.metadata import without_metadata
from gen.data.transforms import (
    adm_random_crop,
    center_crop,
    decode,
    decode_pixels,
    encode_png,
    fit,
    random_flip,
    squeeze,
    treatments,
)
from gen.errors import GenError
from tests.data.files import picture, png


def file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_rotation_marks_are_applied() -> None:
    image = Image.fromarray(picture(0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    turned = decode(file(image, exif=exif), "x")
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(picture(0, 8, 16), -1))


def test_every_kind_of_pixels_becomes_rgb() -> None:
    grey = picture(0)[..., 0]
    np.testing.assert_array_equal(np.asarray(decode(png(grey), "x")), np.repeat(grey[..., None], 3, axis=-1))
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = [255, 0, 0, 255]
    seen = np.asarray(decode(png(clear), "x"))
    assert seen[0, 0].tolist() == [255, 0, 0]
    assert seen[3, 3].tolist() == [255, 255, 255]  # transparent lies over white
    deep = np.array([[0, 255, 256, 65535]], np.uint16)
    assert np.asarray(decode(png(deep), "x", channels=1)).tolist() == [[0, 0, 1, 255]]
    assert np.asarray(decode(b"P5 2 1 65535\n\x12\xff\xab\x00", "x", channels=1)).tolist() == [[0x12, 0xAB]]
    palette = Image.fromarray(picture(1)).quantize(8)
    np.testing.assert_array_equal(np.asarray(decode(file(palette), "x")), np.asarray(palette.convert("RGB")))
    palette.info["transparency"] = 0
    assert decode(file(palette, transparency=0), "x").mode == "RGB"
    assert decode(file(Image.fromarray(picture(2)).convert("CMYK"), "JPEG"), "x").mode == "RGB"
    assert decode(png(picture(3)), "x", channels=1).mode == "L"


def test_what_decoding_does_is_told() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(picture(0))
    animation = io.BytesIO()
    image.save(animation, "GIF", save_all=True, append_images=[Image.fromarray(picture(1))])
    for data, expected in (
        (file(image), []),
        (b"rubbish", []),
        (file(image, "JPEG", exif=exif), ["turned as EXIF says"]),
        (file(image.convert("RGBA")), ["transparency laid over white"]),
        (file(image.convert("LA")), ["transparency laid over white", "grey to RGB"]),
        (file(image.quantize(8)), ["palette to RGB"]),
        (file(image.convert("CMYK"), "JPEG"), ["CMYK to RGB"]),
        (png(np.array([[0, 65535]], np.uint16)), ["grey to RGB", "16 bits to the upper 8"]),
    ):
        assert treatments(data) == expected
    assert "first frame of an animation" in treatments(animation.getvalue())


def test_unreadable_images_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = png(picture(0))
    for data, message in (
        (b"", "a.png is not a readable image"),
        (b"%!PS-Adobe", "no known image format"),
        (whole[: len(whole) // 2], "a.png is not a readable image"),
        (file(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "32-bit pixels"),
    ):
        with pytest.raises(GenError, match=message):
            decode(data, "a.png")
    monkeypatch.setattr(transforms, "MAX_PIXELS", 100)
    with pytest.raises(GenError, match=r"a\.png is 16 x 12; expected at most 100 pixels"):
        decode(whole, "a.png")


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "grey", "progressive", "exif", "restarts"])
def test_the_quick_decoder_gives_the_same_pixels(subsampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    options: dict[str, object] = {"progressive": True} if subsampling == "progressive" else {}
    if subsampling == "restarts":
        options = {"restart_marker_blocks": 2}
    if ":" in subsampling:
        options = {"subsampling": subsampling}
    exif = Image.Exif()
    exif[0x0112] = 6
    for height, width in ((37, 53), (16, 16), (1, 9)):
        image = Image.fromarray(picture(height, height, width)).resize((width, height), Image.Resampling.BOX)
        image = image.convert("L") if subsampling == "grey" else image
        data = file(image, "JPEG", quality=81, **(options | ({"exif": exif} if subsampling == "exif" else {})))
        for channels in (3, 1):
            with monkeypatch.context() as patch:
                quick = decode_pixels(data, "x", channels)
                assert (transforms._plain_jpeg(data) is None) == (subsampling == "exif")
                np.testing.assert_array_equal(
                    np.asarray(decode(data, "x", channels)), quick.squeeze(-1) if channels == 1 else quick
                )
                patch.setattr(transforms, "_simplejpeg", lambda: None)
                np.testing.assert_array_equal(quick, decode_pixels(data, "x", channels))
            assert quick.shape[2] == channels


def test_jpegs_that_take_hours_or_are_cut_off_are_refused() -> None:
    whole = file(Image.fromarray(picture(0)), "JPEG", progressive=True)
    with pytest.raises(GenError, match="x has more than 200 JPEG scans"):
        decode(whole[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 200 + whole[-2:], "x")
    with pytest.raises(GenError, match="x is not a readable image"):
        decode_pixels(whole[: len(whole) // 2], "x")


def test_png_files_are_those_of_the_pixels() -> None:
    for pixels in (picture(0), picture(1, 1, 1), picture(2)[..., 0]):
        with Image.open(io.BytesIO(encode_png(Image.fromarray(pixels)))) as image:
            image.verify()  # checksums
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(Image.fromarray(pixels))))), pixels)


def test_crops() -> None:
    image = Image.fromarray(picture(0, 20, 30))
    np.testing.assert_array_equal(np.asarray(center_crop(image, 20)), picture(0, 20, 30)[:, 5:25])
    assert squeeze(image, 7, "box").size == (7, 7)
    assert fit(image, "none", None) is image
    for name in ("adm", "center", "squeeze"):
        assert fit(image, name, 11).size == (11, 11)
    rng = np.random.default_rng(0)
    crops = [np.asarray(adm_random_crop(rng, image, 16)) for _ in range(4)]
    assert all(crop.shape == (16, 16, 3) for crop in crops)
    assert not all((crop == crops[0]).all() for crop in crops)
    with pytest.raises(GenError, match="too unequal"):
        fit(Image.new("L", (1, 1_000_000)), "adm", 256)


def test_flip_is_a_coin() -> None:
    image = picture(0)
    rng = np.random.default_rng(0)
    flipped = [bool((random_flip(rng, image) == image[:, ::-1]).all()) for _ in range(100)]
    assert 30 < sum(flipped) < 70


def chunk(name: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """A block of a PNG file."""
    checksum = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def segment(marker: int, data: bytes) -> bytes:
    """A segment of a JPEG file."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


WILD = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0ab\0\0\0\0\0\0"  # an orientation that is text
BROKEN = {
    "EXIF of a PNG": ("PNG", 33, chunk(b"eXIf", b"junkjunk")),
    "EXIF behind the pixels of a PNG": ("PNG", -12, chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")),
    "a text of a PNG with another checksum": ("PNG", 33, chunk(b"tEXt", b"a\0b", 0)),
    "such a text behind the pixels": ("PNG", -12, chunk(b"tEXt", b"a\0b", 0)),
    "a text of a PNG of 80 MB": ("PNG", 33, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(80 << 20)))),
    "a large colour profile of a PNG": ("PNG", 33, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(3 << 20)))),
    "XMP of a PNG": ("PNG", 33, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0cut")),
    "EXIF of a JPEG": ("JPEG", 2, segment(0xE1, WILD)),
    "cut EXIF of a JPEG": ("JPEG", 2, segment(0xE1, b"Exif\0\0II*")),
    "a colour profile of a JPEG": ("JPEG", 2, segment(0xE2, b"ICC_PROFILE\0\x09\x01xxx")),
    "cut XMP of a JPEG": ("JPEG", 2, segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="')),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("case", BROKEN)
def test_broken_metadata_are_left_out_where_pixels_are_good(case: str) -> None:
    kind, at, block = BROKEN[case]
    good = file(Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)), kind)
    data = good[:at] + block + good[at:]
    np.testing.assert_array_equal(np.asarray(decode(data, "x")), np.asarray(decode(good, "x")))
    assert set(treatments(data)) <= {"metadata broken, left out"}


def test_broken_exif_of_a_webp_is_left_out() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))
    good = file(image, "WEBP", lossless=True, exif=b"Exif\0\0junkjunk", icc_profile=b"junk")
    np.testing.assert_array_equal(np.asarray(decode(good, "x")), np.asarray(image))
    np.testing.assert_array_equal(np.asarray(decode(without_metadata(good), "x")), np.asarray(image))
    for length in range(len(good)):
        without_metadata(good[:length])  # ends, whatever the lengths inside say
