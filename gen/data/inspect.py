"""What is in a data set: counts, classes, sizes, duplicates, broken files, and a picture."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from gen.data.stores import Store
from gen.data.transforms import center_crop, decode, treatments
from gen.data.vanished import ahead
from gen.errors import GenError

__all__ = ["Summary", "inspect", "preview"]

Look = tuple[tuple[int, int] | None, str, list[str]]  # size, digest of the pixels or message, treatments


@dataclasses.dataclass(frozen=True)
class Summary:
    """The counts that `gen data inspect` prints, and the names of what is wrong.

    Attributes:
      count: images, broken ones included.
      classes: class -> images; empty without class labels.
      sizes: (width, height) -> images.
      treated: what decoding does to files that are not plain (`gen.data.transforms.treatments`) -> images.
      duplicates: groups of names whose decoded pixels are equal.
      broken: messages that name the images that cannot be read.
      ignored: files that are no images.
    """

    count: int
    classes: dict[int, int]
    sizes: dict[tuple[int, int], int]
    treated: dict[str, int]
    duplicates: list[list[str]]
    broken: list[str]
    ignored: list[str]


def inspect(store: Store, on_image: Callable[[int, int], None] | None = None) -> Summary:
    """Decodes every image once (in threads); `on_image` is called as (done, count), first with 0."""
    if on_image is not None:
        on_image(0, len(store))

    def look(index: int) -> Look:
        try:
            data = store.read_file(index)
            image = decode(data, store.title(index))
        except GenError as error:
            return None, str(error), []
        return image.size, hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest(), treatments(data)

    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    treated: collections.Counter[str] = collections.Counter()
    by_hash: dict[str, list[str]] = {}
    broken = []
    for index, looked in ahead(look, range(len(store)), store.title):
        size, text, done = looked.result()
        if size is None:
            broken.append(text)
        else:
            sizes[size] += 1
            treated.update(done)
            by_hash.setdefault(text, []).append(store.names[index])
        if on_image is not None:
            on_image(index + 1, len(store))
    numbers, counts = np.unique(store.label, return_counts=True) if store.label is not None else ((), ())
    return Summary(
        count=len(store),
        classes={int(c): int(n) for c, n in zip(numbers, counts, strict=True)},
        sizes=dict(sizes.most_common()),
        treated=dict(treated.most_common()),
        duplicates=[names for names in by_hash.values() if len(names) > 1],
        broken=broken,
        ignored=list(store.ignored),
    )


def preview(store: Store, columns: int = 10, rows: int = 8, side: int = 64) -> Image.Image:
    """Gives a grid of images spread evenly over the data set, centre-cropped; broken ones stay grey."""
    picture = Image.new("RGB", (columns * side, rows * side), "grey")
    count = min(columns * rows, len(store))
    for cell in range(count):
        try:
            image = center_crop(store.image(cell * len(store) // count), side)
        except GenError:
            continue
        picture.paste(image, (cell % columns * side, cell // columns * side))
    return picture
