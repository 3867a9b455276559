"""MAR's diffusion head: a small MLP that is the distribution of one continuous token, given the transformer's z.

Li et al. 2024, "Autoregressive Image Generation without Vector Quantization", arXiv 2406.11838, section 3. As a network
it is an ordinary backbone over vectors, conditioned on ``z``; `token_denoiser` gives its process (a DDPM chain), what
it predicts (the noise, and a variance) and its loss.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.diffusion.backbones.backbone import Backbone, BackboneConfig, Call, Output
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.objectives import DDPMLoss, Draws
from gen.errors import GenError
from gen.nn.conditions import Condition, Conditions
from gen.nn.layers import TimeEmbedder, layer_norm, linear, run_stack, stack
from gen.nn.network import Params
from gen.nn.vit import normed

__all__ = ["HeadConfig", "TokenHead", "token_denoiser", "token_losses"]

_zeros = nnx.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class HeadConfig(BackboneConfig):
    """The head's network.

    Attributes:
      channels: of one token.
      z: width of what it is conditioned on.
      width, depth: of its residual blocks.
      dtype: compute type of the matrix products.
    """

    channels: int
    z: int
    width: int = 1024
    depth: int = 6
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the shape (channels,) of one token."""
        return (self.channels,)

    @property
    def conditions(self) -> Conditions:
        """Gives what the transformer says of the token, ``z``."""
        return {"z": Condition((self.z,))}

    def build(self, rngs: nnx.Rngs) -> "TokenHead":
        """Gives the module with freshly drawn parameters."""
        return TokenHead(self, rngs)


class _Residual(nnx.Module):
    """x + gate fc2(silu(fc1((1 + scale) norm(x) + shift))); the gate starts at zero."""

    def __init__(self, config: HeadConfig, rngs: nnx.Rngs) -> None:
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.norm = normed("layer", width, 1e-6, rngs)
        self.fc1, self.fc2 = (linear(width, width, dtype=dtype, rngs=rngs) for _ in range(2))
        self.ada = linear(width, 3 * width, init=_zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift, scale, gate = jnp.split(self.ada(c).astype(jnp.float32), 3, axis=-1)
        h = self.fc2(jax.nn.silu(self.fc1((1.0 + scale) * self.norm(x) + shift)))
        return x + gate * h.astype(jnp.float32)


class TokenHead(Backbone):
    """The network of a `HeadConfig`: tokens (N, channels), one time, ``z`` (N, D) -> noise and variance (N, 2C)."""

    title = "token head"

    def __init__(self, config: HeadConfig, rngs: nnx.Rngs) -> None:
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.config = config
        self.time = TimeEmbedder(width, rngs=rngs)
        self.condition = linear(config.z, width, dtype=dtype, rngs=rngs)
        self.enter = linear(config.channels, width, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda r: _Residual(config, r), config.depth, rngs)
        self.final_ada = linear(width, 2 * width, init=_zeros, dtype=dtype, rngs=rngs)
        self.final = linear(width, 2 * config.channels, init=_zeros, dtype=dtype, rngs=rngs)

    def features(self) -> list[str]:
        """Names nothing: no feature can be tapped."""
        return []

    def forward(self, call: Call) -> Output:
        """Does what `Backbone` says."""
        c = jax.nn.silu(self.time(call.times[0]) + self.condition(call.cond["z"]).astype(jnp.float32))
        x = self.enter(call.x).astype(jnp.float32)
        x = run_stack(self.blocks, x, lambda block, x, _: (block(x, c), None)).x
        shift, scale = jnp.split(self.final_ada(c).astype(jnp.float32), 2, axis=-1)
        return self.final((1.0 + scale) * layer_norm(x) + shift).astype(jnp.float32), {}


def token_denoiser(config: HeadConfig, process: DDPM) -> Denoiser:
    """Gives the head as a denoiser: noise prediction with a learned variance, trained on both (Nichol & Dhariwal)."""
    return Denoiser(config, process, Predict("eps", clock="index", learned_variance=True), DDPMLoss())


def token_losses(denoiser: Denoiser, params: Params, z: jax.Array, x: jax.Array, draws: Draws) -> jax.Array:
    """Gives the denoiser's loss of each token at each of its times, (B, M, L).

    Args:
      params: of the head.
      z: (B, L, D); x: (B, L, C) the true tokens.
      draws: times (B, M, L) and noise (B, M, L, C): every token is trained at M times.

    Raises GenError where the draws are not for these tokens.
    """
    if draws.t.shape != (len(x), draws.t.shape[1], x.shape[1]):
        raise GenError(f"times {draws.t.shape} for tokens {x.shape}; expected (B, M, L)")
    times = draws.t.shape[1]

    def rows(array: jax.Array, repeated: bool) -> jax.Array:
        """One row for each time of each token."""
        if repeated:
            array = jnp.broadcast_to(array[:, None], (len(array), times, *array.shape[1:]))
        return array.reshape(-1, *array.shape[3:])

    def evaluate(x_t: jax.Array, t: jax.Array, cond: Any) -> Any:
        return denoiser(params, x_t, t, cond)

    flat = Draws(rows(draws.t, False), rows(draws.eps, False))
    losses, _ = denoiser.objective.loss(evaluate, denoiser.process, rows(x, True), {"z": rows(z, True)}, flat)
    found: jax.Array = losses.reshape(draws.t.shape)
    return found
