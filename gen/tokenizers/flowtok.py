"""FlowTok: text as the source of a flow to images (He et al. 2025, arXiv 2503.10772).

A caption's CLIP features are projected to a Gaussian over as many latent tokens as an image has; a flow without any
noise of its own leads from them to the image's latents. `TextProjectorConfig` is the projector, `FlowTokConfig` the
projector with its velocity network, and the functions are the losses of their joint training. The velocity network is a
plain `gen.diffusion.backbones.dit.DiT` over the tokens, whose only label says that the text means nothing: class 0 is
guided, the null class is not.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.diffusion.backbones.dit import DiT, DiTConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.objectives import Draws, VelocityMatching
from gen.diffusion.process import Linear
from gen.diffusion.times import TimeSampler
from gen.errors import GenError
from gen.nn.attention import Attention
from gen.nn.conditions import Condition, Conditions
from gen.nn.layers import linear, run_stack, stack
from gen.nn.network import Params
from gen.tokenizers.base import Gaussian

__all__ = [
    "FlowTokConfig",
    "TextProjector",
    "TextProjectorConfig",
    "contrastive",
    "flat_kl",
    "flow_loss",
    "paired",
    "velocity_denoiser",
]

SIGMA_MIN = 1e-5


@dataclasses.dataclass(frozen=True)
class TextProjectorConfig:
    """The encoder of captions; the defaults are the released one for CLIP ViT-L/14.

    Attributes:
      text: (length, width) of the caption's features.
      channels: channels per latent token.
      depth, heads, hidden: blocks, their attention heads, and the inner width of their feed-forward layers.
      aligned: inner width of the MLP whose output the latents are aligned with.

    Raises GenError for heads that do not divide the width of the text.
    """

    text: tuple[int, int] = (77, 768)
    channels: int = 16
    depth: int = 6
    heads: int = 8
    hidden: int = 1024
    aligned: int = 512

    def __post_init__(self) -> None:
        if self.text[1] % self.heads:
            raise GenError(f"text width {self.text[1]} is not a multiple of its {self.heads} heads; change one")

    def build(self, rngs: nnx.Rngs) -> "TextProjector":
        """Gives the module with freshly drawn parameters."""
        return TextProjector(self, rngs)


class _Norm(nnx.Module):
    """(x - mean) / (deviation + 1e-5) times a gain plus a bias, with the unbiased deviation; float32."""

    def __init__(self, width: int) -> None:
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        deviation = x.std(-1, keepdims=True, ddof=1)
        return self.scale[...] * (x - x.mean(-1, keepdims=True)) / (deviation + 1e-5) + self.bias[...]


class _Block(nnx.Module):
    """y = norm1(x + attention(x)); norm2(y + fc2(relu(fc1(y)))): the norms come last."""

    def __init__(self, config: TextProjectorConfig, rngs: nnx.Rngs) -> None:
        width = config.text[1]
        self.attn = Attention(width, config.heads, rngs=rngs)
        self.fc1 = linear(width, config.hidden, rngs=rngs)
        self.fc2 = linear(config.hidden, width, rngs=rngs)
        self.norm1, self.norm2 = _Norm(width), _Norm(width)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.fc2(jax.nn.relu(self.fc1(x))))


class TextProjector(nnx.Module):
    """Captions to latents, and to what these are aligned with."""

    def __init__(self, config: TextProjectorConfig, rngs: nnx.Rngs) -> None:
        width, inner = config.text[1], config.aligned
        self.config = config
        self.blocks = stack(lambda r: _Block(config, r), config.depth, rngs)
        self.out = linear(width, 2 * config.channels, rngs=rngs)
        self.align1 = linear(width, inner, rngs=rngs)
        self.align2 = linear(inner, inner, rngs=rngs)
        self.align3 = linear(inner, config.channels, rngs=rngs)
        self.log_scale = nnx.Param(jnp.asarray(math.log(1 / 0.07)))

    def __call__(self, text: jax.Array, keep: tuple[int, ...] = ()) -> tuple[Gaussian, dict[int, jax.Array]]:
        """Features (B, *text) -> a Gaussian over latents (B, length, channels), and the outputs of blocks in `keep`.

        Raises GenError for features of another shape.
        """
        if text.shape[1:] != self.config.text:
            raise GenError(f"text features are {text.shape}; this projector takes (B, *{self.config.text})")
        x, _, kept = run_stack(self.blocks, text, lambda block, x, _: (block(x), None), keep=keep)
        return Gaussian(*jnp.split(self.out(x), 2, axis=-1)), kept

    def target(self, text: jax.Array) -> jax.Array:
        """Says what the latents are aligned with: (B, length, channels), token by token."""
        x = jax.nn.silu(self.align1(text))
        out: jax.Array = self.align3(jax.nn.silu(self.align2(x)))
        return out


@dataclasses.dataclass(frozen=True)
class FlowTokConfig:
    """The projector and the velocity network, which are trained together. The defaults are the released XL.

    Attributes:
      text: the projector.
      velocity: the network of the flow, over as many tokens and channels as the projector makes.

    Raises GenError for a flow over other latents than the projector makes, or without its one class.
    """

    text: TextProjectorConfig = TextProjectorConfig()
    velocity: DiTConfig = DiTConfig((77,), 16, 1, 1152, 28, 16, num_classes=1)

    def __post_init__(self) -> None:
        if self.velocity.shape != (self.text.text[0], self.text.channels) or self.velocity.num_classes != 1:
            raise GenError(
                f"the flow leads from text latents {(self.text.text[0], self.text.channels)} to {self.velocity.shape}; "
                "give both the same tokens and channels, and the network one class"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the shape (tokens, channels) of one image's latents, which is that of a caption's."""
        return self.velocity.shape

    @property
    def conditions(self) -> Conditions:
        """Gives the features of a caption, all positions, padding too."""
        return {"text": Condition(self.text.text)}

    @property
    def network(self) -> "FlowTokConfig":
        """Gives the configuration of both networks, which is this."""
        return self

    def build(self, rngs: nnx.Rngs) -> "FlowTok":
        """Gives the module with freshly drawn parameters."""
        return FlowTok(self, rngs)


