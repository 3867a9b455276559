"""Measures that look at captions, training images or held-out images beside the samples."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.metrics import measures
from gen.metrics.beside import with_images, with_texts
from gen.metrics.classifier import Classifier, classification_accuracy
from gen.metrics.diversity import vendi
from gen.metrics.evaluate import Evaluation, Settings, evaluate
from gen.metrics.intervals import frechet_error
from gen.metrics.kernels import cmmd
from gen.metrics.memorisation import memorisation
from gen.metrics.page import evaluation_page
from gen.metrics.protocol import differences
from gen.metrics.reference import make_reference
from gen.metrics.sources import balanced_labels, from_arrays, generated
from tests.metrics.toy import PARAMS, Toy, draw, features, images

REAL, HELDOUT = images(60), images(40, seed=5)
FAKE = np.concatenate([images(28, seed=1), REAL[[3, 8]]])  # two copies
LABELS = balanced_labels(30, 2)


@dataclasses.dataclass(frozen=True)
class ToyCLIP(Toy):
    """Claims to be a CLIP: unit embeddings, or as they come."""

    unit: bool = False

    @property
    def name(self):
        return "clip-toy"

    @property
    def resize(self):
        return "none, stretched" if self.unit else "none"

    @property
    def outputs(self):
        return ("features",)

    def __call__(self, params, pixels):
        found = super().__call__(params, pixels)["features"]
        return {"features": found / jnp.linalg.norm(found, axis=-1, keepdims=True) if self.unit else found}


@functools.cache
def _reference(extractor):
    return make_reference("toys", from_arrays(REAL, balanced_labels(60, 2)), extractor, batch=64)


def _texts(count):
    rows = np.random.default_rng(0).normal(size=(count, 12)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_clip_score_of_stored_and_generated_samples():
    extractor, texts = ToyCLIP(), _texts(30)
    stored = with_texts(from_arrays(FAKE), texts)
    result = evaluate(stored, _reference(extractor), extractor, batch=8)
    unit = features(FAKE) / np.linalg.norm(features(FAKE), axis=1, keepdims=True)
    each = 100 * np.maximum((unit * texts).sum(1), 0)
    assert result.values["clip_score"] == pytest.approx(each.mean(), rel=1e-5)
    assert result.within["clip_score"] == pytest.approx(each.std(ddof=1) / np.sqrt(30), rel=1e-4)
    assert result.protocol.beside.startswith("captions ")
    other = evaluate(with_texts(from_arrays(FAKE), texts[::-1].copy()), _reference(extractor), extractor, batch=8)
    assert set(differences(result.protocol, other.protocol)) == {"beside"}

    live = generated(draw, PARAMS, seeds=range(30), identity="draw", labels=LABELS, rule="balanced")
    drawn = np.asarray(live.function(live.arguments, np.arange(30))["image"])
    kept = from_arrays(drawn, LABELS, quantiser="round")
    scores = [evaluate(with_texts(s, texts), _reference(extractor), extractor, batch=8).values for s in (live, kept)]
    assert scores[0]["clip_score"] == pytest.approx(scores[1]["clip_score"], rel=1e-6)
    with pytest.raises(GenError, match="29 captions for 30 samples"):
        with_texts(stored, texts[:29])
    with pytest.raises(GenError, match="clip_score needs a CLIP and a caption for every sample"):
        Evaluation(from_arrays(FAKE), _reference(extractor), extractor, Settings(extra=("clip_score",)))


def test_measures_of_features_alone():
    extractor = ToyCLIP(unit=True)
    names = ("vendi", "cmmd", "kid", "mind")
    result = evaluate(from_arrays(FAKE), _reference(extractor), extractor, Settings(extra=names))
    real, fake = (features(x) / np.linalg.norm(features(x), axis=1, keepdims=True) for x in (REAL, FAKE))
    assert result.values["vendi"] == pytest.approx(vendi(fake).score, rel=1e-5)
    assert result.values["cmmd"] == pytest.approx(cmmd(real, fake), rel=1e-3)
    assert 0 < result.within["cmmd"] < result.values["cmmd"] * 2
    expected = frechet_error(fake, real.mean(0), np.cov(real.T))
    assert result.within["frechet_distance"] == pytest.approx(expected, rel=1e-3)
    assert set(result.within) == set(result.values)
    with pytest.raises(GenError, match="cmmd needs the embeddings that it is defined on; give --extractor clip:cmmd"):
        Evaluation(from_arrays(FAKE), _reference(Toy()), Toy(), Settings(extra=("cmmd",)))


def test_copies_of_training_images_and_classifier_accuracy(monkeypatch):
    quick = functools.partial(classification_accuracy, classifier=Classifier(width=8, blocks=1, steps=3, batch=4))
    monkeypatch.setattr(measures, "classification_accuracy", quick)
    source = with_images(from_arrays(FAKE, LABELS), "training", from_arrays(REAL), Toy(), batch=32)
    heldout = from_arrays(HELDOUT, balanced_labels(40, 2))
    source = with_images(source, "heldout", heldout, Toy(), batch=32)
    job = Evaluation(source, _reference(Toy()), Toy(), Settings(extra=("cas",), pictures=4))
    found = job.found([job.gather(batch=16)])
    scores = job.scores(found)
    result = job.result(scores)
    assert result.values["copies_in_pixels"] == pytest.approx(2 / 30)
    exact = memorisation(features(FAKE), features(REAL), features(HELDOUT))
    assert result.values["copies_in_features"] == pytest.approx(exact.share)
    assert 0 <= result.values["cas"] <= 1
    assert len(result.per_class["cas"]) == 2
    assert result.within["cas"] >= 0
    assert [text.split()[0] for text in result.protocol.beside.split(", ")] == ["classifier", "heldout", "training"]
    page = evaluation_page("toys", result, found, _reference(Toy()), details=scores.details).html()
    assert "The 16 samples nearest in pixels" in page
    for extra, given, message in (
        (("memorisation",), from_arrays(FAKE), "give --training DATA and --heldout DATA"),
        (("cas",), from_arrays(FAKE, LABELS), "give --heldout DATA with classes"),
        (("vendy",), from_arrays(FAKE), "did you mean 'vendi'"),
    ):
        with pytest.raises(GenError, match=message):
            Evaluation(given, _reference(Toy()), Toy(), Settings(extra=extra))
