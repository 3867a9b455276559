"""``gen evaluate``."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gen.cli.opening import Overrides
from gen.cli.start import ALONE, Multihost, start
from gen.errors import GenError
from gen.progress import Bar

__all__ = ["evaluate"]


def evaluate(
    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|IMAGES")],
    /,
    *,
    reference: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None,
    protocol: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    extractor: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    count: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    seeds: Annotated[str | None, tyro.conf.arg(metavar="A-B")] = None,
    label_rule: Annotated[str | None, tyro.conf.arg(metavar="RULE")] = None,
    quantiser: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    neighbours: Annotated[int | None, tyro.conf.arg(metavar="K")] = None,
    measures: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = (),
    backend: Literal["gen", "cleanfid"] = "gen",
    batch: Annotated[int, tyro.conf.arg(metavar="N")] = 256,
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    solver: Annotated[str | None, tyro.conf.arg(metavar="KIND")] = None,
    grid: Annotated[str | None, tyro.conf.arg(metavar="KIND")] = None,
    guidance: Annotated[float | None, tyro.conf.arg(aliases=["--cfg-scale"], metavar="W")] = None,
    weights: Literal["ema", "raw"] = "ema",
    captions: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    training: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None,
    heldout: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None,
    part: Annotated[str | None, tyro.conf.arg(metavar="K/M")] = None,
    compare: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="JSON")] = (),
    force: bool = False,
    out: Annotated[Path | None, tyro.conf.arg(metavar="JSON")] = None,
    multihost: Multihost = ALONE,
    overrides: Overrides = (),
) -> None:
    """Scores a run or images against real images: a table, a JSON file with the protocol, and a page.

    A run is sampled in the same pass, with balanced classes unless told otherwise; nothing is written but the scores.
    Image folders (PNG, JPEG, WebP; any sizes, if the feature network resizes), EDM zips and npz files are read a batch
    at a time. Interrupted and started again, it goes on where it was. No score is given for fewer images than asked.

    --protocol NAME keeps to a protocol of the field: adm-imagenet256, dit-imagenet256, edm-cifar10, edm2, clean-fid,
    rfid-imagenet-val, coco30k ... (gen list protocols); what departs from it is refused, or named when forced.

    Examples:
      gen evaluate runs/demo/student
      gen evaluate runs/demo/teacher --steps 10 --cfg-scale 1.5 --out teacher10.json
      gen evaluate samples.npz --protocol adm-imagenet256 --quantiser truncate --reference imagenet256.npz
      gen evaluate photos/ --reference photos-train.npz --extractor inception:clean --measures kid frechet_infinity
      gen evaluate runs/demo/student --training digits:train --heldout digits:test --measures cas vendi
      gen evaluate samples/ --extractor clip:vit-b-32 --captions captions.txt --reference photos/
      gen evaluate runs/big --part 2/4 --out scores.json     one of four jobs; the last one to end merges and scores

    Args:
      what: a run folder, a folder of images, a .zip, an .npz with arr_0 (and arr_1 labels), or digits:test.
      reference: statistics made by gen reference, or real images (as for WHAT); digits:train for images of 8 x 8.
      protocol: a protocol of the field that settings, samples and reference must agree with.
      extractor: the feature network, from gen list extractor; inception:MODE with clean, legacy_tensorflow or
        legacy_pytorch, or torchvision, which tells how many samples labelled with ImageNet's 1000 classes are read as
        such. That of the protocol, that of stored statistics, or else the first that takes the images and whose weights
        are here: digits-extractor, inception, lite (pip install "gen-image[lite]"; its distance is no FID) ...
      count: score the first N images only; the result says so.
      seeds: which samples of a run, FIRST-LAST; as many as the protocol asks for, from 0 on, by default.
      label_rule: of a run: "seed mod classes" or "random", as the protocol has it by default. Of stored images: what
        is known of their labels.
      quantiser: of a run: round or truncate, as the protocol has it by default. Of stored images: how they became
        8-bit, where it is known.
      neighbours: k of precision, recall, density and coverage; 3 by default.
      measures: further measures: kid, mind, frechet_infinity, class_frechet, vendi, cmmd, cas (gen list measures says
        what each is).
      backend: cleanfid asks clean-fid for a second opinion: its distances of the same images and Inception weights
        stand beside ours. Needs torch and pip install "gen-image[cleanfid]".
      batch: images at a time; does not change the scores.
      steps: number of solver steps.
      solver: a solver from gen list solver.
      grid: a time grid from gen list grid.
      guidance: guidance scale; 1 is none.
      weights: ema, the averaged weights, or raw.
      captions: one caption a line, for every sample, or an .npy of token ids (N, 77); gives the CLIP score of
        --extractor clip:MODEL.
      training: the images that were trained on, and
      heldout: images that were not: with both, the share of samples that copy a training image, and the closest
        pairs; with classes, --measures cas.
      part: do part K of M, beside other jobs with the same --out and the other parts.
      compare: score files to show beside.
      force: go on where reference or protocol do not fit; the result names what departs.
      out: where the scores go; RUN/scores.json, or beside the images, by default. The page lies beside, as .html.
      multihost: the job that this process belongs to.
    """
    from gen.cli.compare import show
    from gen.cli.extractors import find_extractor, made_shape, open_reference, stored_shape
    from gen.cli.images import open_images
    from gen.metrics.evaluate import Evaluation
    from gen.metrics.protocol import Result, require_comparable
    from gen.metrics.protocol import preset as find
    from gen.training.sharding import make_mesh

    settings = _settings(protocol, count, neighbours, measures, force)
    others = {str(path): Result.load(path) for path in compare}
    changes = {"steps": steps, "solver": solver, "grid": grid, "guidance": guidance}
    known = {"quantiser": quantiser, "rule": label_rule}
    fixed = find(protocol).fields if protocol else {}
    named = extractor or (find(protocol).extractor if protocol else None)
    start(multihost)
    if (Path(what) / "config.json").is_file():
        source, subject = _generated(what, seeds, settings.count, weights, changes, overrides, known, fixed)
        network = find_extractor(named, reference, lambda: made_shape(source))
        reference = reference or _usual_reference(made_shape(source))
    elif overrides or seeds or any(value is not None for value in changes.values()):
        raise GenError(f"{what} holds finished images; seeds and sampler settings apply to runs only: leave them out")
    else:
        network = find_extractor(named, reference, lambda: stored_shape(what))
        reference = reference or _usual_reference(stored_shape(what))
        source, subject = open_images(what, network, **known), {"name": what}
    if backend == "cleanfid":
        from gen.metrics.cleanfid import require

        require(network)  # before the work starts
    mesh = make_mesh()
    source = _beside(source, network, captions, {"training": training, "heldout": heldout}, batch, mesh)
    out = out or _default_out(Path(what))
    held, real = open_reference(reference, network, batch, mesh)
    job, began = Evaluation(source, held, network, settings), time.monotonic()
    found = _gather(job, part, out, batch, mesh, what)
    if found is None:
        return
    scores = job.scores(found)
    result = dataclasses.replace(job.result(scores, subject=subject), seconds=time.monotonic() - began)
    if backend == "cleanfid":
        result = _second_opinion(result, what, source, reference, held, known, network)
    _write(result, found, held, real, scores.details, what, out)
    show({what: result} | others)
    require_comparable({what: result} | others, force=force)


def _settings(
    protocol: str | None, count: int | None, neighbours: int | None, measures: tuple[str, ...], force: bool
) -> Any:
    """The preset's settings, or the usual ones, changed by what is given on the command line."""
    from gen.metrics.evaluate import Settings

    base = Settings.of(protocol) if protocol else Settings()
    return dataclasses.replace(
        base,
        count=base.count if count is None else count,
        neighbours=base.neighbours if neighbours is None else neighbours,
        extra=measures,
        force=force,
        pictures=_PICTURES,
    )


