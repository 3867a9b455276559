"""``gen ratios``."""

from pathlib import Path
from typing import Annotated

import tyro

from gen.cli.flags import flag

__all__ = ["ratios"]


def ratios(
    scores: Annotated[tuple[Path, ...], tyro.conf.Positional, flag("JSON")],
    /,
    *,
    heldout: Annotated[tuple[Path, ...], flag("JSON")] = (),
    protocol: Annotated[str, flag("NAME")] = "fdr6",
) -> None:
    """Frechet distance ratios over several feature spaces: samples over held-out real images.

    Give one score file of gen evaluate for each space, all of the same samples. Without --heldout the published
    constants of FDr-6 on ImageNet-256 are taken, and all six spaces must be there.

    Examples:
      gen ratios inception.json dinov2.json --heldout val-inception.json val-dinov2.json
      gen ratios a.json b.json c.json d.json e.json f.json

    Args:
      scores: score files of the samples.
      heldout: score files of held-out real images against the same references.
      protocol: which published protocol, where no held-out scores are given.
    """
    from gen.cli.tables import print_table
    from gen.metrics.protocol import Result
    from gen.metrics.ratios import ratios_of

    of_samples = {str(path): Result.load(path) for path in scores}
    real = {str(path): Result.load(path) for path in heldout} or None
    found = ratios_of(of_samples, real, protocol)
    print_table(["space", "ratio"], [(space, f"{value:.4f}") for space, value in found.items()])
