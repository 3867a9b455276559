"""Terms of the tokenizers' losses: what they measure, where their weights are looked for, what a run goes without."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.features.efficientnet_lite import BLOCKS, conv_shapes
from gen.features.weights import store_weights
from gen.tokenizers.losses import LPIPS, FeatureTerm, LiteMaps, available, frozen_terms, penalties
from gen.tokenizers.train import TokenizerTask
from tests.tokenizers.test_train import TOKENIZER


def small_vgg() -> dict[str, object]:
    """A trunk of three channels with its heads."""
    keys = iter(jax.random.split(jax.random.key(0), 40))
    layers = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
    net = {
        f"slice{i}": {
            str(n): {"kernel": jax.random.normal(next(keys), (3, 3, 3, 3)) / 3, "bias": jnp.zeros(3)} for n in numbers
        }
        for i, numbers in layers.items()
    }
    return {"net": net, **{f"lin{i}": jnp.ones(3) for i in range(5)}}


def test_weights_are_found_by_file_and_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    terms, lines = available((LPIPS(), LPIPS(net="alex")))
    assert terms == ()
    assert [line.split(":")[0] for line in lines] == ["without the term lpips-vgg", "without the term lpips-alex"]
    assert "gen convert lpips" in lines[0]
    file = tmp_path / "vgg.safetensors"
    identity = store_weights(file, small_vgg(), origin="a test")
    term = LPIPS(0.5, weights=str(file))
    assert available((term,), LiteMaps()) == ((term,), [])
    terms, lines = available((LPIPS(),), term)
    assert terms == (term,)
    assert lines[1] == "with the term lpips-vgg instead"
    arrays, origins = frozen_terms(terms)
    assert origins == {"lpips-vgg": identity}
    images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 1), minval=-1, maxval=1)
    call = jax.jit(term)
    assert call(arrays["lpips-vgg"], images, images).shape == (2,)
    assert float(call(arrays["lpips-vgg"], images, -images).min()) > 0
    with pytest.raises(GenError, match="frozen role 'lpips-vgg'"):
        TokenizerTask(TOKENIZER, terms=(term,)).init(jax.random.key(0), {}, None)


@pytest.mark.slow
def test_lite_maps_see_the_networks_scale_of_pixels() -> None:
    """They are 0 for equal images and have a gradient there."""
    shapes = conv_shapes()
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params: dict[str, Any] = {}
    for key, (name, shape) in zip(keys, shapes.items(), strict=True):
        layer = {"kernel": jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:3])), "bias": jnp.zeros(shape[-1])}
        where = params
        *above, last = name.split("/")
        for part in above:
            where = where.setdefault(part, {})
        where[last] = layer
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1, maxval=1)
    term = LiteMaps(blocks=(0,))
    value, gradient = jax.jit(jax.value_and_grad(lambda y: term(params, images, y).sum()))(0.5 * images)
    assert float(value) > 0
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(jax.jit(term)(params, images, images), 0.0, atol=1e-9)


def test_losses_of_latents_are_weighed_by_name() -> None:
    losses = {"commitment": jnp.array([1.0, 3.0]), "codebook": jnp.array([2.0, 2.0])}
    assert float(penalties(losses, {"commitment": 0.25, "codebook": 1.0, "kl": 9.0})) == 2.5
    with pytest.raises(GenError, match="losses codebook have no weight"):
        penalties(losses, {"commitment": 0.25})


def test_terms_that_cannot_be_are_refused() -> None:
    for make, message in (
        (lambda: LPIPS(net="resnet"), "known trunks"),
        (lambda: LiteMaps(blocks=(len(BLOCKS),)), "expected blocks 0 to 15"),
        (lambda: FeatureTerm(output="spatial"), "one of features, logits"),
        (lambda: TokenizerTask(TOKENIZER, terms=(LPIPS(), LPIPS())), "give each once"),
    ):
        with pytest.raises(GenError, match=message):
            make()