class FlowTok(nnx.Module):
    """The two networks of a `FlowTokConfig`, under "text" and "velocity"."""

    def __init__(self, config: FlowTokConfig, rngs: nnx.Rngs) -> None:
        self.text = TextProjector(config.text, rngs)
        self.velocity = DiT(config.velocity, rngs)


def velocity_denoiser(network: DiTConfig) -> Denoiser:
    """Gives the velocity network on our clock: FlowTok's runs from text (0) to images (1), unscaled."""
    objective = VelocityMatching(TimeSampler("logit-normal"))
    return Denoiser(network, Linear(SIGMA_MIN), Predict("velocity", clock="reversed", sign=-1), objective)


def paired(images: jax.Array, null: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives the images that samples flow to, and which of them say nothing of their text.

    Samples marked `null` (B,) exchange their image latents (B, ...) in a ring: each takes that of the next marked one,
    so that its text carries no information and the network learns what guidance starts from. One alone stays as it is,
    and is not null.
    """
    null = null.astype(bool)
    count, rows = null.sum(), jnp.arange(len(null))
    ring = jnp.argsort(~null, stable=True)  # the marked rows first, in order
    following = ring[(jnp.cumsum(null) % jnp.maximum(count, 1))]
    null = null & (count > 1)
    return images[jnp.where(null, following, rows)], null


def flat_kl(posterior: Gaussian) -> jax.Array:
    """-1/2 sum(1 + logvar - (0.3 mean)^6 - exp(logvar)) of each sample: (B,).

    The penalty on the mean has a flat bottom. The release sums over the batch as well, so its weight is ours times
    the batch of one device.
    """
    value = -0.5 * (1.0 + posterior.logvar - (0.3 * posterior.mean) ** 6 - jnp.exp(posterior.logvar))
    return value.reshape(len(value), -1).sum(-1)


def contrastive(latents: jax.Array, target: jax.Array, log_scale: jax.Array, group: int | None = None) -> jax.Array:
    """Symmetric cross-entropy of whole captions against each other, (): each knows its own target within its group.

    Args:
      latents, target: (B, tokens, channels); compared as one vector each, by their cosine times exp(log_scale).
      group: rows that are compared with each other, the batch of one device in the release; the whole batch by default.
        More rows make it a harder task, hence another loss.

    Raises GenError where groups do not fill the batch.
    """
    size = len(latents) if group is None else group
    if size < 1 or len(latents) % size:
        raise GenError(f"a batch of {len(latents)} does not divide into groups of {size}; choose a divisor")

    def directions(x: jax.Array) -> jax.Array:
        x = x.reshape(len(x) // size, size, -1)
        return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))

    logits = jnp.exp(log_scale) * jnp.einsum("gic,gjc->gij", directions(latents), directions(target))
    own = jnp.diagonal(logits, axis1=1, axis2=2)
    forth, back = (jax.nn.logsumexp(logits, axis) - own for axis in (2, 1))
    return 0.5 * (forth + back).mean()


def flow_loss(
    network: DiTConfig, params: Params, text: jax.Array, images: jax.Array, t: jax.Array, null: jax.Array
) -> jax.Array:
    """mean (v_hat - v)^2 of each sample (B,), from text latents to image latents, both (B, tokens, channels).

    Args:
      t: (B,) times on our clock: 1 is text, 0 the image.
      null: (B,) bool, from `paired`, as are the images.
    """
    denoiser = velocity_denoiser(network)

    def evaluate(x: jax.Array, t: jax.Array, cond: Any) -> Any:
        return denoiser(params, x, t, cond)

    cond = {"label": null.astype(jnp.int32)}
    losses, _ = denoiser.objective.loss(evaluate, denoiser.process, images, cond, Draws(t, text))
    return losses
