"""FlexTok's decoder: a rectified flow over latents, conditioned on the first k tokens (arXiv 2502.13967).

A transformer sees the patches of the noised latents beside the registers, one for each token, and gives the velocity
noise - latents at the patches. It is the network of a `gen.diffusion.denoiser.Denoiser` whose condition is the
registers: they are worked out once for a decode, and guidance's unconditional input is one learned vector in the place
of each.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.diffusion.backbones.backbone import Backbone, BackboneConfig, Call, Output
from gen.nn.conditions import Condition, Conditions
from gen.nn.layers import TimeEmbedder, layer_norm, linear, modulate, patchify, run_stack, stack, unpatchify
from gen.nn.network import Cond
from gen.tokenizers.flextok_layers import EPS, GridPositions, ModulatedBlock, learned
from gen.training.sharding import constrain

__all__ = ["FlowDecoder", "FlowDecoderConfig", "nested_dropout"]


def nested_dropout(registers: jax.Array, keep: jax.Array, mask: jax.Array) -> jax.Array:
    """Registers (B, N, D) of which all but the first `keep` (B,) are the vector `mask` (D,); N or more keep all."""
    kept = jnp.arange(registers.shape[1]) < keep[:, None]
    return jnp.where(kept[..., None], registers, mask)


@dataclasses.dataclass(frozen=True)
class FlowDecoderConfig(BackboneConfig):
    """The decoder's network, as `gen.tokenizers.flextok.FlexTokConfig` makes it of itself.

    Attributes:
      size: (h, w) of the latents.
      channels: of the latents.
      tokenizer: the `gen.tokenizers.flextok.FlexTokConfig` that it is the decoder of.
    """

    size: tuple[int, int]
    channels: int
    tokenizer: Any

    @property
    def conditions(self) -> Conditions:
        """Gives the registers, as `FlowDecoder.condition` gives them."""
        return {"registers": Condition((self.tokenizer.tokens, self.tokenizer.decoder.width))}

    def build(self, rngs: nnx.Rngs) -> "FlowDecoder":
        """Gives the module with freshly drawn parameters."""
        return FlowDecoder(self, rngs)


class FlowDecoder(Backbone):
    """The network of a `FlowDecoderConfig`; its output is 0 at first, and its blocks are the identity.

    Features, all (B, patches + tokens, D) float32: ``tokens`` (patches with positions, then registers), ``block_0`` ...
    """

    title = "FlexTok's decoder"

    def __init__(self, config: FlowDecoderConfig, rngs: nnx.Rngs) -> None:
        self.config, whole = config, config.tokenizer
        width, heads, dtype = whole.decoder.width, whole.decoder.heads, jnp.dtype(whole.dtype)
        values, zeros = whole.patch**2 * config.channels, nnx.initializers.zeros_init()
        self.codes = linear(whole.quantizer.width, width, dtype=dtype, rngs=rngs)
        self.code_positions = learned(rngs, whole.tokens, width)
        self.dropped = learned(rngs, width)
        self.unconditional = learned(rngs, width)
        self.patch = linear(values, width, dtype=dtype, rngs=rngs)
        self.positions = GridPositions(whole.positions, width, whole.length, whole.grid, rngs)
        self.time = TimeEmbedder(width, frequencies=whole.frequencies, max_period=256.0, rngs=rngs)
        self.blocks = stack(lambda r: ModulatedBlock(width, heads, dtype=dtype, rngs=r), whole.decoder.depth, rngs)
        self.final_ada = linear(width, 2 * width, dtype=dtype, rngs=rngs, init=zeros)
        self.final = linear(width, values, dtype=dtype, rngs=rngs, init=zeros)

    def embed(self, codes: jax.Array) -> jax.Array:
        """Codes (B, tokens, width) as registers with their positions (B, tokens, D) float32."""
        return self.codes(codes).astype(jnp.float32) + self.code_positions[...]

    def condition(self, codes: jax.Array, keep: jax.Array) -> Cond:
        """Gives the condition that codes (B, tokens, width) make, of which only the first `keep` (B,) are used."""
        return {"registers": nested_dropout(self.embed(codes), keep, self.dropped[...])}

    def null(self, cond: Cond) -> Cond:
        """Gives the registers of an image of which nothing is known, not even that it has tokens."""
        return {**cond, "registers": jnp.broadcast_to(self.unconditional[...], cond["registers"].shape)}

    def features(self) -> list[str]:
        """Names the tokens and the blocks."""
        return ["tokens", *(f"block_{i}" for i in range(self.config.tokenizer.decoder.depth))]

    def forward(self, call: Call) -> Output:
        """Does what `Backbone` says."""
        whole = self.config.tokenizer
        layers = tuple(i for i in range(whole.decoder.depth) if f"block_{i}" in call.taps)
        c = self.time(call.times[0])
        patches = self.patch(patchify(call.x, whole.patch)).astype(jnp.float32)
        patches = patches + self.positions(whole.grid, stretch=whole.stretch)
        count = patches.shape[1]
        tokens = constrain(jnp.concatenate([patches, call.cond["registers"]], axis=1))
        features = {"tokens": tokens} if "tokens" in call.taps else {}
        tokens, _, kept = run_stack(
            self.blocks,
            tokens,
            lambda block, tokens, _: (constrain(block(tokens, c, count)), None),
            remat=whole.remat,
            scan=whole.scan,
            keep=layers,
            stop=max(layers, default=-1) + 1 if call.stop else None,
        )
        features |= {f"block_{i}": kept[i] for i in layers}
        if call.stop:
            return tokens, features
        shift, scale = jnp.split(self.final_ada(jax.nn.silu(c)).astype(jnp.float32), 2, axis=-1)
        out = self.final(modulate(layer_norm(tokens[:, :count], EPS), shift, scale)).astype(jnp.float32)
        return unpatchify(out, self.config.size, whole.patch), features
