"""``gen reference``."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.flags import flag
from gen.errors import GenError
from gen.progress import Bar

__all__ = ["reference"]


def reference(
    what: Annotated[str, tyro.conf.Positional, flag("IMAGES|FILE")],
    /,
    *,
    out: Annotated[Path, flag("NPZ")],
    extractor: Annotated[str | None, flag("NAME")] = None,
    publisher: Annotated[str | None, flag("NAME")] = None,
    name: Annotated[str, flag("TEXT")] = "",
    split: Annotated[str, flag("TEXT")] = "",
    quantiser: Annotated[str | None, flag("NAME")] = None,
    batch: Annotated[int, flag("N")] = 256,
) -> None:
    """Makes statistics of real images, with their protocol, for gen evaluate --reference.

    Images are read a batch at a time, each resized by itself. Interrupted and started again, it goes on where it was.
    Published statistics are taken over with what is known of how they were computed; images that lie in the same file
    (those of guided-diffusion) are put through the feature network for precision and recall.

    Examples:
      gen reference photos/ --extractor inception:clean --out photos.npz
      gen reference VIRTUAL_imagenet256_labeled.npz --extractor inception:legacy_tensorflow --out imagenet256.npz
      gen reference cifar10-32x32.npz --publisher edm --out cifar10.npz
      gen reference img512.pkl --extractor dinov2 --out img512-dinov2.npz

    Args:
      what: images (a folder, a .zip, an .npz with arr_0, digits:train), or published statistics (.npz with mu and
        sigma, .pkl).
      out: the .npz to write.
      extractor: the feature network of images; inception:MODE with clean, legacy_tensorflow or legacy_pytorch. The
        first that takes the images and whose weights are here by default (see gen evaluate).
      publisher: whose statistics they are, where the file does not tell: adm, mar, edm, edm2, pytorch-fid, clean-fid.
      name: of the data, for tables; the file's name by default.
      split: which part of the data they are of; what is known of a publisher's files by default.
      quantiser: how the images became 8-bit, where it is known.
      batch: images at a time; does not change the statistics.
    """
    from gen.cli.extractors import find_extractor, stored_shape
    from gen.cli.images import open_images
    from gen.metrics.reference import make_reference
    from gen.training.sharding import make_mesh

    partial = out.with_name(out.name + ".partial.npz")
    if out.suffix != ".npz":
        raise GenError(f"a reference is an .npz file, not {out}; give a name that ends in .npz")
    held = _arrays_in(Path(what))
    if "mu" in held or Path(what).suffix == ".pkl":
        made = _published(Path(what), extractor or "inception", publisher, name, split, batch, "arr_0" in held)
    else:
        network = find_extractor(extractor, None, lambda: stored_shape(what))
        data, _, part = what.partition(":")
        made = make_reference(
            name or Path(data).name,
            open_images(what, network, quantiser=quantiser),
            network,
            split=split or part,
            data=what,
            batch=batch,
            mesh=make_mesh(),
            partial=partial,
            progress=Bar(what),
        )
    made.save(out)
    partial.unlink(missing_ok=True)
    protocol = made.protocol
    images_ = f"{protocol.count} images" if protocol.count else "an unknown number of images"
    print(
        f"{made.name}: {protocol.extractor} {protocol.resize}, {images_}, features of {len(made.features)}; "
        f"written to {out}"
    )


def _arrays_in(path: Path) -> list[str]:
    """Names of the arrays in an .npz; [] for anything else."""
    import zipfile

    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return []
    return [name.removesuffix(".npy") for name in zipfile.ZipFile(path).namelist()]


def _published(
    path: Path, extractor: str, publisher: str | None, name: str, split: str, batch: int, images: bool
) -> Any:
    """Published statistics, with the features of the images in the same file."""
    import dataclasses

    from gen.cli.extractors import open_extractor
    from gen.cli.images import open_images
    from gen.metrics.reference import make_reference
    from gen.pretrained.references import read_published
    from gen.training.sharding import make_mesh

    network = open_extractor(extractor)
    given = network if extractor.startswith("dinov2") else None
    found = read_published(path, publisher, name=name, split=split, network=given)
    if not images:
        return found
    source = open_images(str(path), network)
    made = make_reference(found.name, source, network, data=str(path), batch=batch, mesh=make_mesh())
    for field in ("extractor", "extractor_fingerprint", "resize"):
        ours, theirs = getattr(made.protocol, field), getattr(found.protocol, field)
        if ours != theirs:
            raise GenError(
                f"the statistics in {path} have {field} {theirs!r}, the network for its images {ours!r}; expected the "
                "same; give --extractor inception:legacy_tensorflow with the published weights"
            )
    return dataclasses.replace(found, features=made.features, labels=made.labels, data=made.data)
