"""``gen evaluate``."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gen.cli.compare import show
from gen.cli.flags import USUAL, SamplingFlags, Switch, flag
from gen.cli.likelihood import likelihood
from gen.cli.opening import Overrides
from gen.cli.start import ALONE, Multihost, start
from gen.errors import GenError
from gen.progress import Bar

__all__ = ["evaluate"]


def evaluate(
    what: Annotated[str, tyro.conf.Positional, flag("RUN|IMAGES")],
    /,
    *,
    reference: Annotated[str | None, flag("DATA")] = None,
    protocol: Annotated[str | None, flag("NAME")] = None,
    extractor: Annotated[str | None, flag("NAME")] = None,
    measures: Annotated[tuple[str, ...], flag("NAME")] = (),
    count: Annotated[int | None, flag("N")] = None,
    seeds: Annotated[str | None, flag("A-B")] = None,
    label_rule: Annotated[str | None, flag("RULE")] = None,
    quantiser: Annotated[str | None, flag("NAME")] = None,
    neighbours: Annotated[int | None, flag("K")] = None,
    captions: Annotated[Path | None, flag("FILE")] = None,
    training: Annotated[str | None, flag("DATA")] = None,
    heldout: Annotated[str | None, flag("DATA")] = None,
    backend: Literal["gen", "cleanfid"] = "gen",
    batch: Annotated[int, flag("N")] = 256,
    part: Annotated[str | None, flag("K/M")] = None,
    out: Annotated[Path | None, flag("JSON")] = None,
    force: Switch = False,
    sampling: SamplingFlags = USUAL,
    multihost: Multihost = ALONE,
    overrides: Overrides = (),
) -> None:
    """Scores a run, or images, against real images: a table, a JSON file with the protocol, and a page.

    A run makes its images meanwhile, as many as the reference, 50,000 at most. --protocol keeps to
    one that papers use, and refuses what departs from it. Started again, it goes on.

    Examples:
      gen evaluate runs/demo/student
      gen evaluate runs/mine --reference photos.zip --measures kid vendi
      gen evaluate samples/ --reference photos/ --extractor clip:vit-b-32 --captions captions.txt
      gen evaluate runs/llamagen --measures likelihood --heldout tokens-of-val/
      gen evaluate runs/big --reference big.npz --part 2/4 --out big.json     the last job merges all

    Args:
      what: a run folder, or images: a folder, .zip, .npz with arr_0 (and labels arr_1), digits:test.
      reference: real images, or statistics of gen reference.
      protocol: one of gen list protocols.
      extractor: feature network, NAME or NAME:MODE of gen list extractor; else the protocol's, the reference's, or the
        first that takes the images and has its weights.
      measures: more of gen list measures; or likelihood, alone: bits per image of a token model on --heldout TOKENS.
      count: the first N images only.
      seeds: of a run's images; from 0 if not given.
      label_rule: "seed mod classes" or "random"; of stored images what is known.
      quantiser: round or truncate; of stored images what is known.
      neighbours: k of precision, recall, density, coverage.
      captions: a line per image, or token ids .npy, for the CLIP score.
      training: real images that were trained on; with --heldout, which samples copy one.
      heldout: real images that were not.
      backend: cleanfid sets clean-fid's distances beside ours.
      batch: images at a time.
      part: this job's part, beside jobs with the others.
      out: RUN/scores.json if not given; the page lies beside.
      force: go on where something does not fit; the result names it.
      sampling: how a run makes its images.
      multihost: the job that this process belongs to.
    """
    from gen.cli.extractors import find_extractor, open_reference, stored_shape
    from gen.cli.images import open_images
    from gen.cli.opening import open_run
    from gen.cli.subjects import made_images, with_beside
    from gen.metrics.evaluate import Evaluation
    from gen.metrics.protocol import preset
    from gen.training.sharding import make_mesh

    if "likelihood" in measures:
        _only_likelihood(measures, reference or heldout)
        start(multihost)
        likelihood(Path(what), str(reference or heldout), sampling, batch, out)
        return
    settings, fixed = _settings(protocol, count, neighbours, measures, force), preset(protocol) if protocol else None
    start(multihost)
    is_run = (Path(what) / "config.json").is_file()
    if not is_run and (overrides or seeds or sampling != USUAL):
        raise GenError(f"{what} holds finished images; seeds and sampler settings apply to runs only: leave them out")
    run = open_run(Path(what), sampling, overrides=overrides) if is_run else None
    shape = (lambda: stored_shape(what)) if run is None else (lambda: run.generator.shape)
    network = find_extractor(extractor or (fixed.extractor if fixed else None), reference, shape)
    reference = reference or _usual_reference(shape())
    if backend == "cleanfid":
        from gen.metrics.cleanfid import require

        require(network)  # before the work starts
    mesh, known = make_mesh(), {"quantiser": quantiser, "rule": label_rule}
    held, real = open_reference(reference, network, batch, mesh)
    if run is None:
        images, about = open_images(what, network, **known), {"name": what}
    else:
        fields = fixed.fields if fixed else {}
        images, about = made_images(run, sampling, held, seeds=seeds, count=settings.count, fixed=fields, **known)
    images = with_beside(images, network, captions, {"training": training, "heldout": heldout}, batch, mesh)
    job, began, out = Evaluation(images, held, network, settings), time.monotonic(), out or _default_out(Path(what))
    found = _gather(job, part, out, batch, mesh, what)
    if found is None:
        return
    scores = job.scores(found)
    result = dataclasses.replace(job.result(scores, subject=about), seconds=time.monotonic() - began)
    if backend == "cleanfid":
        result = _second_opinion(result, what, images, reference, held, known, network)
    _write(result, found, held, real, scores.details, what, out)
    show({what: result})


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


def _only_likelihood(measures: tuple[str, ...], data: str | None) -> None:
    if measures != ("likelihood",) or data is None:
        raise GenError(
            "likelihoods are of held-out tokens, and no score of images; write --measures likelihood --heldout CACHE "
            "alone (gen encode TOKENIZER --data IMAGES --out CACHE makes it)"
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
