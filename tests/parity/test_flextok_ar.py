"""What FlexTok's autoregressive models read, and how they draw a token, against the official code.

Their trunk is in no fixture: its layout is only said inside the published checkpoints.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen.autoregressive.decoding import filtered, mix
from gen.autoregressive.flextok_ar import FlexTokARConfig, FlexTokEmbedding, line_positions
from gen.nn.network import Network, param_shapes
from gen.pretrained.flextok import ar_embedding_rules
from gen.pretrained.rules import load, save
from tests.parity.conftest import Fixture, fixtures

KINDS = {"absolute": "learned", "sincos1d": "sincos"}
# what the README states: temperature, k, p
VARIANTS = {
    "plain": (1.0, 0, 1.0),
    "temp07": (0.7, 0, 1.0),
    "top_k": (1.0, 6, 1.0),
    "top_p": (1.0, 0, 0.8),
    "all": (0.9, 10, 0.7),
}
every_fixture = pytest.mark.parametrize("fx", fixtures("flextok-ar-sampling*"), ids=str)


class Embedding(FlexTokARConfig):
    """The model without its trunk."""

    def build(self, rngs: nnx.Rngs) -> Any:
        return FlexTokEmbedding(self, rngs)


@every_fixture
def test_what_the_trunk_reads(fx: Fixture) -> None:
    given = fx.config
    tokens, label = jnp.asarray(fx.io["token_ids"]), jnp.asarray(fx.io["labels"])
    for official, positions in KINDS.items():
        config = Embedding(
            shape=(given["num_tokens"],),
            vocabulary=given["codebook_size"],
            width=given["embed_dim"],
            heads=1,
            num_classes=given["num_classes"],
            positions=positions,
        )
        prefix = f"{official}."
        weights = {k.removeprefix(prefix): v for k, v in fx.weights.items() if k.startswith(prefix)}
        params, _ = load(ar_embedding_rules(config, ""), weights, param_shapes(config))
        back = save(ar_embedding_rules(config, ""), params)
        assert all(np.array_equal(back[name], array) for name, array in weights.items())
        if positions == "sincos":
            fx.close(line_positions(given["num_tokens"], given["embed_dim"]), weights["positional_embedding"])
        fx.close(tokens, f"{official}_targets")
        null = {"label": jnp.full_like(label, given["num_classes"])}
        embed = Network(config)
        fx.close(embed(params, tokens[:, :-1], {"label": label}), f"{official}_train_embeddings")
        fx.close(embed(params, tokens[:, :-1], null), f"{official}_train_embeddings_null")
        start = f"{official}_generation_embeddings_prefix"
        for name in (name for name in fx.io if name.startswith(start)):
            count = int(name.removeprefix(start))
            fx.close(embed(params, tokens[:, :count], {"label": label}), name)


@every_fixture
def test_drawing(fx: Fixture) -> None:
    guided = mix(fx.io["logits_cond"], fx.io["logits_uncond"], fx.config["cfg_factor"])
    fx.close(guided, "logits_guided")
    for name, (temperature, k, p) in VARIANTS.items():
        kept = filtered(jnp.asarray(guided), temperature=temperature, k=k, p=p)
        chances = np.asarray(jax.nn.softmax(kept[:, 0]))
        fx.close(chances, f"probs_{name}")
        below = np.cumsum(chances, axis=-1) <= fx.io["uniforms"][:, None]
        fx.close(below.sum(-1).astype(np.int32), f"sample_{name}")
