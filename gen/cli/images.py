"""Images from what a user names on the command line."""

from pathlib import Path
from typing import Any

from gen.errors import GenError

__all__ = ["parse_seeds", "read_images"]


def parse_seeds(text: str, what: str = "seeds") -> range:
    """``"0-63"`` (both ends included) or ``"7"`` as a range. Raises GenError that names `what` for anything else."""
    first, dash, last = text.partition("-")
    if first.isdecimal() and (last.isdecimal() if dash else True):
        seeds = range(int(first), int(last or first) + 1)
        if len(seeds) and seeds.stop <= 2**31:
            return seeds
    raise GenError(f"{what} '{text}' are not a range; write FIRST-LAST such as 0-63, or one number")


def read_images(text: str) -> tuple[Any, Any]:
    """(images (N, H, W, C) uint8, labels (N,) int32 or None) of what `text` names.

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
    return images, None if labels is None else labels.astype(np.int32)


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
