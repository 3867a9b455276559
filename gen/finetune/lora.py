"""LoRA: matrices changed by products of low rank (Hu et al. 2021, arXiv 2106.09685)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.arrays import flatten
from gen.errors import GenError
from gen.finetune.adapters import Adapter, fitting, layers
from gen.nn.network import param_shapes

__all__ = ["LoRA"]


@dataclasses.dataclass(frozen=True)
class LoRA(Adapter):
    """W + (alpha / rank) A B of chosen dense layers, with A (in, rank) random and B (rank, out) zero at the start.

    Attributes:
      train: by default the label table, which new classes need.
      layers: patterns over paths of dense layers.
      rank: of the products.
      alpha: factor on them, over the rank.

    Raises GenError for a rank below 1, and no layers.
    """

    train: tuple[str, ...] = ("label/*",)
    layers: tuple[str, ...] = ("*attn/qkv", "*attn/proj")
    rank: int = 8
    alpha: float = 8.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.layers:
            raise GenError(f"LoRA of rank {self.rank} on {len(self.layers)} layers; expected at least 1 of each")

    def extra(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Gives the shapes of A and B, with the blocks in front where layers are stacked.

        Raises GenError for a layer that is no matrix, and for a rank that its matrix has not.
        """
        shapes = param_shapes(config)
        flat = flatten(shapes)
        found = {}
        for layer in fitting(self.layers, layers(shapes), "layer"):
            stacked = flat[f"{layer}/bias"].shape[:-1]
            kernel = flat[f"{layer}/kernel"].shape
            if len(kernel) != len(stacked) + 2:
                raise GenError(f"LoRA changes matrices, and {layer} is {kernel}; leave it out")
            if self.rank > min(kernel[-2:]):
                raise GenError(f"LoRA of rank {self.rank} on {layer}, a matrix {kernel[-2:]}; give a lower rank")
            found[f"{layer}/down"] = (*stacked, kernel[-2], self.rank)
            found[f"{layer}/up"] = (*stacked, self.rank, kernel[-1])
        return found

    def begin(self, key: jax.Array, config: Any) -> dict[str, jax.Array]:
        """Gives A uniform in +-1 / sqrt(in) (He's bound with the official code's a = sqrt 5), and B = 0."""
        shapes = self.extra(config)
        keys = jax.random.split(key, len(shapes))
        return {
            path: jax.random.uniform(k, shape, minval=-1.0, maxval=1.0) / math.sqrt(shape[-2])
            if path.endswith("/down")
            else jnp.zeros(shape)
            for k, (path, shape) in zip(keys, shapes.items(), strict=True)
        }

    def change(self, params: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Adds the products to the kernels."""
        changed = dict(params)
        for path in own:
            if path.endswith("/down"):
                layer = path.removesuffix("/down")
                product = own[path] @ own[f"{layer}/up"]
                changed[f"{layer}/kernel"] = changed[f"{layer}/kernel"] + (self.alpha / self.rank) * product
        return changed
