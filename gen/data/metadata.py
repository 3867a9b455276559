"""Image files without what is no pixels: EXIF, colour profiles, XMP and texts, for files where those are broken."""

__all__ = ["without_metadata"]

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (
    b"IHDR",
    b"PLTE",
    b"tRNS",
    b"IDAT",
    b"IEND",
)  # what the pixels are made from; acTL ... tell of further frames
_WEBP_KEPT = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")


def without_metadata(data: bytes) -> bytes:
    """Gives a PNG, JPEG or WebP file with only the blocks that pixels are decoded from; anything else as it is.

    Blocks are walked by their lengths; where those end, the rest is kept. Animated PNGs keep their first image.
    """
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    return _webp(data) if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else data


def _png(data: bytes) -> bytes:
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in _PNG_KEPT:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _jpeg(data: bytes) -> bytes:
    """Without comments and application segments, but for JFIF (APP0) and Adobe's (APP14), which tells the colours."""
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker not in (0xFE, *range(0xE1, 0xEE), 0xEF):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def _webp(data: bytes) -> bytes:
    kept, at = [b""], 12
    while at + 9 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        if data[at : at + 4] == b"VP8X":  # its flags say what follows: no profile (32), EXIF (8) or XMP (4)
            kept.append(data[at : at + 8] + bytes([data[at + 8] & ~44]) + data[at + 9 : end])
        elif data[at : at + 4] in _WEBP_KEPT:
            kept.append(data[at:end])
        at = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body