_PICTURES = 48  # samples shown on the page


def _usual_reference(shape: tuple[int, ...]) -> str:
    """The real images that are meant when none are named."""
    if shape != (8, 8, 1):
        raise GenError(
            f"images of {' x '.join(map(str, shape))} are compared with real ones, and none are named; give "
            "--reference: their training images, or statistics that gen reference made"
        )
    return "digits:train"


def _generated(
    what: str,
    seeds: str | None,
    count: int | None,
    weights: Any,
    changes: dict[str, Any],
    overrides: tuple[tuple[str, str], ...],
    known: dict[str, str | None],
    fixed: Mapping[str, Any],
) -> tuple[Any, dict[str, str]]:
    """(images, what is said of them) of a run, sampled as the protocol's `fixed` fields want it."""
    from gen.cli.opening import describe, open_run
    from gen.config import fingerprint, to_json
    from gen.metrics.sources import LABEL_RULES, generated
    from gen.nn.conditions import class_count
    from gen.sampling.seeds import parse_range

    loaded = open_run(Path(what), weights, settings=changes, overrides=overrides)
    wanted = parse_range(seeds or f"0-{(count or 1797) - 1}")
    rule, number = known["rule"] or fixed.get("labels", "seed mod classes"), class_count(loaded.generator.conditions)
    if rule not in LABEL_RULES:
        raise GenError(f"unknown label rule '{rule}'; expected one of {', '.join(LABEL_RULES)}")
    print(describe(loaded))
    source = generated(
        loaded.generator,
        loaded.params,
        seeds=wanted,
        identity=f"{fingerprint(loaded.config)} step {loaded.step} {loaded.weights}",
        labels=None if number is None else LABEL_RULES[rule](wanted, number),
        classes=number,
        rule=rule,
        quantiser=known["quantiser"] or fixed.get("quantiser", "round"),
    )
    subject = {
        "name": what,
        "weights": loaded.weights,
        "step": str(loaded.step),
        "nfe": str(loaded.generator.nfe),
        "sampler": json.dumps(to_json(loaded.config.sampler)),
    }
    return source, subject


