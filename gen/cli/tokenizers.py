"""``gen reconstruct`` and ``gen encode``."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gen.cli.flags import flag
from gen.cli.start import start
from gen.errors import GenError
from gen.progress import Bar

__all__ = ["encode", "reconstruct"]


def reconstruct(
    run: Annotated[Path, tyro.conf.Positional, flag("RUN")],
    /,
    *,
    data: Annotated[str, flag("DATA")] = "digits:test",
    extractor: Annotated[str | None, flag("NAME")] = None,
    lpips: tuple[Literal["alex", "vgg", "squeeze"], ...] = (),
    protocol: Annotated[str | None, flag("NAME")] = None,
    split: Annotated[str, flag("TEXT")] = "",
    quantiser: Literal["round", "truncate"] = "round",
    measures: Annotated[tuple[str, ...], flag("NAME")] = (),
    curve: bool = False,
    out: Annotated[Path | None, flag("NPZ")] = None,
    scores: Annotated[Path | None, flag("JSON")] = None,
    batch: Annotated[int, flag("N")] = 256,
) -> None:
    """Sends images through a tokenizer and back, and scores what comes back: PSNR, SSIM, LPIPS, rFID.

    PSNR is the mean over 8-bit images (psnr_pooled: of their mean error). SSIM is given in three dialects, which differ
    by up to 0.02: original (Wang et al. 2004), skimage and torchmetrics; MS-SSIM from 176 pixels a side. With a feature
    network, frechet_distance is the rFID: reconstructions against their own originals. Errors are standard errors.
    Of tokens and bits, codebook_usage is the share of the codes that occur and codebook_entropy theirs, in bits. The
    first images are shown before and after in a picture beside the scores.

    Examples:
      gen reconstruct runs/demo/tokenizer --extractor digits-extractor
      gen reconstruct runs/demo/tokenizer --data photos/ --out photos.npz
      gen reconstruct runs/flextok --data photos/ --curve
      gen reconstruct runs/vae --data val.zip --split val --protocol rfid-imagenet-val --quantiser truncate --lpips alex

    Args:
      run: a tokenizer's run folder, or a run that holds its tokenizer.
      data: a folder of images, a .zip, an .npz with arr_0, or digits, digits:train, digits:test.
      extractor: the feature network of the rFID, as for gen evaluate; that of the protocol, else none.
      lpips: trunks of LPIPS, from weights kept by gen convert lpips FILE. Tables mostly report vgg or alex.
      protocol: a protocol of the field that must be kept to, such as rfid-imagenet-val (gen list protocols).
      split: which part of the data it is, for the protocol.
      quantiser: how the decoder's output becomes 8-bit: round, or truncate as some evaluators do.
      measures: further measures of the features: kid, mind ... (gen list measures).
      curve: of a tokenizer that decodes any number of its tokens (FlexTok), the scores of the first 1, 2, 4 ... all of
        them too, and a grid of pictures: a page beside the scores.
      out: .npz for the reconstructions (arr_0 uint8, arr_1 labels).
      scores: .json for the scores with their protocol; RUN/reconstruction.json by default.
      batch: images at a time; does not change the scores.
    """
    import numpy as np

    from gen.cli.compare import show
    from gen.cli.extractors import open_extractor
    from gen.cli.images import open_images
    from gen.config import fingerprint
    from gen.metrics.evaluate import Settings
    from gen.metrics.protocol import preset
    from gen.runs import load
    from gen.tokenizers.keep_curve import keep_curve, keep_numbers
    from gen.tokenizers.reconstruct import NoFeatures, Reconstructed, evaluate_reconstruction, reconstructions
    from gen.training.sharding import make_mesh

    if out is not None and out.suffix != ".npz":
        raise GenError(f"--out {out}: reconstructions are written as arrays; give a name that ends in .npz")
    named = extractor or (preset(protocol).extractor if protocol else None)
    network = None if named is None else open_extractor(named)
    if measures and network is None:
        raise GenError("further measures look at features; give --extractor too (gen list extractor)")
    settings = dataclasses.replace(Settings.of(protocol) if protocol else Settings(), extra=measures)
    start()
    loaded = load(run)
    tokenizer = loaded.tokenizer
    size = tokenizer.spec.picture
    name, _, part = data.partition(":")
    images = open_images(data, NoFeatures(size, name="tokenizer"))
    identity = f"{fingerprint(loaded.config)} step {loaded.step} {loaded.weights}"
    params = loaded.params["tokenizer"]
    cond = _text(data, tokenizer)
    numbers = keep_numbers(tokenizer.spec) if curve else ()
    subject = {"name": str(run), "weights": loaded.weights, "step": str(loaded.step)}

    def score(chosen: Mapping[str, Any], keep: bool = False) -> Reconstructed:
        made = reconstructions(
            tokenizer, params, images, identity=identity, quantiser=quantiser, lpips=lpips, cond={**cond, **chosen}
        )
        return evaluate_reconstruction(
            made,
            images,
            network,
            tokenizer=tokenizer,
            name=name,
            split=split or part,
            settings=settings,
            keep=keep,
            batch=batch,
            mesh=make_mesh(),
            progress=Bar(data),
            subject=subject | {which: str(value) for which, value in chosen.items()},
        )

    found = score({}, keep=out is not None)
    scores = scores or run / "reconstruction.json"
    found.result.save(scores)
    show({str(run): found.result})
    if out is not None:
        _save(out, found.images, found.labels)
    print(f"{found.result.protocol.count} images of {data}, {loaded.weights} weights; written to {scores}")
    _save_pairs(scores.with_suffix(".png"), found.before, found.after)
    if numbers:
        whole = scores.with_name(f"{scores.stem}-by-tokens.html")
        keep_curve(lambda number: score({"keep": np.asarray(number)}), numbers).write(whole, f"{run}: {data}")
        print(f"the same from the first {', '.join(map(str, numbers))} tokens: {whole}")


def _text(data: str, tokenizer: Any) -> dict[str, Any]:
    """The captions' features beside the images, for a decoder that reads them; nothing where there are none."""
    from gen.data.stores import open_store

    condition = tokenizer.spec.conditions.get("text")
    if condition is None:
        return {}
    name, _, split = data.partition(":")
    if name == "digits":
        from gen.data.sources import Digits

        rows = Digits(split or "all", condition.shape).source()  # type: ignore[arg-type]  # refuses other splits
        return {"text": rows.arrays["text"]}
    store = open_store(data)
    found = {"text": store.text, "text_mask": store.text_mask}
    return {name: rows for name, rows in found.items() if rows is not None}


