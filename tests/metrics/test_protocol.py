import dataclasses
import json
import subprocess

import pytest

from gen.config import from_json, to_json
from gen.errors import GenError
from gen.metrics import protocol
from gen.metrics.protocol import (
    PRESETS,
    Protocol,
    Result,
    combine,
    departures,
    differences,
    preset,
    require_comparable,
    versions,
)

P = Protocol("digits", "abc", 1797, labels="balanced", reference="digits", reference_fingerprint="def", seeds="0-1796")


def _result(value, seeds="0-1796", **changes):
    protocol = dataclasses.replace(P, seeds=seeds, **changes)
    return Result({"frechet_distance": value}, protocol, {"name": "x"}, per_class={"accuracy": (value / 10, None)})


def test_files(tmp_path):
    result = _result(1.25)
    result.save(tmp_path / "a" / "scores.json")
    assert Result.load(tmp_path / "a" / "scores.json") == result
    assert from_json(to_json(P)) == P
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["scores.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ('{"values"', "not valid JSON"),
        ('{"values": {"frechet_distance": 1}}', "without a protocol"),
        ("[]", "without a protocol"),
        (json.dumps(to_json(_result(1.0)) | {"extra": 1}), "unknown key 'extra'"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "scores.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(GenError, match=message) as error:
        Result.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Protocol) if f.name not in ("seeds", "name")])
def test_every_field_that_changes_a_score_must_agree(field):
    other = dataclasses.replace(P, **{field: 7 if isinstance(getattr(P, field), int) else "other"})
    assert list(differences(P, other)) == [field]
    pair = {"teacher": _result(1.0), "student": dataclasses.replace(_result(2.0), protocol=other)}
    with pytest.raises(GenError, match=f"'teacher' and 'student'.*{field} is"):
        require_comparable(pair)
    require_comparable(pair, force=True)
    require_comparable({"a": _result(1.0), "b": _result(2.0, seeds="1797-3593")})


def test_mean_over_seeds():
    runs = [_result(value, seeds=str(i)) for i, value in enumerate((1.0, 2.0, 4.5))]
    mean = combine(runs)
    assert mean.values["frechet_distance"] == 2.5
    assert mean.spread["frechet_distance"] == pytest.approx(3.25**0.5)
    assert mean.each["frechet_distance"] == (1.0, 2.0, 4.5)
    assert mean.per_class["accuracy"] == (pytest.approx(0.25), None)
    assert (mean.runs, mean.protocol.seeds) == (3, "0, 1, 2")
    assert combine(runs[:1]).spread == {}
    with pytest.raises(GenError, match="other seeds"):
        combine([runs[0], runs[0]])
    with pytest.raises(GenError, match="count"):
        combine([runs[0], _result(1.0, seeds="9", count=10)])
    with pytest.raises(GenError, match="at least one"):
        combine([])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_are_finite(value):
    with pytest.raises(GenError, match="frechet_distance is"):
        _result(value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fix_fields_of_a_protocol(name):
    """A protocol with the preset's values departs in nothing; one with another value in that field alone."""
    fields = dict(preset(name).fields)
    kept = dataclasses.replace(P, **fields)
    assert departures(name, kept) == {}
    for field, value in fields.items():
        other = value + 1 if isinstance(value, int) else f"{value}?"
        assert departures(name, dataclasses.replace(kept, **{field: other})) == {field: (value, other)}
    assert "extractor" in fields


def test_the_name_of_a_preset_is_recorded_and_not_compared():
    assert differences(P, dataclasses.replace(P, name="digits", seeds="5-9")) == {}
    assert from_json(to_json(dataclasses.replace(P, name="digits"))).name == "digits"
    with pytest.raises(GenError, match="unknown protocol 'adm-imagenet265'; did you mean 'adm-imagenet256'"):
        preset("adm-imagenet265")


def test_versions_name_the_revision_of_a_checkout_only(monkeypatch):
    assert {"python", "gen", "jax"} <= set(versions())

    def absent(*args, **options):
        raise OSError("no git here")

    monkeypatch.setattr(subprocess, "run", absent)
    protocol._revision.cache_clear()
    try:
        assert "revision" not in versions()
    finally:
        protocol._revision.cache_clear()
