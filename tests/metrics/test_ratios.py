"""Ratios over feature spaces: of score files, and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from gen import cli
from gen.errors import GenError
from gen.metrics.protocol import Protocol, Result
from gen.metrics.ratios import RATIOS, ratios_of


def score(extractor: str, value: float, **changes: object) -> Result:
    return Result({"frechet_distance": value}, Protocol(extractor, "x", 100, reference=extractor, **changes))


SIX = {space.extractor: score(f"{space.extractor}-vit", 2.0 * space.heldout) for space in RATIOS["fdr6"].values()}


def test_published_constants() -> None:
    found = ratios_of(SIX)
    assert found == pytest.approx(dict.fromkeys([*RATIOS["fdr6"], "mean"], 2.0))


def test_own_heldout_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a": score("digits", 6.0), "b": score("lite", 1.0), "va": score("digits", 2.0), "vb": score("lite", 4.0)}
    for name, result in files.items():
        result.save(tmp_path / f"{name}.json")
    a, b, va, vb = (str(tmp_path / f"{name}.json") for name in files)
    assert cli.main(["ratios", a, b, "--heldout", vb, va]) == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert (lines["digits"], lines["lite"], lines["mean"]) == ("3.0000", "0.2500", "1.6250")


def test_bad_input_is_refused() -> None:
    with pytest.raises(GenError, match="no ratio in mae, of 6 spaces"):
        ratios_of({name: result for name, result in SIX.items() if name != "mae"})
    with pytest.raises(GenError, match="both scores in clip"):
        ratios_of({**SIX, "again": SIX["clip"]})
    with pytest.raises(GenError, match="of no space of this protocol"):
        ratios_of({"a": score("digits", 1.0)})
    with pytest.raises(GenError, match="unknown protocol of ratios"):
        ratios_of(SIX, protocol="fdr7")
    with pytest.raises(GenError, match=r"differ in count \(100 and 50\)"):
        ratios_of({"a": score("x", 1.0), "b": dataclasses.replace(SIX["clip"], protocol=Protocol("clip", "x", 50))})
    other = dataclasses.replace(score("x", 1.0).protocol, reference="others")
    with pytest.raises(GenError, match="differ in reference"):
        ratios_of({"a": score("x", 1.0)}, {"v": Result({"frechet_distance": 1.0}, other)})
    with pytest.raises(GenError, match="positive distance"):
        ratios_of({"a": score("x", 1.0)}, {"v": score("x", 0.0)})
    with pytest.raises(GenError, match="no scores"):
        ratios_of({})
