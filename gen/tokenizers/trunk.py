"""The transformer trunk that the ViT tokenizers share (ViTok, l-DeTok, RAE's decoder): blocks and a last norm."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.errors import GenError
from gen.nn.layers import Remat, StackOutput, run_stack, stack
from gen.nn.vit import FeedForward, ViTBlock, normed
from gen.training.sharding import constrain

__all__ = ["Tower", "Trunk", "grid_of"]


@dataclasses.dataclass(frozen=True)
class Tower:
    """The size of one trunk: its width, number of blocks and attention heads.

    Raises GenError for heads that do not divide the width.
    """

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise GenError(f"width {self.width} is not a multiple of its {self.heads} heads; change one")


def grid_of(size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Patches along each axis. Raises GenError where a side is no multiple of its patch."""
    if len(size) != len(patch) or any(n % p for n, p in zip(size, patch, strict=True)):
        sizes, patches = ("x".join(map(str, sides)) for sides in (size, patch))
        raise GenError(f"{sizes} pixels do not divide into patches of {patches}; choose sides that divide")
    return tuple(n // p for n, p in zip(size, patch, strict=True))


class Trunk(nnx.Module):
    """`Tower.depth` blocks of `gen.nn.vit.ViTBlock`, then a norm of the same kind, in float32.

    Args of the constructor: see `ViTBlock`; `remat` and `scan` as in `gen.nn.layers.run_stack`.
    """

    def __init__(
        self,
        tower: Tower,
        hidden: int,
        *,
        feedforward: FeedForward = "mlp",
        norm: Literal["layer", "rms"] = "layer",
        eps: float = 1e-6,
        qkv_bias: bool = True,
        dtype: str = "float32",
        remat: Remat = "none",
        scan: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        self.remat, self.scan = remat, scan

        def block(rngs: nnx.Rngs) -> ViTBlock:
            return ViTBlock(
                tower.width,
                tower.heads,
                hidden,
                feedforward=feedforward,
                norm=norm,
                eps=eps,
                qkv_bias=qkv_bias,
                dtype=jnp.dtype(dtype),
                rngs=rngs,
            )

        self.blocks = stack(block, tower.depth, rngs)
        self.norm = normed(norm, tower.width, eps, rngs)

    def run(
        self,
        x: jax.Array,
        rotate: Callable[[jax.Array], jax.Array] | None = None,
        *,
        mask: jax.Array | None = None,
        keep: tuple[int, ...] = (),
    ) -> StackOutput:
        """Gives the blocks without the last norm; `keep` as in `gen.nn.layers.run_stack`."""

        def call(block: ViTBlock, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return constrain(block(x, rotate, mask)), None

        return run_stack(self.blocks, constrain(x), call, remat=self.remat, scan=self.scan, keep=keep)

    def __call__(
        self,
        x: jax.Array,
        rotate: Callable[[jax.Array], jax.Array] | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """x (B, N, width) -> the same, normed; `rotate` and `mask` as in `gen.nn.attention.Attention`."""
        out: jax.Array = self.norm(self.run(x, rotate, mask=mask).x)
        return out
