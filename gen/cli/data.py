"""``gen data``: convert, inspect, split."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from gen.cli.flags import Switch, flag
from gen.errors import GenError
from gen.progress import Bar

__all__ = ["convert", "inspect", "split"]


def convert(
    source: Annotated[str, tyro.conf.Positional, flag("DATA")],
    out: Annotated[Path, tyro.conf.Positional, flag("OUT")],
    /,
    *,
    size: Annotated[int | None, flag("PIXELS")] = None,
    crop: Literal["adm", "center", "squeeze"] = "adm",
    filter: Literal["lanczos", "box", "bicubic"] = "lanczos",
    grey: Switch = False,
    quality: Annotated[int | None, flag("1-100")] = None,
    threads: Annotated[int | None, flag("N")] = None,
    shard: Annotated[int, flag("N")] = 4096,
    skip_broken: Switch = False,
) -> None:
    """Turns images of any layout into one file or folder that training reads quickly.

    The same data and options give the same bytes; started again after an interruption it goes on. EXIF rotation is
    applied, transparency laid over white, palettes and CMYK become RGB, 16-bit greys keep their upper 8 bits, of
    animations the first frame counts; gen data inspect tells how many images that concerns.

    Examples:
      gen data convert photos/ photos-64.zip --size 64
      gen data convert imagenet/train imagenet-256.zip --size 256 --crop adm
      gen data convert photos.zip shards --size 256 --quality 95

    Args:
      source: a folder, .zip, .tar, folder of .tar, .npz, .npy, .array_record, or hf:NAME:SPLIT:IMAGES:LABELS (the
        columns where there are several).
      out: NAME.zip (EDM's layout), NAME.array_record, or a folder for tar shards.
      size: side of the square images; without it they keep their sizes.
      crop: adm (box halving, bicubic, centre), center (centre square, resized once) or squeeze (no crop).
      filter: of center and squeeze.
      grey: one channel instead of three.
      quality: JPEG of this quality; without it PNG, lossless.
      threads: that work at once; all processors by default.
      shard: images per tar file.
      skip_broken: leave out images that cannot be read, and name them.
    """
    from gen.data import convert as conversion
    from gen.data.stores import open_store

    transcode = conversion.Transcode(size, "none" if size is None else crop, filter, 1 if grey else 3, quality)
    count, dropped = conversion.convert(
        open_store(source),
        out,
        transcode,
        threads=threads,
        shard=shard,
        skip_broken=skip_broken,
        on_image=Bar("convert"),
    )
    for message in dropped:
        print(f"left out: {message}")
    print(f"{count} images written to {out}" + (f", {len(dropped)} left out" if dropped else ""))


def inspect(
    source: Annotated[str, tyro.conf.Positional, flag("DATA")],
    /,
    *,
    preview: Annotated[Path | None, flag("PNG")] = None,
    names: Annotated[int, flag("N")] = 10,
) -> None:
    """Looks at every image once: counts, classes, sizes, duplicates and broken files by name.

    Examples:
      gen data inspect photos/
      gen data inspect cifar10.zip --preview grid.png

    Args:
      source: whatever gen data convert reads.
      preview: a picture of images spread over the data set.
      names: how many duplicates, broken and other files are named.
    """
    from gen.data import inspect as inspection
    from gen.data.stores import open_store

    store = open_store(source)
    found = inspection.inspect(store, Bar("inspect"))
    print(f"{found.count} images in {source} (identity {store.identity()})")
    if store.label is not None:
        counts = found.classes.values()
        print(f"{len(counts)} classes, labels 0 to {max(found.classes)}, {min(counts)} to {max(counts)} images each")
        for number, count in list(found.classes.items())[:names]:
            known = f" ({store.class_names[number]})" if store.class_names else ""
            print(f"  class {number}{known}: {count}")
    elif store.text is not None and store.text_mask is not None:
        print(f"text of up to {store.text_mask.shape[1]} tokens of {store.text.shape[-1]} numbers for each")
    elif store.text is not None:
        print(f"one vector of {store.text.shape[1]} numbers for each")
    else:
        print(f"no labels{store.unlabelled}")
    for (width, height), count in list(found.sizes.items())[:names]:
        print(f"  {width} x {height}: {count}")
    if len(found.sizes) > 1:
        print("images of several sizes: training wants one; gen data convert --size crops and resizes")
    for what, count in found.treated.items():
        print(f"when read: {what}, {count} images")
    groups = [" = ".join(group) for group in found.duplicates]
    for title, lines in (("duplicates", groups), ("broken", found.broken), ("left out", found.ignored)):
        print(f"{title}: {len(lines) or 'none'}")
        for line in lines[:names]:
            print(f"  {line}")
    if preview is not None:
        from gen.files import atomic

        picture = inspection.preview(store)
        atomic(preview, lambda file: picture.save(file, "PNG"))
        print(f"preview written to {preview}")


def split(
    source: Annotated[str, tyro.conf.Positional, flag("DATA")],
    /,
    *,
    held_out: Annotated[Path, flag("OUT")],
    rest: Annotated[Path, flag("OUT")],
    count: Annotated[int, flag("N")],
    seed: Annotated[int, flag("N")] = 0,
) -> None:
    """Divides a data set in two: N images held out, each class with its share, and the rest; files byte for byte.

    Examples:
      gen data split photos.zip --held-out test.zip --rest train.zip --count 1000

    Args:
      source: whatever gen data convert reads.
      held_out: where the N images go: NAME.zip, NAME.array_record, or a folder for tar shards.
      rest: where the others go.
      count: how many images are held out.
      seed: another seed, other images.
    """
    from gen.data.convert import Copy, convert, split_rows
    from gen.data.stores import open_store

    if held_out == rest:
        raise GenError("--held-out and --rest name the same output; give two")
    for out in (held_out, rest):
        if out.exists():
            raise GenError(f"{out} exists; remove it or give another output")
    store = open_store(source)
    for out, rows in zip((held_out, rest), split_rows(store, count, seed), strict=True):
        written, _ = convert(store, out, Copy(), rows=rows.tolist(), on_image=Bar(f"split {out}"))
        print(f"{written} images written to {out}")
