"""VAR: a transformer that predicts a pyramid of token maps, each whole map at once.

Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction", arXiv
2404.02905, section 3. The tokens are those of `gen.tokenizers.var_vqvae`; what the transformer reads of the coarser
maps are sums of code vectors, which the tokenizer's quantizer makes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.autoregressive.base import Draws, TokenModel
from gen.errors import GenError
from gen.nn.attention import attention
from gen.nn.layers import MLP, Embed, Remat, add_gated, layer_norm, linear, modulate, run_stack, stack
from gen.nn.network import Cond, Network, Params
from gen.tokenizers.quantizers.residual import Residual
from gen.training.sharding import constrain
from gen.training.task import Frozen, Schedule

__all__ = ["VAR", "Block", "VARConfig", "var"]

MAX_LOG_SCALE = math.log(100.0)  # of the factors on normed queries


@dataclasses.dataclass(frozen=True)
class VARConfig(TokenModel):
    """The transformer of VAR; itself a `gen.autoregressive.base.TokenModel`. The defaults are VAR-d16 at 256 pixels.

    Attributes:
      quantizer: of the tokenizer; it says the scales, the vocabulary and the width of the codes.
      num_classes: number of classes; the row after the last is the null class of guidance.
      width, depth, heads: of the transformer.
      hidden: inner width of the MLPs.
      normed: queries and keys have norm 1, and a learned factor for each head stands in place of 1 / sqrt(head width).
        Without it the factor is 0.25 / sqrt(head width).
      shared: all blocks share one layer that makes shifts, scales and gates of the class, and each adds a table.
      cond_dropout: share of samples that training gives the null class.
      drop_path: share of a block's branches that training leaves out in the last block; it grows linearly from 0.
      gain: factor on the first weights of the gates (alng).
      eps: of the norms.
      dtype: compute type of the matrix products; the residual stream is float32.
      remat, scan: see `gen.nn.layers.run_stack`.

    Raises GenError where the numbers do not fit together.
    """

    exact: ClassVar[bool] = True

    quantizer: Residual = Residual()
    num_classes: int = 1000
    width: int = 1024
    depth: int = 16
    heads: int = 16
    hidden: int = 4096
    normed: bool = True
    shared: bool = False
    cond_dropout: float = 0.1
    drop_path: float = 0.0
    gain: float = 1e-3
    eps: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.hidden) < 1 or self.width % self.heads:
            raise GenError(f"{self.heads} heads do not divide the width {self.width}; choose numbers that do")
        if self.num_classes < 1:
            raise GenError(f"VAR begins with a class, and num_classes is {self.num_classes}; give at least 1")
        if not 0 <= self.drop_path < 1:
            raise GenError(f"drop_path {self.drop_path} is no share of blocks; give one from 0 to below 1")

    @property
    def vocabulary(self) -> int:  # type: ignore[override]
        """Gives the number of token ids."""
        return self.quantizer.vocabulary

    @property
    def scales(self) -> tuple[int, ...]:  # type: ignore[override]
        """Gives the sides of the token maps, coarse to fine."""
        return self.quantizer.scales

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Gives the shape of one image's tokens."""
        return (self.quantizer.tokens,)

    @property
    def groups(self) -> tuple[int, ...]:
        """Gives the numbers of tokens that are decided together: one map after the other."""
        return tuple(side**2 for side in self.scales)

    def forced(self, frozen: Frozen, tokens: jax.Array) -> Cond:
        """Gives ``inputs`` (B, tokens after the first map, width of codes): the sums of the coarser maps.

        Raises GenError without the tokenizer's arrays.
        """
        if "tokenizer" not in frozen:
            raise GenError("VAR reads code vectors of the tokenizer; give its arrays as the frozen role 'tokenizer'")
        codes: Params = frozen["tokenizer"]["quantizer"]
        return {"inputs": Network(self.quantizer).apply(codes, tokens, method="inputs")}

    def logits(self, params: Params, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Does what `gen.autoregressive.base.TokenModel.logits` says; `cond` holds "label" and "inputs"."""
        del tokens  # it reads their codes
        found: jax.Array = self.net.apply(params, cond["inputs"], cond)
        return found

    def before(self, params: Params, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Gives what the blocks say of each token, (B, N, width), from the maps before its own; arguments as of
        `logits`.
        """
        del tokens
        found: jax.Array = self.net.apply(params, cond["inputs"], cond, method="before")
        return found

    def draw(self, key: jax.Array, tokens: jax.Array, schedule: Schedule) -> Draws:
        """Gives the base's draws and ``kept`` (B, depth, 2), factors on the branches: 0 or 1 / (1 - rate)."""
        base_key, path_key = jax.random.split(key)
        draws = super().draw(base_key, tokens, schedule)
        if not self.drop_path:
            return draws
        rates = jnp.linspace(0.0, self.drop_path, self.depth)[:, None]
        stays = jax.random.bernoulli(path_key, 1.0 - rates, (len(tokens), self.depth, 2))
        return {**draws, "kept": stays / (1.0 - rates)}

    def trained_on(self, params: Params, cond: Cond, draws: Draws) -> Cond:
        """Gives the conditions of a training step, with ``kept`` where branches are dropped."""
        found = super().trained_on(params, cond, draws)
        return {**found, "kept": draws["kept"]} if "kept" in draws else found

    def build(self, rngs: nnx.Rngs) -> "VAR":
        """Gives the module with freshly drawn parameters."""
        return VAR(self, rngs)


def var(depth: int, *, scales: tuple[int, ...] = Residual().scales, **changes: Any) -> VARConfig:
    """Gives the published transformer of this depth: 64 channels and one head a layer (section 3.3).

    Args:
      depth: 16, 20, 24 or 30 for images of 256 pixels, 36 for 512.
      scales: of the token maps (`gen.tokenizers.var_vqvae.SCALES`).
      changes: further fields of a `VARConfig`.
    """
    width = 64 * depth
    quantizer = Residual(scales=scales)
    return VARConfig(quantizer, width=width, depth=depth, heads=depth, hidden=4 * width, **changes)


class _Attention(nnx.Module):
    """Self-attention whose keys have no bias; see `VARConfig.normed`."""

    def __init__(self, config: VARConfig, init: Callable[..., jax.Array], rngs: nnx.Rngs) -> None:
        width, last = config.width, _scaled(init, 1.0 / math.sqrt(2.0 * config.depth))
        self.heads, self.normed = config.heads, config.normed
        self.qkv = linear(width, 3 * width, bias=False, init=init, dtype=config.dtype, rngs=rngs)
        self.q_bias, self.v_bias = nnx.Param(jnp.zeros(width)), nnx.Param(jnp.zeros(width))
        if config.normed:
            self.log_scale = nnx.Param(jnp.full(config.heads, math.log(4.0)))
        self.proj = linear(width, width, init=last, dtype=config.dtype, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k and v (B, N, H, D) of x (B, N, width)."""
        bias = jnp.concatenate([self.q_bias[...], jnp.zeros_like(self.q_bias[...]), self.v_bias[...]])
        together = self.qkv(x) + bias.astype(self.qkv.dtype)
        q, k, v = (part.reshape(*x.shape[:-1], self.heads, -1) for part in jnp.split(together, 3, axis=-1))
        if not self.normed:
            return q, k, v
        factor = jnp.exp(jnp.minimum(self.log_scale[...], MAX_LOG_SCALE))[:, None]
        return (_unit(q) * factor).astype(v.dtype), _unit(k).astype(v.dtype), v

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Attends with what `project` gave: (B, N, width)."""
        scale = 1.0 if self.normed else 0.25 / math.sqrt(q.shape[-1])
        found = attention(q, k, v, mask=mask, scale=scale)
        return self.proj(found.reshape(*found.shape[:-2], -1))


class Block(nnx.Module):
    """x + g1 attention(modulated x), then x + g2 MLP(modulated x); the class makes gates, scales and shifts."""

    def __init__(self, config: VARConfig, rngs: nnx.Rngs) -> None:
        self.eps, self.shared, width, init = config.eps, config.shared, config.width, _init(config.width)
        self.attn = _Attention(config, init, rngs)
        self.mlp = MLP(width, config.hidden, init=init, dtype=config.dtype, rngs=rngs)
        self.mlp.fc2.kernel[...] /= math.sqrt(2.0 * config.depth)
        gains = np.repeat([config.gain, config.gain, 0.5, 0.5, 0.5, 0.5], width)
        if config.shared:
            drawn = jax.random.normal(rngs.params(), (6 * width,)) / math.sqrt(width)
            self.table = nnx.Param((drawn * gains).reshape(6, width))
        else:
            self.modulation = linear(width, 6 * width, init=_scaled(init, gains), dtype=config.dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        c: jax.Array,
        mask: jax.Array | None,
        past: Any = None,
        kept: jax.Array | None = None,
        between: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Gives the block's output and its keys and values.

        Args:
          x: (B, N, width) float32.
          c: what `VAR.condition` gives.
          mask: (N, N) bool, where to look; None for everywhere.
          past: "k" and "v" (B, M, H, D) of the tokens before, which all may look at; None for none.
          kept: (B, 2) factors on the two branches; None for 1.
          between: (B, N, width), added after the attention; None for nothing.
        """
        parts = self.table[...] + c if self.shared else self.modulation(c).reshape(len(x), 6, -1)
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.moveaxis(parts.astype(jnp.float32), 1, 0)
        if kept is not None:
            gate1, gate2 = gate1 * kept[:, :1], gate2 * kept[:, 1:]
        q, k, v = self.attn.project(modulate(layer_norm(x, self.eps), shift1, scale1))
        new = {"k": k, "v": v}
        if past is not None:
            k, v = (jnp.concatenate([past[n].astype(a.dtype), a], axis=1) for n, a in new.items())
        x = add_gated(x, gate1, self.attn(q, k, v, mask))
        x = x if between is None else x + between
        return add_gated(x, gate2, self.mlp(modulate(layer_norm(x, self.eps), shift2, scale2))), new


class VAR(nnx.Module):
    """The network of a `VARConfig`.

    Attributes:
      block: makes a layer; networks of another one are made of it alike.
    """

    block: ClassVar[Any] = Block

    def __init__(self, config: VARConfig, rngs: nnx.Rngs) -> None:
        self.config, width, init = config, config.width, _init(config.width)
        tokens, first = config.shape[0], config.groups[0]
        self.label = Embed(config.num_classes + 1, width, init=init, rngs=rngs)
        self.start = nnx.Param(init(rngs.params(), (first, width), jnp.float32))
        self.positions = nnx.Param(init(rngs.params(), (tokens, width), jnp.float32))
        self.levels = nnx.Param(init(rngs.params(), (len(config.scales), width), jnp.float32))
        self.enter = linear(config.quantizer.width, width, init=init, rngs=rngs)
        if config.shared:
            self.modulation = linear(width, 6 * width, init=init, dtype=config.dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: self.block(config, rngs), config.depth, rngs)
        self.head_modulation = linear(width, 2 * width, init=_scaled(init, 0.5), rngs=rngs)
        self.head = linear(width, config.vocabulary, init=_scaled(init, 0.02), rngs=rngs)

    def condition(self, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gives the class vector (B, width) and what the blocks take of it, of classes (B,)."""
        c = self.label(label)
        lit = jax.nn.silu(c)
        return c, self.modulation(lit).reshape(len(c), 6, -1) if self.config.shared else lit

    def first(self, c: jax.Array) -> jax.Array:
        """Gives what stands in the places of the first map (B, tokens of it, width), of class vectors (B, width)."""
        return c[:, None] + self.start[...] + self._places()[: self.config.groups[0]]

    def later(self, inputs: jax.Array, at: int) -> jax.Array:
        """Embeds what the model reads at the places from `at` on: (B, N, width of codes) -> (B, N, width)."""
        return self.enter(inputs) + self._places()[at : at + inputs.shape[1]]

    def _places(self) -> jax.Array:
        """What tells a token its place and its scale: (tokens, width)."""
        config = self.config
        return self.positions[...] + self.levels[...][_scale_of(config.groups)]

    def run(
        self,
        x: jax.Array,
        c: jax.Array,
        *,
        mask: jax.Array | None = None,
        past: Any = None,
        kept: jax.Array | None = None,
        keep: tuple[int, ...] = (),
    ) -> Any:
        """Runs embedded tokens through the blocks (`gen.nn.layers.StackOutput`, with their keys and values).

        Args:
          x, mask: see `Block`.
          c: the second thing that `condition` gives.
          past: keys and values (depth, B, M, H, D).
          kept: (B, depth, 2) factors on the branches.
          keep: blocks whose outputs are returned.
        """
        extra = {"past": past, "kept": None if kept is None else kept.swapaxes(0, 1)}
        return run_stack(
            self.blocks,
            x,
            lambda block, x, extra: block(constrain(x), c, mask, extra["past"], extra["kept"]),
            per_layer=extra,
            remat=self.config.remat,
            scan=self.config.scan,
            keep=keep,
        )

    def logits(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """Gives logits (B, N, vocabulary) float32 of the last block's output and the class vectors (B, width)."""
        scale, shift = jnp.split(self.head_modulation(jax.nn.silu(c)), 2, axis=-1)
        return self.head(modulate(layer_norm(x, self.config.eps), shift, scale))

    def __call__(self, inputs: jax.Array, cond: Cond) -> jax.Array:
        """Gives logits (B, tokens, vocabulary) of every token given the coarser maps: teacher forcing.

        Args:
          inputs: (B, tokens after the first map, width of codes), of `Residual.inputs`.
          cond: "label" (B,) int32; "kept", see `run`, where branches are dropped.
        """
        return self.logits(self.before(inputs, cond), self.condition(cond["label"])[0])

    def before(self, inputs: jax.Array, cond: Cond) -> jax.Array:
        """Gives what the blocks say of each token (B, tokens, width) from the coarser maps.

        Raises GenError for inputs of other scales.
        """
        config = self.config
        expected = (config.shape[0] - config.groups[0], config.quantizer.width)
        if inputs.shape[1:] != expected:
            raise GenError(f"inputs are {inputs.shape}; the scales {config.scales} take (B, *{expected})")
        c, given = self.condition(cond["label"])
        x = jnp.concatenate([self.first(c), self.later(inputs, config.groups[0])], axis=1)
        found: jax.Array = self.run(x, given, mask=self.mask(), kept=cond.get("kept")).x
        return found

    def mask(self) -> jax.Array:
        """Tells where each token may look, (tokens, tokens) bool: at its own map and at the coarser ones."""
        scale = _scale_of(self.config.groups)
        return jnp.asarray(scale[:, None] >= scale)

    def null(self, cond: Cond) -> Cond:
        """Gives the conditions of guidance's other half: the null class."""
        return {**cond, "label": jnp.full_like(cond["label"], self.config.num_classes)}


@functools.cache
def _scale_of(groups: tuple[int, ...]) -> np.ndarray:
    """(tokens,) the number of each token's scale."""
    return np.repeat(np.arange(len(groups)), groups)


def _init(width: int) -> Callable[..., jax.Array]:
    """Normal numbers of variance 1 / (3 width)."""
    return nnx.initializers.normal(math.sqrt(1.0 / (3.0 * width)))


def _scaled(init: Callable[..., jax.Array], gains: Any) -> Callable[..., jax.Array]:
    """Gives weights of `init` times `gains`, one for all or one for each output."""
    return lambda *given: init(*given) * jnp.asarray(gains, jnp.float32)


def _unit(x: jax.Array) -> jax.Array:
    """x divided by its norm over the last axis, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
