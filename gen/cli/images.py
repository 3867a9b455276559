"""Images from what a user names on the command line."""

from pathlib import Path
from typing import Any

from gen.errors import GenError

__all__ = ["open_images", "read_images"]


def read_images(text: str) -> tuple[Any, Any]:
    """Gives (images (N, H, W, C) uint8, labels (N,) int32 or None) of what `text` names.

    ``digits`` (all), ``digits:train`` and ``digits:test`` are the embedded digits; otherwise a path: an .npz with
    ``arr_0`` (and ``arr_1`` labels), a folder of PNG or JPEG files, in the order of their names, or a .zip, .tar or
    .npy as `gen.data.stores` reads them, with their classes.
    Raises GenError for a path that is none of these, files of different sizes, or arrays of another kind.
    """
    if text.partition(":")[0] == "digits":
        from gen.data.sources import digits

        source = digits(text.partition(":")[2] or "all")
        return source.arrays["image"], source.arrays["label"]
    path = Path(text)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    if path.is_dir():
        return _folder(path), None
    if path.suffix in (".zip", ".tar", ".npy") and path.is_file():
        return _store(text)
    raise GenError(f"no images at '{text}'; give a folder of PNG files, a .zip, an .npz with arr_0, or digits:test")


def open_images(text: str, network: Any, *, quantiser: str | None = None, rule: str | None = None) -> Any:
    """Gives the images that `text` names as a source for evaluation, read a batch at a time.

    As for `read_images`, and anything else that `gen.data.stores` reads. What ``gen sample`` noted beside its samples
    (rounding, label rule, seeds) goes into the protocol.

    Args:
      network: the extractor they are for.
      quantiser, rule: what is known of images that carry no note; must not contradict one.

    Raises GenError for a path without images, images that cannot be told apart from a set that was not finished, and
    what contradicts the samples' note.
    """
    from gen.data.stores import open_store
    from gen.metrics.sources import from_arrays, from_store
    from gen.sampling.sample_files import read_note

    if text.partition(":")[0] == "digits":
        images, labels = read_images(text)
        return from_arrays(images, labels, quantiser=quantiser or "given", rule=rule or "given")
    if not text.startswith("hf:") and not Path(text).exists():
        raise GenError(f"no images at '{text}'; give a folder of PNG files, a .zip, an .npz with arr_0, or digits:test")
    note = read_note(text) or {}
    store = open_store(text)
    if note:
        store = _noted(store, note)
    for name, told, noted in (("quantiser", quantiser, "quantiser"), ("label-rule", rule, "rule")):
        if note and told not in (None, note[noted]):
            raise GenError(f"{text} was made with {name} '{note[noted]}', not '{told}'; leave out --{name}")
    return from_store(
        store,
        network,
        quantiser=note.get("quantiser") or quantiser or "given",
        rule=note.get("rule") or rule or "given",
        seeds=note.get("seeds", ""),
        one_size=bool(note),
    )


def _noted(store: Any, note: dict[str, Any]) -> Any:
    """The samples among the files of a sample set, with their labels. Raises GenError when the set is not finished."""
    import dataclasses

    import numpy as np

    from gen.data.stores import ArrayStore, Store
    from gen.sampling.seeds import parse_seeds

    seeds = parse_seeds(note["seeds"])
    there = [i for i, name in enumerate(store.names) if name != "grid.png"]
    if len(there) != len(seeds):
        raise GenError(
            f"{store.path} holds {len(there)} of the {len(seeds)} samples it was to get; no score is given for a "
            "partial set; run the same gen sample command again, it goes on where it was"
        )
    if isinstance(store, ArrayStore):
        return store
    label = store.label
    if "labels" in note:
        of = dict(zip(seeds, note["labels"], strict=True))
        label = np.asarray([of[int(Path(store.names[i]).stem)] for i in there], np.int32)
    kept = {field.name: getattr(store, field.name) for field in dataclasses.fields(Store)}
    names = [store.names[i] for i in there]
    return Store(**kept | {"names": names, "read_file": lambda i: store.read_file(there[i]), "label": label})


def _store(text: str) -> tuple[Any, Any]:
    import io

    import numpy as np
    from PIL import Image

    from gen.data.images import Images
    from gen.data.stores import open_store

    store = open_store(text)
    store.image(0)  # says what is wrong with it in one line
    with Image.open(io.BytesIO(store.read(0)[1])) as first:
        grey = first.mode in ("1", "L", "I;16")
    source = Images(text, channels=1 if grey else 3, labels="none" if store.label is None else "class").source()
    arrays = source.gather(np.arange(len(source)))
    return arrays["image"], arrays.get("label")


def _npz(path: Path) -> tuple[Any, Any]:
    import zipfile

    import numpy as np

    from gen.data.labels import checked

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in ("arr_0", "arr_1")}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise GenError(f"{path} cannot be read as an npz ({error}); make it again") from None
    images = arrays.get("arr_0")
    if images is None or images.dtype != np.uint8 or images.ndim != 4:
        given = "has no arr_0" if images is None else f"holds {images.dtype} {images.shape}"
        raise GenError(f"{path} {given}; expected arr_0 as uint8 (N, H, W, C)")
    labels = arrays.get("arr_1")
    return images, None if labels is None else checked(labels, lambda row: f"image {row} of {path}")


def _folder(path: Path) -> Any:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg") and f.stem != "grid")
    if not files:
        raise GenError(f"no PNG or JPEG files in {path}; give the folder that holds them")
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                array = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise GenError(f"{file} is not a readable image ({error}); remove or replace it") from None
        images.append(array[:, :, None] if array.ndim == 2 else array)
        if images[-1].shape != images[0].shape:
            raise GenError(f"{file} is {images[-1].shape}, {files[0].name} is {images[0].shape}; use one size")
    return np.stack(images)
