"""What is scored, from what a user names: a run that is sampled meanwhile, with captions and real images beside."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen.cli.flags import Sampling
from gen.errors import GenError
from gen.progress import Bar

__all__ = ["made_images", "with_beside"]

_MOST = 50_000  # samples of a run where nobody says how many: the number that the field scores


def made_images(
    loaded: Any,
    sampling: Sampling,
    reference: Any,
    *,
    seeds: str | None,
    count: int | None,
    fixed: Mapping[str, Any],
    rule: str | None,
    quantiser: str | None,
) -> tuple[Any, dict[str, str]]:
    """Gives the images that a run makes while they are scored, and what is said of them, as text by name.

    Args:
      loaded: the run.
      sampling: the flags that it was opened with.
      reference: what they are compared with; without other word as many images are made as it holds, 50,000 at most.
      seeds: FIRST-LAST, or None.
      count: number of images that the user or the protocol asks for, or None.
      fixed: fields that a protocol of the field fixes.
      rule, quantiser: those of the user, before the protocol's and the usual ones.

    Raises GenError for an unknown rule, and for conditions that are missing or do not fit.
    """
    from gen.cli.opening import describe
    from gen.config import fingerprint, to_json
    from gen.metrics.sources import LABEL_RULES, generated
    from gen.nn.conditions import class_count, make_conditions
    from gen.sampling.seeds import parse_range

    rule, generator = rule or fixed.get("labels", "seed mod classes"), loaded.generator
    if rule not in LABEL_RULES:
        raise GenError(f"unknown label rule '{rule}'; expected one of {', '.join(LABEL_RULES)}")
    print(describe(loaded))
    if not seeds and count is None:
        count = min(reference.protocol.count or _MOST, _MOST)
        known = f"as many as {reference.name} holds" if count == reference.protocol.count else "the field's number"
        print(f"scores {count:,} samples, {known}; --count N for another number")
    wanted, number = parse_range(seeds or f"0-{(count or 1) - 1}"), class_count(generator.conditions)
    given = {} if number is None else {"label": LABEL_RULES[rule](wanted, number)}
    cond = make_conditions(generator.conditions, wanted, given | sampling.arrays())
    images = generated(
        generator,
        loaded.params,
        seeds=wanted,
        identity=f"{fingerprint(loaded.config)} step {loaded.step} {loaded.weights}",
        labels=cond.pop("label", None),
        classes=number,
        cond=cond,
        rule=rule,
        quantiser=quantiser or fixed.get("quantiser", "round"),
    )
    return images, {
        "name": str(loaded.path),
        "weights": loaded.weights,
        "step": str(loaded.step),
        "nfe": str(generator.nfe),
        "sampler": json.dumps(to_json(loaded.config.sampler)),
    }


def with_beside(
    images: Any, network: Any, captions: Path | None, real: Mapping[str, str | None], batch: int, mesh: Any
) -> Any:
    """Gives the images with what some measures look at beside them.

    Args:
      images: what is scored.
      network: the extractor.
      captions: a file of texts, one for each image, or None.
      real: sets of real images by role (training, heldout), as the user named them; None where not given.
      batch, mesh: as for `gen.metrics.beside.with_images`.

    Raises GenError for captions that the extractor does not read, and for what `gen.cli.images.open_images` refuses.
    """
    from gen.cli.images import open_images
    from gen.metrics.beside import with_images, with_texts

    if captions is not None:
        from gen.features.clip import CLIPExtractor

        if not isinstance(network, CLIPExtractor):
            raise GenError(f"the {network.name} extractor reads no captions; give --extractor clip:vit-b-32 or another")
        images = with_texts(images, network.texts(_tokens(captions, network.network.length)))
    for name, text in real.items():
        if text is not None:
            beside = open_images(text, network)
            images = with_images(images, name, beside, network, batch=batch, mesh=mesh, progress=Bar(text))
    return images


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
