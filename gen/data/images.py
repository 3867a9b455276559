"""Training data from image files and arrays: what `gen.data.stores` reads, prepared by `gen.data.transforms`."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from gen.config import PLACE
from gen.data import loader
from gen.data.labels import class_count
from gen.data.loader import Record, Source
from gen.data.random import RANDOM, RandomSource
from gen.data.sources import ArraySource
from gen.data.stores import Store, load_arrays, open_store
from gen.data.text import lengthened
from gen.data.transforms import CROPS, FILTERS, Crop, Filter, adm_random_crop, fit, random_flip
from gen.errors import GenError

__all__ = ["Arrays", "ImageSource", "Images", "Zipped", "ZippedSource"]

Labels = Literal["class", "text", "both", "none"]


class ImageSource:
    """Records of a store: "image" (H, W, C) uint8 and "label" () int32, or "text" (D,) or (T, D) with its mask.

    Args:
      store: the files.
      prepare: Pillow image -> Pillow image, without chance; None for images that stay as they are.
      labels: which of the store's labels go into the records.
      channels: 3 or 1.
      shape: (H, W) that every image must come out with; None for any.
      length: positions that sequences of text are padded to; None for as many as the longest has.

    Reading a record raises GenError for a file that is no image, or comes out with another shape.
    """

    def __init__(
        self,
        store: Store,
        prepare: Callable[[Image.Image], Image.Image] | None,
        labels: Labels,
        channels: int,
        shape: tuple[int, int] | None,
        length: int | None = None,
    ):
        self.store, self.prepare, self.channels, self.shape = store, prepare, channels, shape
        self.label = store.label if labels in ("class", "both") else None
        self.class_names = store.class_names if labels in ("class", "both") else None
        columns = {"label": self.label}
        if labels in ("text", "both"):
            columns |= {"text": store.text, "text_mask": store.text_mask}
        self.rows = {name: array for name, array in columns.items() if array is not None}
        self.length = length
        self.num_classes = class_count(self.label, self.class_names, store.title)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Record:
        if self.prepare is None:
            image = self.store.pixels(int(index), self.channels)
        else:
            image = np.asarray(self.prepare(self.store.image(int(index), self.channels)))
        if self.shape is not None and image.shape[:2] != self.shape:
            raise GenError(
                f"{self.store.title(int(index))} is {image.shape[1]} x {image.shape[0]}; expected "
                f"{self.shape[1]} x {self.shape[0]}, set size and crop or convert the data (gen data convert)"
            )
        image = image.reshape(*image.shape[:2], self.channels)
        return {"image": image} | {name: self._column(name, rows[index]) for name, rows in self.rows.items()}

    def _column(self, name: str, value: np.ndarray) -> np.ndarray:
        return np.asarray(value) if self.length is None or name == "label" else lengthened(value, self.length)

    def gather(self, indices: np.ndarray) -> Record:
        """Gives records `indices` (B,) as one batch."""
        return loader.stacked((self[int(index)] for index in indices), len(indices))

    def title(self, index: int) -> str:
        """Tells how messages call record `index`."""
        return self.store.title(index)


@dataclasses.dataclass(frozen=True)
class Images:
    """Image files as training data: "image" (B, size, size, C) uint8 with "label" (B,) int32, or with "text".

    Text is one vector per image (B, D) float32, or a sequence (B, T, D), float16 or float32, with "text_mask" (B, T)
    bool.

    Attributes:
      path: whatever `gen.data.stores.open_store` takes: folder, .zip, .tar, .npz, .npy, .array_record, hf:NAME; or
        "random", for noise of that size.
      size: side in pixels; None: the size of the first image, which all must have.
      crop: "none" (all images already have the size), "adm" (centre), "center" (EDM's), "squeeze" (no crop), "random"
        (ADM's random crop).
      filter: of "center" and "squeeze".
      flip: mirror half of the images, anew every epoch.
      channels: 3 or 1.
      labels: "class", "text", "both" or "none".
      width: numbers D per text vector or token that the model takes; others are refused.
      length: positions T of a text sequence that the model takes; shorter ones are padded, longer ones refused.
    """

    path: str = dataclasses.field(metadata=PLACE)
    size: int | None = None
    crop: Crop = "none"
    filter: Filter = "lanczos"
    flip: bool = False
    channels: int = 3
    labels: Labels = "class"
    width: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("crop", self.crop, CROPS),
            ("filter", self.filter, FILTERS),
            ("labels", self.labels, get_args(Labels)),
            ("channels", self.channels, (1, 3)),
        ):
            if value not in known:
                raise GenError(f"{name} is {value!r}; expected one of {', '.join(map(str, known))}")
        if self.size is not None and not 1 <= self.size <= 8192:
            raise GenError(f"size is {self.size}; expected 1 to 8192 pixels")
        if self.size is None and self.crop != "none":
            raise GenError(f"crop '{self.crop}' needs a size in pixels; set size")

    @functools.cached_property
    def store(self) -> Store:
        """Opens the files once. Raises GenError for labels that are missing or do not fit."""
        store = open_store(self.path)
        if self.labels in ("class", "both") and store.label is None:
            raise GenError(
                f"{self.path} has no class labels{store.unlabelled}; put the images of each class in a folder of its "
                "own, or train a model without classes: gen train --unconditional"
            )
        if self.labels in ("text", "both"):
            self._check_text(store.text)
        return store

    def _check_text(self, text: np.ndarray | None) -> None:
        if text is None:
            raise GenError(f"{self.path} has no text vectors; add them, or set labels to class or none")
        if self.width not in (None, text.shape[-1]):
            raise GenError(
                f"{self.path} has text vectors of {text.shape[-1]} numbers; the model takes {self.width}, "
                "make them with the matching encoder"
            )
        if self.length is not None and (text.ndim != 3 or text.shape[1] > self.length):
            raise GenError(
                f"{self.path} has text of shape {text.shape[1:]}; the model takes sequences of up to {self.length} "
                "tokens, make them with the matching encoder"
            )

    def source(self) -> ImageSource | RandomSource:
        """Gives the records by index, without chance: "random" leaves images at their own size here."""
        if self.path == RANDOM:
            return RandomSource(self._shapes)
        shape = None if self.size is None else (self.size, self.size)
        if self.size is None:
            first = self.store.image(0, self.channels)
            shape = (first.height, first.width)
        if self.crop == "random":
            shape = None
        fitted = functools.partial(fit, crop=self.crop, size=self.size, filter=self.filter)
        prepare = None if self.crop in ("none", "random") else fitted
        source = ImageSource(self.store, prepare, self.labels, self.channels, shape, self.length)
        if self.crop == "none" and self.size is not None:
            _ = source[0]  # images of another size are refused at once, by the first
        return source

    def batches(self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1) -> Iterator[Record]:
        """Endless shuffled batches, this process's slice, from global step `start` (see `gen.data.loader`)."""
        source = self.source()
        loader.enough(self.path, len(source), batch)
        return loader.batches(
            source, batch=batch, seed=seed, start=start, process=process, processes=processes, transform=self._transform
        )

    def identity(self) -> str:
        """Gives the fingerprint of the files, the labels and what is done to them; not of where they lie."""
        if self.path == RANDOM:
            return f"random {self._shapes}"
        unsaid = ("path",) if self.length is not None else ("path", "length")  # data without it keep their fingerprint
        done = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if f.name not in unsaid]
        return hashlib.sha256(f"{self.store.identity()} {done}".encode()).hexdigest()[:16]

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a row by name, for random ones."""
        if self.size is None:
            raise GenError("random images have the size that is asked for; set size in pixels")
        shapes: dict[str, tuple[int, ...]] = {"image": (self.size, self.size, self.channels)}
        if self.labels in ("class", "both"):
            shapes["label"] = ()
        if self.labels in ("text", "both"):
            if self.width is None:
                raise GenError("random text has the width that the model takes; set width")
            shapes["text"] = (self.width,) if self.length is None else (self.length, self.width)
            if self.length is not None:
                shapes["text_mask"] = (self.length,)
        return shapes

    def _transform(self, rng: np.random.Generator, record: Record) -> Record:
        image = record["image"]
        if self.crop == "random" and self.size is not None:
            pillow = Image.fromarray(image[..., 0] if self.channels == 1 else image)
            image = np.asarray(adm_random_crop(rng, pillow, self.size)).reshape(self.size, self.size, self.channels)
        if self.flip:
            image = random_flip(rng, image)
        return record | {"image": image}


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Arrays by row as training data, under the names they are stored by: features, pairs, anything.

    Attributes:
      path: .npz (arrays of one length), .npy, or a folder of .npy files (memory-mapped).
      name: what a lone .npy is called in the records; the file's name without its ending by default.
      shapes: expected row shapes by name, such as {"text": [768]}; others are refused.
    """

    path: str = dataclasses.field(metadata=PLACE)
    name: str | None = None
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def source(self) -> ArraySource:
        """Gives the rows by index. Raises GenError for what cannot be read, lengths that differ, other shapes."""
        path = Path(self.path)
        if path.is_dir():
            arrays = {file.stem: load_arrays(file)["image"] for file in sorted(path.glob("*.npy"))}
        elif path.suffix.lower() == ".npy":
            arrays = {self.name or path.stem: load_arrays(path)["image"]}
        elif path.suffix.lower() == ".npz":
            arrays = load_arrays(path)
        else:
            raise GenError(f"no arrays at {path}; expected .npz, .npy or a folder of .npy files")
        for name, array in arrays.items():
            if array.ndim == 0:
                raise GenError(f"'{name}' of {path} is a single number; expected one row per record")
        for name, shape in self.shapes.items():
            if name not in arrays:
                raise GenError(f"{path} has no '{name}'; it has {', '.join(arrays) or 'nothing'}")
            if arrays[name].shape[1:] != tuple(shape):
                raise GenError(f"'{name}' of {path} has rows of {arrays[name].shape[1:]}; expected {tuple(shape)}")
        return ArraySource(**arrays)

    def batches(self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1) -> Iterator[Record]:
        """Endless shuffled batches, this process's slice, from global step `start` (see `gen.data.loader`)."""
        source = self.source()
        loader.enough(self.path, len(source), batch)
        return loader.batches(source, batch=batch, seed=seed, start=start, process=process, processes=processes)

    def identity(self) -> str:
        """Gives the fingerprint of the content; reads everything."""
        return self.source().identity()


class ZippedSource:
    """Records of several sources of one length, merged by index. Raises GenError for other lengths or equal names."""

    def __init__(self, *sources: Source):
        if not sources or len({len(source) for source in sources}) != 1:
            sizes = ", ".join(str(len(source)) for source in sources) or "none"
            raise GenError(f"sources read side by side must share their length, got {sizes}; give one row per record")
        self.sources = sources
        classed = next((source for source in sources if source.label is not None), sources[0])
        self.label, self.class_names = classed.label, classed.class_names
        self.num_classes = classed.num_classes
        if len(self):
            names = [name for source in sources for name in source[0]]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise GenError(f"'{twice[0]}' comes from two of the sources read side by side; rename or drop one")

    def __len__(self) -> int:
        return len(self.sources[0])

    def __getitem__(self, index: int) -> Record:
        return {name: value for source in self.sources for name, value in source[index].items()}

    def gather(self, indices: np.ndarray) -> Record:
        """Gives records `indices` (B,) as one batch."""
        return {name: value for source in self.sources for name, value in source.gather(indices).items()}

    def title(self, index: int) -> str:
        """Tells how messages call record `index`."""
        return " with ".join(source.title(index) for source in self.sources)


@dataclasses.dataclass(frozen=True)
class Zipped:
    """Several data sets read side by side: images with stored pairs or text features, row i with row i.

    Attributes:
      parts: data configurations with ``source()`` and ``identity()``; random flips and crops of `Images` do not apply.

    Raises GenError for images that are mirrored or cropped at random.
    """

    parts: tuple[Any, ...]

    def __post_init__(self) -> None:
        if any(isinstance(part, Images) and (part.flip or part.crop == "random") for part in self.parts):
            raise GenError("images read side by side with others take no flip and no random crop; turn them off")

    def source(self) -> ZippedSource:
        """Gives the merged records by index."""
        return ZippedSource(*(part.source() for part in self.parts))

    def batches(self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1) -> Iterator[Record]:
        """Endless shuffled batches, this process's slice, from global step `start` (see `gen.data.loader`)."""
        source = self.source()
        loader.enough("the zipped data", len(source), batch)
        return loader.batches(source, batch=batch, seed=seed, start=start, process=process, processes=processes)

    def identity(self) -> str:
        """Gives the fingerprint of all parts."""
        return hashlib.sha256(" ".join(part.identity() for part in self.parts).encode()).hexdigest()[:16]
