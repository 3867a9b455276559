"""Which files among images are read, left out, or refused, by their names (the table is in docs/data.md).

Hidden files and what operating systems leave are left out. Other files that are no images are left out as well, and
said. Photographs of kinds that are not read are refused, since leaving them out would give fewer images.
"""

from collections.abc import Iterable, Sequence

from gen.errors import GenError

__all__ = ["EXTENSIONS", "is_image", "is_stray", "said", "sorted_out"]

EXTENSIONS: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
EXTENSIONS += (".jfif", ".jpe", ".avif", ".apng", ".pbm", ".pnm")
OTHER_PHOTOGRAPHS: tuple[str, ...] = (".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".tga", ".exr", ".hdr")
OTHER_PHOTOGRAPHS += (".qoi", ".pfm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf", ".pef", ".srw")
DESCRIPTIONS = ("dataset.json", "classes.txt", "samples.json")  # they say what the images are
SYSTEM: tuple[str, ...] = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "#recycle")
SYSTEM += ("$recycle.bin", "system volume information", "lost+found")


def ending(name: str) -> str:
    """ ".jpg" of a name or path, in small letters; "" for none."""
    stem, dot, last = name.rpartition("/")[2].rpartition(".")
    return f".{last.lower()}" if dot and stem else ""


def is_image(name: str) -> bool:
    """Tells whether the name is that of an image file that is read."""
    return ending(name) in EXTENSIONS


def is_stray(name: str) -> bool:
    """Tells whether any part of a path within the data is hidden, or is left by an operating system."""
    parts = name.split("/")
    return any(part.lower() in SYSTEM or (part.startswith(".") and part not in (".", "..")) for part in parts)


def sorted_out(names: Iterable[str], where: str) -> tuple[list[str], list[str]]:
    """Gives (images, files that are left out), each in the order given, by their names.

    Raises GenError for a photograph of a kind that is not read: leaving it out would give fewer images.
    """
    names = list(names)
    images, ignored = [], []
    for name in names:
        if is_stray(name):
            ignored.append(name)
        elif name in DESCRIPTIONS:
            continue
        elif is_image(name):
            images.append(name)
        elif ending(name) in OTHER_PHOTOGRAPHS:
            raise GenError(
                f"{where}:{name} is an image of a kind that is not read here; convert it to PNG or JPEG, or move it "
                "out of the data"
            )
        else:
            ignored.append(name)
    if "grid.png" in images and "samples.json" in names:  # a sheet of the samples
        images.remove("grid.png")
        ignored.append("grid.png")
    return images, ignored


def said(ignored: Sequence[str], where: str) -> list[str]:
    """Gives the sentence about files that are left out and that nobody would expect among images; [] for none."""
    named = [name for name in ignored if not is_stray(name)]
    if not named:
        return []
    first = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    return [f"{where}: left out, since they are none of its images: {first} (gen data inspect lists all)"]
