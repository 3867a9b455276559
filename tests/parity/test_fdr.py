"""Frechet distance ratios against the official evaluation."""

import numpy as np
import pytest

from gen.errors import GenError
from gen.metrics.frechet import frechet_distance
from gen.metrics.inception_score import InceptionScore, inception_score
from gen.metrics.ratios import RATIOS, combined, frechet_ratios
from gen.metrics.statistics import Moments
from tests.parity.conftest import Fixture, fixtures


def distance(fx: Fixture, entry: str) -> float:
    model, pool = (fx.config["entries"][entry][key] for key in ("model", "pool"))
    features = fx.io[f"feats_{model}" + ("_avg" if pool == "avg" else "")].astype(np.float64)
    accumulator = Moments.of(features)
    found = Moments().finalise(accumulator)
    reference = (fx.io[f"{entry}_{part}_ref"] for part in ("mu", "sigma"))
    return frechet_distance(found["mean"], found["covariance"], *reference)


@pytest.mark.parametrize("fx", fixtures("fdloss-fdr*"), ids=str)
def test_ratios(fx: Fixture) -> None:
    valfd, members = fx.config["valfd"], tuple(fx.config["fdr6_members"])
    for case, entries in fx.config["cases"].items():
        distances = {entry: distance(fx, entry) for entry in entries}
        ratios = frechet_ratios(distances, valfd)
        for entry in reversed(entries):  # their order does not matter
            fx.close(distances[entry], f"{case}_{entry}_fd")
            fx.close(ratios.get(entry, np.nan), f"{case}_{entry}_fdr")
        if np.isnan(fx.io[f"{case}_fdr6"]):
            with pytest.raises(GenError, match="no ratio in"):
                combined(ratios, members)
        else:
            fx.close(combined(ratios, members), f"{case}_fdr6")
        if any(fx.config["entries"][entry]["model"] == "inception" for entry in entries):
            statistic = InceptionScore(len(fx.io["logits"]), shuffle=True)
            fx.close(inception_score(fx.io["logits"], statistic)["inception_score"], f"{case}_is")


@pytest.mark.parametrize("fx", fixtures("fdloss-fdr*"), ids=str)
def test_constants(fx: Fixture) -> None:
    ours = sorted(space.heldout for space in RATIOS["fdr6"].values())
    if len(fx.config["fdr6_members"]) == len(ours):
        assert ours == sorted(fx.config["valfd"][name] for name in fx.config["fdr6_members"])
