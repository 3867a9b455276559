import dataclasses

import numpy as np
import pytest

from gen.errors import GenError
from gen.metrics.evaluate import Evaluation, Settings, evaluate, part_of
from gen.metrics.frechet import frechet_distance
from gen.metrics.neighbours import manifold
from gen.metrics.protocol import Result, require_comparable
from gen.metrics.reference import Reference, make_reference
from gen.metrics.sources import balanced_labels, from_arrays, generated
from tests.metrics.toy import PARAMS, Toy, draw, features, images

REAL, FAKE = images(120), images(90, seed=1) // 2
LABELS = balanced_labels(90, 4)


@pytest.fixture(scope="module")
def reference():
    return make_reference("toys", from_arrays(REAL), Toy(), split="train", batch=64)


def test_scores_are_those_of_the_features(reference, tmp_path):
    seen = []
    result = evaluate(
        from_arrays(FAKE, LABELS), reference, Toy(), subject={"name": "half"}, progress=lambda *a: seen.append(a)
    )
    real, fake = features(REAL), features(FAKE)
    expected = frechet_distance(real.mean(0), np.cov(real.T), fake.mean(0), np.cov(fake.T))
    near = manifold(real, fake, 3)
    assert result.values["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    for name in ("precision", "recall", "density", "coverage"):
        assert result.values[name] == pytest.approx(getattr(near, name))
    assert 0 <= result.values["accuracy"] <= 1
    assert len(result.per_class["accuracy"]) == 4
    assert (result.protocol.count, result.protocol.reference, result.protocol.split) == (90, "toys", "train")
    assert result.subject["name"] == "half"
    assert seen[-1] == (90, 90)
    result.save(tmp_path / "scores.json")
    assert Result.load(tmp_path / "scores.json") == result


def test_the_reference_scores_itself_perfectly(reference):
    values = evaluate(from_arrays(REAL), reference, Toy()).values
    assert values["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert values["precision"] == values["recall"] == values["coverage"] == 1
    assert "accuracy" not in values


def test_no_accuracy_where_the_classes_are_not_those_of_the_classifier(reference):
    source = from_arrays(FAKE, LABELS % 3)
    assert "accuracy" not in evaluate(source, reference, Toy()).values
    for given in (source, from_arrays(FAKE)):
        with pytest.raises(GenError, match="accuracy needs samples labelled with the classes of the extractor's class"):
            Evaluation(given, reference, Toy(), Settings(extra=("accuracy",)))


def test_reference_files(reference, tmp_path):
    reference.save(tmp_path / "ref.npz")
    loaded = Reference.load(tmp_path / "ref.npz")
    assert loaded.fingerprint() == reference.fingerprint()
    np.testing.assert_array_equal(loaded.covariance, reference.covariance)
    source = from_arrays(FAKE)
    assert evaluate(source, loaded, Toy()).values == evaluate(source, reference, Toy()).values
    other = make_reference("toys", from_arrays(REAL[::-1]), Toy(), split="train")
    assert other.fingerprint() != reference.fingerprint()
    again = make_reference("toys", from_arrays(REAL), Toy(), split="train", batch=13)
    assert again.fingerprint() == reference.fingerprint()


def test_other_files_are_no_references(tmp_path):
    np.savez(tmp_path / "bare.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(GenError, match="lacks feats, name, identity, protocol"):
        Reference.load(tmp_path / "bare.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    for name in ("broken.npz", "absent.npz"):
        with pytest.raises(GenError, match="cannot be read as a reference"):
            Reference.load(tmp_path / name)


def test_refuses(reference):
    source = from_arrays(FAKE)
    for arguments, message in (
        ({"count": 91}, "91 samples asked of a source with 90"),
        ({"neighbours": 90}, "90 neighbours asked of 90"),
        ({"neighbours": 0}, "0 neighbours"),
        ({"neighbours": 10, "neighbour_limit": 10}, "10 neighbours asked of 10"),
        ({"neighbour_rule": "half"}, "unknown neighbour rule"),
    ):
        with pytest.raises(GenError, match=message):
            evaluate(source, reference, Toy(), Settings(**arguments))
    with pytest.raises(GenError, match=r"made with extractor_fingerprint 'toy0\.0'"):
        evaluate(source, reference, Toy(shift=1.0))
    fewer = evaluate(source, reference, Toy(), Settings(count=50))
    with pytest.raises(GenError, match="count is 90 and 50"):
        require_comparable({"all": evaluate(source, reference, Toy()), "fewer": fewer})


def test_a_partial_set_is_scored_only_when_asked_for_and_says_so(reference):
    source = from_arrays(FAKE)
    assert "partial" not in evaluate(source, reference, Toy()).subject
    fewer = evaluate(source, reference, Toy(), Settings(count=50))
    assert (fewer.protocol.count, fewer.subject["partial"]) == (50, "the first 50 of 90 samples")
    evaluation = Evaluation(source, reference, Toy())
    spans = [part_of(90, number, 3) for number in (1, 2, 3)]
    parts = [evaluation.gather(indices=span, batch=16) for span in spans]
    merged = evaluation.result(evaluation.scores(evaluation.found(parts))).values
    for name, value in evaluate(source, reference, Toy()).values.items():
        assert merged[name] == pytest.approx(value, rel=1e-6), name
    for some in (parts[:2], parts[::2]):
        with pytest.raises(GenError, match=r"60 of 90 samples are in .*no score is given for a partial set"):
            evaluation.found(some)
    for number, count in ((0, 3), (4, 3), (1, 91)):
        with pytest.raises(GenError, match="with samples in each"):
            part_of(90, number, count)


def test_presets_are_kept_to_or_departed_from_by_name(reference):
    settings = dataclasses.replace(Settings.of("digits"), count=90)
    source = from_arrays(FAKE, LABELS, rule="seed mod classes")
    with pytest.raises(GenError, match="'digits' has extractor 'digits', this evaluation 'toy'"):
        evaluate(source, reference, Toy(), settings)
    forced = evaluate(source, reference, Toy(), dataclasses.replace(settings, force=True))
    assert forced.protocol.name == "digits, but for extractor, count, reference"
    adm = Settings.of("adm-imagenet256")
    assert (adm.count, adm.score_splits, adm.neighbour_limit) == (50_000, "chunk-5000", 50_000)


def test_pictures_are_kept_as_they_were(reference):
    evaluation = Evaluation(from_arrays(FAKE), reference, Toy(), Settings(pictures=7))
    found = evaluation.found([evaluation.gather(batch=16)])
    np.testing.assert_array_equal(found["pictures"], FAKE[:7])
    assert found["pictures"].dtype == np.uint8


def test_a_generator_and_its_stored_samples_agree(reference):
    seeds = range(7, 97)
    source = generated(draw, PARAMS, seeds=seeds, identity="draw", labels=LABELS, rule="balanced")
    live = evaluate(source, reference, Toy(), batch=32)
    floats = np.asarray(source.function(source.arguments, np.arange(90))["image"])
    stored = np.floor(np.clip(127.5 * floats + 128, 0, 255)).astype(np.uint8)
    kept = evaluate(from_arrays(stored, LABELS, quantiser="round", rule="balanced"), reference, Toy())
    require_comparable({"live": live, "kept": kept})
    for name, value in live.values.items():
        assert kept.values[name] == pytest.approx(value, rel=1e-5), name
    assert live.protocol.seeds == "7-96"
    assert dataclasses.replace(kept.protocol, seeds="7-96") == live.protocol