def _save_pairs(picture: Path, before: Any, after: Any) -> None:
    """Writes a picture of images (N, H, W, C) uint8 above their reconstructions, and says where it is."""
    import numpy as np

    from gen.files import atomic
    from gen.metrics.report import mosaic

    page = mosaic(np.concatenate([before, after]), columns=len(before))
    atomic(picture, lambda file: page.save(file, "png"))
    print(f"the first {len(before)} before (above) and after (below): {picture}")


def _save(out: Path, images: Any, labels: Any) -> None:
    import numpy as np

    from gen.files import atomic

    arrays = {"arr_0": images} | ({} if labels is None else {"arr_1": labels})
    atomic(out, lambda file: np.savez(file, **arrays))
    print(f"reconstructions written to {out}")


def encode(
    run: Annotated[Path, tyro.conf.Positional, flag("RUN")],
    /,
    *,
    out: Annotated[Path, flag("DIR")],
    data: Annotated[str, flag("DATA")] = "digits:train",
    align: Annotated[Path | None, flag("FILE")] = None,
    tokens: Annotated[int | None, flag("N")] = None,
    flip: bool = False,
    batch: Annotated[int, flag("N")] = 256,
) -> None:
    """Encodes images once into a cache of latents, tokens or bits, which generators train on.

    A cache of latents holds the normaliser that they are trained under; tokens and bits stay as they are. Interrupted
    and started again, it goes on where it was.

    Examples:
      gen encode runs/demo/tokenizer --out runs/cache
      gen encode runs/demo/tokenizer --data digits:test --out runs/cache-test
      gen encode runs/vae --data imagenet.zip --align dinov2_vitb14_pretrain.pth --out runs/repa-cache

    Args:
      run: a tokenizer's run folder.
      out: the cache folder.
      data: a folder of images, a .zip, a .tar or whatever else gen data inspect reads, an .npz with arr_0 (and arr_1
        labels), or digits, digits:train, digits:test.
      align: an official file of DINOv2 or MAE: the patch features of the images are stored beside the latents as
        encoder_0, for training with representation alignment (repa-xl2).
      tokens: patches per side that the encoder sees, as many as the trained network has tokens; one per 16 pixels by
        default.
      flip: encode the mirror images too; training then takes every image from one of the two by chance.
      batch: images at a time.
    """
    from gen.runs import load
    from gen.tokenizers.encode import encode_images
    from gen.training.sharding import make_mesh

    start()
    loaded = load(run)
    tokenizer = loaded.tokenizer
    side, _, channels = tokenizer.spec.picture
    source, identity = _records(data, channels)
    beside = None if align is None else {"encoder_0": _encoder(align, tokens or side // 16)}
    cache = encode_images(
        tokenizer,
        loaded.params["tokenizer"],
        source,
        out,
        identity=identity,
        batch=batch,
        mesh=make_mesh(),
        flip=flip,
        beside=beside,
    )
    both = ", and of the mirror images" if flip else ""
    print(f"{cache.kind} {tokenizer.spec.shape} of {len(source)} images of {data}{both}, {loaded.weights} weights")
    print(f"written to {out} (identity {cache.identity()}); train on it with --data {out}")


def _records(data: str, channels: int) -> tuple[Any, str]:
    """(records by index, their fingerprint); images on disk are read a batch at a time."""
    from gen.data.images import Images, Labels
    from gen.data.sources import digits
    from gen.data.stores import open_store

    name, _, split = data.partition(":")
    if name == "digits":
        rows = digits(split or "all")  # type: ignore[arg-type]  # refuses other splits
        return rows, rows.identity()
    store = open_store(data)
    held = store.label is not None, store.text is not None
    labels: dict[tuple[bool, bool], Labels] = {(True, True): "both", (True, False): "class", (False, True): "text"}
    stored = Images(data, channels=channels, labels=labels.get(held, "none"))
    return stored.source(), stored.identity()


def _encoder(file: Path, tokens: int) -> tuple[Any, Any]:
    """(parameters, function) of the official encoder in `file`, for `gen.tokenizers.encode.encode_images`."""
    from gen.features.alignment import patch_features
    from gen.pretrained.encoders import read_encoder

    if tokens < 1:
        raise GenError("images of fewer than 16 pixels have no token each 16; say how many per side with --tokens N")
    network, params = read_encoder(file)
    return params, lambda params, images: patch_features(network, params, images, tokens).astype("float16")
