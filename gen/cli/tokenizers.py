"""``gen reconstruct`` and ``gen encode``."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.start import start
from gen.errors import GenError

__all__ = ["encode", "reconstruct"]


def reconstruct(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    data: str = "digits:test",
    out: Annotated[Path | None, tyro.conf.arg(metavar="NPZ")] = None,
    batch: int = 256,
) -> None:
    """Sends images through a tokenizer and back, and prints the peak signal-to-noise ratio.

    Examples:
      gen reconstruct runs/demo/tokenizer
      gen reconstruct runs/demo/tokenizer --data photos/ --out photos.npz

    Args:
      run: a tokenizer's run folder, or a run that holds its tokenizer.
      data: a folder of images, an .npz with arr_0, or digits, digits:train, digits:test.
      out: .npz for the reconstructions (arr_0 uint8, arr_1 labels).
      batch: images at a time.
    """
    import numpy as np

    from gen.cli.images import read_images
    from gen.pretrained.load import load
    from gen.training.files import atomic

    start()
    loaded = load(run)
    images, labels = read_images(data)
    blocks = [loaded.decode(loaded.encode(images[rows])) for rows in _blocks(len(images), batch)]
    made = np.concatenate(blocks)[: len(images)]
    error = np.square(made.astype(np.float64) - images).mean(axis=(1, 2, 3))
    psnr = 10 * np.log10(255.0**2 / np.maximum(error, 1e-12))
    print(f"{len(images)} images of {data}, {loaded.weights} weights")
    print(f"PSNR {10 * np.log10(255.0**2 / max(error.mean(), 1e-12)):.2f} dB (of the mean error over 0..255)")
    print(f"per image: mean {psnr.mean():.2f} dB, worst {psnr.min():.2f} dB")
    if out is not None:
        arrays = {"arr_0": made} | ({} if labels is None else {"arr_1": labels})
        atomic(out, lambda file: np.savez(file, **arrays))
        print(f"written to {out}")


def encode(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    data: str = "digits:train",
    align: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    tokens: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    batch: int = 256,
) -> None:
    """Encodes images once into a cache of latents, with the normaliser that generators train under.

    Examples:
      gen encode runs/demo/tokenizer --out runs/cache
      gen encode runs/demo/tokenizer --data digits:test --out runs/cache-test
      gen encode runs/vae --data imagenet.zip --align dinov2_vitb14_pretrain.pth --out runs/repa-cache

    Args:
      run: a tokenizer's run folder.
      out: the cache folder.
      data: a folder of images, a .zip, a .tar or whatever else gen data inspect reads, an .npz with arr_0 (and arr_1
        labels), or digits, digits:train, digits:test.
      align: an official DINOv2 file: the patch features of the images are stored beside the latents as encoder_0, for
        training with representation alignment (repa-xl2).
      tokens: patches per side that DINOv2 sees, as many as the trained network has tokens; one per 16 pixels by
        default.
      batch: images at a time.
    """
    from gen.pretrained.load import load
    from gen.tokenizers.encode import encode_images
    from gen.training.sharding import make_mesh

    start()
    loaded = load(run)
    tokenizer = loaded.tokenizer
    source, identity = _records(data, tokenizer.spec.image[2])
    beside = None if align is None else {"encoder_0": _encoder(align, tokens or tokenizer.spec.image[0] // 16)}
    cache = encode_images(
        tokenizer,
        loaded.params["tokenizer"],
        source,
        out,
        identity=identity,
        batch=batch,
        mesh=make_mesh(),
        beside=beside,
    )
    print(f"{len(source)} latents {tuple(tokenizer.spec.shape)} of {data}, {loaded.weights} weights")
    print(f"written to {out} (identity {cache.identity()}); train on it with --data {out}")


def _records(data: str, channels: int) -> tuple[Any, str]:
    """(records by index, their fingerprint); images on disk are read a batch at a time."""
    from gen.cli.images import read_images
    from gen.data.images import Images
    from gen.data.sources import ArraySource
    from gen.data.stores import open_store

    if data.partition(":")[0] == "digits" or data.endswith(".npz"):
        images, labels = read_images(data)
        rows = ArraySource(image=images) if labels is None else ArraySource(image=images, label=labels)
        return rows, rows.identity()
    stored = Images(data, channels=channels, labels="none" if open_store(data).label is None else "class")
    return stored.source(), stored.identity()


def _encoder(file: Path, tokens: int) -> tuple[Any, Any]:
    """(parameters, function) of the official DINOv2 in `file`, for `gen.tokenizers.encode.encode_images`."""
    from gen.features.alignment import patch_features
    from gen.pretrained.dinov2 import IMPORTER
    from gen.pretrained.readers import read_weights

    if tokens < 1:
        raise GenError("images of fewer than 16 pixels have no token each 16; say how many per side with --tokens N")
    network, params, _ = IMPORTER.load(read_weights(file))
    return params, lambda params, images: patch_features(network, params, images, tokens)


def _blocks(count: int, batch: int) -> list[Any]:
    """Row indices in blocks of one size, so that one program serves all; the last block repeats the last row."""
    import numpy as np

    batch = min(batch, count)
    return [np.minimum(np.arange(start, start + batch), count - 1) for start in range(0, count, batch)]
