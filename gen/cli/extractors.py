"""The feature network of a score, and the statistics of real images, from what a user names or leaves to be chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gen.errors import GenError

__all__ = ["find_extractor", "is_statistics", "open_extractor", "open_reference", "stored_shape"]


def open_extractor(text: str) -> Any:
    """Gives the feature network that ``NAME`` or ``NAME:MODE`` names.

    Weights that are part of an installed package are converted when they are first asked for.

    Raises GenError for an unknown name or mode.
    """
    from gen.config import config_class, members, suggest

    name, _, mode = text.partition(":")
    if name not in members("extractor"):
        raise GenError(f"unknown extractor '{name}'; {suggest(name, members('extractor'))}")
    network: Any = config_class(name)
    if mode and not network.modes:
        raise GenError(f"the extractor '{name}' has no modes; write --extractor {name}")
    found = network(mode=mode) if mode else network()
    _convert_installed(name, found)
    return found


def find_extractor(named: str | None, reference: str | None, shape: Callable[[], tuple[int, ...]]) -> Any:
    """Gives the feature network of an evaluation.

    Args:
      named: as `open_extractor` takes it; None to have it chosen: the one that stored statistics were made with, else
        the first of ``gen list extractor`` that takes the images and whose weights are there.
      reference: the real images or statistics, as the user named them.
      shape: gives (H, W, C) of the images, when it has to be known.

    Raises GenError when none can be had: it names those that take such images, and what each of them lacks.
    """
    from gen.metrics.reference import Reference

    if named is not None:
        return open_extractor(named)
    if reference is not None and is_statistics(reference):
        return _maker(Reference.load(reference).protocol, reference)
    return _fitting(shape())


def _maker(protocol: Any, where: str) -> Any:
    """The extractor that stored statistics were made with."""
    from gen.config import config_class, members

    for name in members("extractor"):
        kind: Any = config_class(name)
        for mode in kind.modes or ("",):
            network = open_extractor(f"{name}:{mode}" if mode else name)
            if (network.name, network.resize) == (protocol.extractor, protocol.resize):
                return network
    raise GenError(
        f"{where} was made with the extractor {protocol.extractor} ({protocol.resize}), which gen list extractor does "
        "not have; give --extractor, or make the reference again"
    )


def _fitting(shape: tuple[int, ...]) -> Any:
    from gen.config import members
    from gen.features.extractor import accepts

    lacking = []
    for name in members("extractor"):
        network = open_extractor(name)
        if not accepts(network, shape):
            continue
        try:
            network.fingerprint()
        except GenError as error:
            lacking.append(f"{name}: {error}")
        else:
            return network
    raise GenError(
        f"the weights of no feature network for images of {' x '.join(map(str, shape))} are here; one of these will "
        f"do: {' | '.join(lacking)}"
    )


def _convert_installed(name: str, network: Any) -> None:
    from gen.pretrained.features import INSTALLED, convert_installed

    if name in INSTALLED and not network.path.is_file():
        line = convert_installed(name)
        if line is not None:
            print(line)


def stored_shape(text: str) -> tuple[int, ...]:
    """Gives (H, W, C) of the first of the stored images that `text` names. Raises GenError where there are none."""
    import io

    from PIL import Image

    from gen.cli.images import read_images
    from gen.data.stores import open_store

    if text.partition(":")[0] == "digits":
        return tuple(read_images(text)[0].shape[1:])
    store = open_store(text)
    store.image(0)  # says what is wrong with it in one line
    with Image.open(io.BytesIO(store.read(0)[1])) as first:
        return (first.height, first.width, 1 if first.mode in ("1", "L", "I;16") else 3)


def open_reference(text: str, network: Any, batch: int, mesh: Any) -> tuple[Any, Any]:
    """Gives (reference, its images or None): stored statistics, or those of the images that `text` names."""
    from gen.cli.images import open_images
    from gen.metrics.reference import Reference, make_reference
    from gen.progress import Bar

    if is_statistics(text):
        held = Reference.load(text)
        return held, _real(held, network)
    images = open_images(text, network)
    name, _, split = text.partition(":")
    made = make_reference(name, images, network, split=split, data=text, batch=batch, mesh=mesh, progress=Bar(text))
    return made, images


def is_statistics(text: str) -> bool:
    """Tells whether `text` names stored statistics."""
    import zipfile

    path = Path(text)
    return path.suffix == ".npz" and zipfile.is_zipfile(path) and "mu.npy" in zipfile.ZipFile(path).namelist()


def _real(held: Any, network: Any) -> Any:
    """The images that a stored reference was made of, where they still lie there; else None."""
    from gen.cli.images import open_images

    where, identity = held.data
    try:
        images = open_images(where, network) if where else None
    except GenError:
        return None
    return images if images is not None and images.identity == identity else None