def _beside(
    source: Any, network: Any, captions: Path | None, images: dict[str, str | None], batch: int, mesh: Any
) -> Any:
    """The source with captions and real images beside it."""
    from gen.cli.images import open_images
    from gen.metrics.beside import with_images, with_texts

    if captions is not None:
        if not hasattr(network, "texts"):
            raise GenError(f"the {network.name} extractor reads no captions; give --extractor clip:vit-b-32 or another")
        source = with_texts(source, network.texts(_tokens(captions, network.network.length)))
    for name, text in images.items():
        if text is not None:
            source = with_images(
                source, name, open_images(text, network), network, batch=batch, mesh=mesh, progress=Bar(text)
            )
    return source


def _tokens(path: Path, length: int) -> Any:
    """Token ids (N, length) of a text file of captions, or those of an .npy file."""
    import numpy as np

    from gen.features.bpe import Vocabulary

    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise GenError(f"{path} cannot be read as captions ({error}); give one a line, or an .npy of ids") from None
    return Vocabulary.read(Vocabulary.place()).tokens(lines, length)


def _gather(job: Any, part: str | None, out: Path, batch: int, mesh: Any, what: str) -> Any:
    """The finalised statistics; None after a part of a job whose other parts are not done yet."""
    from gen.metrics.evaluate import part_of
    from gen.metrics.onepass import Tally

    count = job.protocol.count
    if part is None:
        partial = out.with_name(out.name + ".partial.npz")
        tally = job.gather(batch=batch, mesh=mesh, partial=partial, progress=Bar(what))
        return job.found([tally])
    number, parts = _numbers(part)
    paths = [out.with_name(f"{out.name}.part-{k}-of-{parts}.npz") for k in range(1, parts + 1)]
    mine = part_of(count, number, parts)
    job.gather(indices=mine, batch=batch, mesh=mesh, partial=paths[number - 1], progress=Bar(what))
    tallies = [Tally.load(path) for path in paths if path.exists()]
    done = sum(tally.count for tally in tallies)
    if done < count:
        print(f"part {number} of {parts} is done; {done} of {count} samples are in, the other jobs go on")
        return None
    return job.found(tallies)


def _numbers(part: str) -> tuple[int, int]:
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal()):
        raise GenError(f"--part {part} is not K/M; write 1/4 for the first of four jobs")
    return int(number), int(parts)


def _second_opinion(
    result: Any, what: str, source: Any, reference: str, held: Any, known: dict[str, str | None], network: Any
) -> Any:
    """The result with clean-fid's values beside ours: images are opened again, for it to resize them itself."""
    from gen.cli.extractors import is_statistics
    from gen.cli.images import open_images
    from gen.metrics.cleanfid import Unresized, second_opinion

    samples = source if source.read is None else open_images(what, Unresized(), **known)
    real = held if is_statistics(reference) else open_images(reference, Unresized())
    return second_opinion(result, samples, real, network)


def _write(result: Any, found: Any, held: Any, real: Any, details: Any, what: str, out: Path) -> None:
    """The scores and the page, once all of them are known; partial results are no longer needed."""
    import jax

    from gen.metrics.page import evaluation_page

    if jax.process_index() != 0:
        return
    result.save(out)
    evaluation_page(what, result, found, held, real, details).write(out.with_suffix(".html"))
    for path in (out.with_name(out.name + ".partial.npz"), *out.parent.glob(f"{out.name}.part-*-of-*.npz")):
        path.unlink(missing_ok=True)
    print(f"written to {out} and {out.with_suffix('.html')}")


def _default_out(path: Path) -> Path:
    return path / "scores.json" if (path / "config.json").is_file() else Path(str(path).rstrip("/") + ".scores.json")
