"""``gen features``."""

from pathlib import Path
from typing import Annotated

import tyro

from gen.cli.flags import flag
from gen.errors import GenError

__all__ = ["features"]


def features(
    run: Annotated[Path, tyro.conf.Positional, flag("RUN")],
    /,
    *,
    data: Annotated[str, flag("IMAGES")],
    heldout: Annotated[str, flag("IMAGES")],
    taps: Annotated[str, flag("A,B,..")] = "",
    times: Annotated[str, flag("T,T,..")] = "0.1,0.25,0.5",
    side: Annotated[int, flag("N")] = 2,
    seeds: Annotated[int, flag("N")] = 1,
    out: Annotated[Path | None, flag("DIR")] = None,
) -> None:
    """Tells what a model's features know: a table of linear probes over blocks and noise levels.

    Noisy images are put through the network; each block's activation, pooled, is classified linearly. Beside it stand
    raw pixels, and for a model with classes the zero-shot classifier: the class under which it predicts best. Features
    are kept, so that a longer table costs only what is new.

    Examples:
      gen features runs/demo/teacher --data digits:train --heldout digits:test
      gen features runs/dit --data train.zip --heldout val.zip --taps block_5,block_11 --times 0.05,0.1

    Args:
      run: a run of a diffusion or flow model.
      data: labelled images to train the probes on.
      heldout: labelled images to test them on.
      taps: names of features; all by default.
      times: of the noise, on the model's clock.
      side: cells that a map is pooled to, along each axis.
      seeds: probes of each feature, from other weights and orders.
      out: the folder of features and table.json; RUN/features if not given.
    """
    import numpy as np

    from gen.cli.images import read_images
    from gen.cli.tables import print_table
    from gen.experiments.features import table
    from gen.runs import load

    loaded, sets = load(run), []
    for text in (data, heldout):
        images, labels = read_images(text)
        if labels is None:
            raise GenError(f"{text} has no labels to probe for; give images with classes")
        sets.append((images, np.asarray(labels)))
    levels = _numbers(times)
    names = tuple(name for name in taps.split(",") if name)
    found = table(loaded, *sets, out or run / "features", taps=names, times=levels, side=side, seeds=seeds)
    rows = [(name, f"{np.mean(v):.4f}", f"{np.std(v, ddof=1):.4f}" if len(v) > 1 else "-") for name, v in found.items()]
    print_table(["feature", "accuracy", "spread"], sorted(rows, key=lambda row: row[1], reverse=True))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise GenError(f"--times '{text}' is not like 0.1,0.25") from None
