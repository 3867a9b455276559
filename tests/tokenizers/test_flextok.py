"""FlexTok on small networks: prefixes of tokens, decoding, the training loss, sizes, what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.features.vit import ViTConfig
from gen.nn.network import Network, count, param_shapes
from gen.tokenizers.flextok import PREVIEW, Pixels, flextok
from gen.tokenizers.flextok_train import Alignment, FlexTokDraws, FlexTokTask, KeepLaw
from tests.conformance.examples import FLEXTOK


def drawn(config: Any, seed: int = 0) -> Any:
    """Parameters none of which is zero: a fresh decoder gives back its noise, whatever the tokens."""

    @jax.jit
    def draw(key: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(param_shapes(config))
        keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
        return tree.unflatten([0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])

    return draw(jax.random.key(seed))


def test_any_numbers_of_tokens_decode_in_one_batch() -> None:
    """They compile nothing, encode nothing, and each image is its own; tokens beyond the first k say nothing."""
    params, n = drawn(FLEXTOK), FLEXTOK.tokens
    keys = jax.random.split(jax.random.key(1), 5)
    ids = jax.random.randint(jax.random.key(2), (5, n), 0, FLEXTOK.spec.vocabulary)
    decoder = {"decoder": params["decoder"]}  # all that it needs: no encoder runs

    @jax.jit
    def decode(ids: jax.Array, keep: jax.Array, keys: jax.Array) -> jax.Array:
        codes = FLEXTOK.quantizer.build(None).embed(ids)
        return FLEXTOK.decode(decoder, codes, cond={"keep": keep}, keys=keys)

    keep = jnp.array([0, 1, 2, n, n + 7])
    images = np.asarray(decode(ids, keep, keys))
    swapped = np.asarray(decode(ids[::-1], keep[::-1], keys[::-1]))[::-1]
    np.testing.assert_allclose(swapped, images, rtol=1e-5, atol=1e-5)
    beyond = jnp.where(jnp.arange(n) < keep[:, None], ids, 0)
    np.testing.assert_allclose(decode(beyond, keep, keys), images, rtol=1e-5, atol=1e-5)
    every = np.asarray(decode(ids, jnp.full(5, n, jnp.int32), keys))
    moved = np.abs(every - images).reshape(5, -1).max(1)
    assert (moved[:3] > 1e-3).all()
    assert (moved[3:] < 1e-5).all()
    assert decode._cache_size() == 1


@pytest.mark.slow
def test_the_preview_is_one_call_from_the_same_noise() -> None:
    params, keys = drawn(FLEXTOK), jax.random.split(jax.random.key(1), 2)
    codes, flow = jnp.zeros((2, 4, 2)), FLEXTOK.flow
    found = FLEXTOK.decode(params, codes, keys=keys, options=PREVIEW)
    noise = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(keys)
    cond = flow.net.apply(params["decoder"], codes, jnp.full(2, 4), method="condition")
    np.testing.assert_allclose(found, flow(params["decoder"], noise, 1.0, cond).denoised, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("law", "expected"), [("pow2", {1, 2, 4, 8}), ("uniform", set(range(1, 13)))])
def test_numbers_of_tokens_that_training_keeps(law: Any, expected: set[int]) -> None:
    kept = np.asarray(KeepLaw(law)(jax.random.key(0), 4000, 12))
    values, counts = np.unique(kept, return_counts=True)
    assert set(values) == expected
    np.testing.assert_allclose(counts / 4000, 1 / len(expected), atol=0.03)


def test_rounded_up_to_powers_of_two() -> None:
    kept = KeepLaw("uniform-pow2").kept(jnp.arange(1, 13), 12)
    assert list(kept) == [1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]


def test_loss() -> None:
    """Velocities from the kept tokens; images that lose them all teach the encoder nothing."""
    task = FlexTokTask(tokenizer=FLEXTOK)
    params, flow = drawn(FLEXTOK), FLEXTOK.flow
    images = jax.random.uniform(jax.random.key(3), (4, 8, 8, 1), minval=-1.0, maxval=1.0)
    draws = task.draw(jax.random.key(4), 4)
    draws = dataclasses.replace(draws, dropped=jnp.array([False, True, False, True]))

    def loss(params: Any, draws: FlexTokDraws) -> Any:
        return task.loss(params, images, draws)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, aux), grads = step(params, draws)

    @jax.jit
    def expected(params: Any, draws: FlexTokDraws) -> Any:
        encoded, t, eps = FLEXTOK.encode(params, images), draws.flow.t, draws.flow.eps
        registers = flow.net.apply(params["decoder"], encoded.codes, draws.keep, method="condition")["registers"]
        registers = jnp.where(draws.dropped[:, None, None], params["decoder"]["unconditional"], registers)
        mixed = t[:, None, None, None] * eps + (1 - t[:, None, None, None]) * images
        velocity = flow.net(params["decoder"], mixed, (1000.0 * t,), {"registers": registers})[0]
        return jnp.square(velocity - (eps - images)).mean(), encoded.ids

    error, ids = expected(params, draws)
    np.testing.assert_allclose(value, error, rtol=1e-4)
    np.testing.assert_array_equal(aux.out, ids)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads["encoder"])) > 0
    _, none = step(params, dataclasses.replace(draws, dropped=jnp.ones(4, bool)))
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(none["encoder"])) == 0


@pytest.mark.slow
def test_alignment_trains_a_projector_that_is_not_exported() -> None:
    encoder = ViTConfig(size=28, width=8, depth=1, heads=2, hidden=16)
    task = FlexTokTask(tokenizer=FLEXTOK, alignment=Alignment(encoder, block=0, tokens=3))
    frozen = {"encoder": Network(encoder).init(jax.random.key(5))}
    state = jax.jit(lambda: task.init(jax.random.key(0), frozen, None))()
    batch = {"image": np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)}
    new, metrics = jax.jit(task.update)(state, frozen, batch, task.inputs(0, 1), jax.random.key(1))
    assert -1.0 <= float(metrics["alignment"]) <= 1.0
    before, after = state.params["tokenizer"]["projector"], new.params["tokenizer"]["projector"]
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    exported = task.export(new)["tokenizer"]
    assert jax.tree.structure(exported) == jax.tree.structure(param_shapes(FLEXTOK))


def test_published_sizes() -> None:
    """Encoder 85.2, 287.1, 287.1 and decoder 172.3, 578.3, 2169 million."""
    sizes = {
        "d12-d12": (85_210_374, 172_276_288),
        "d18-d18": (287_068_038, 578_329_408),
        "d18-d28": (287_068_038, 2_169_334_336),
    }
    for name, (encoder, decoder) in sizes.items():
        shapes = param_shapes(flextok(name, first=Pixels((32, 32, 16))))
        assert [count(shapes[part]) for part in ("encoder", "decoder")] == [encoder, decoder]


def test_refusals() -> None:
    params = jax.eval_shape(lambda: drawn(FLEXTOK))
    with pytest.raises(GenError, match=r"images are \(8, 8, 3\); this FlexTok takes \(8, 8, 1\)"):
        FLEXTOK.encode(params, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(GenError, match="starts from noise; give it keys"):
        FLEXTOK.decode(params, jnp.zeros((1, 4, 2)))
    with pytest.raises(GenError, match="did you mean 'd12-d12'"):
        flextok("d12-d1")
    with pytest.raises(GenError, match="8x8 patches, and positions for 4"):
        dataclasses.replace(FLEXTOK, first=Pixels((16, 16, 1)))
    with pytest.raises(GenError, match="none of number 1"):
        FlexTokTask(tokenizer=FLEXTOK, alignment=Alignment(ViTConfig()))
    with pytest.raises(GenError, match="latents of a trained autoencoder"):
        FlexTokTask(tokenizer=flextok("d12-d12")).start(jax.random.key(0), {}, None)
