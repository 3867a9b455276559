"""DiffFit: biases, norms, the label table and new scale factors are trained, and all matrices stay (Xie et al. 2023,
arXiv 2304.06648); without scale factors it is BitFit (Zaken et al. 2022).

A scale factor gamma multiplies the output of a dense layer, channel by channel:

    y = gamma (x W + b),   gamma = 1 at the start,

and is merged as W diag(gamma) and gamma b. On the last layers of the two branches of a transformer block this is the
paper's x + gamma_1 attention(x), x + gamma_2 mlp(x): a gate of adaptive layer norm multiplies the same vector.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.arrays import flatten
from gen.errors import GenError
from gen.finetune.adapters import Adapter, fitting, layers
from gen.nn.network import param_shapes

__all__ = ["BRANCHES", "EVERY_LAYER", "DiffFit"]

BRANCHES = ("*attn/proj", "*mlp/fc2|*mlp/w3")  # the last layers of a block's branches
EVERY_LAYER = ("*attn/qkv", "*attn/proj", "*mlp/fc1|*mlp/w12", "*mlp/fc2|*mlp/w3")


@dataclasses.dataclass(frozen=True)
class DiffFit(Adapter):
    """Trains parameters as they are, and scale factors on the outputs of layers.

    Attributes:
      train: by default every bias, the parameters of norms, and the label table.
      scales: patterns over paths of dense layers whose outputs get factors: `BRANCHES`, or `EVERY_LAYER`, as the
        unofficial code does; () for none.
      blocks: factors are in the first so many of the stacked blocks; None for all.

    Raises GenError for scales in fewer blocks than one.
    """

    train: tuple[str, ...] = ("*/bias|*norm*|label/*",)
    scales: tuple[str, ...] = BRANCHES
    blocks: int | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None and self.blocks < 1:
            raise GenError(f"DiffFit in the first {self.blocks} blocks; give at least 1, or no scales")

    def extra(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Gives the shapes of the factors, those of the layers' biases, cut to the first blocks.

        Raises GenError for more blocks than the network has.
        """
        shapes = param_shapes(config)
        flat = flatten(shapes)
        found = {}
        for layer in fitting(self.scales, layers(shapes), "layer"):
            *stack, width = flat[f"{layer}/bias"].shape
            if stack and self.blocks is not None:
                if self.blocks > stack[0]:
                    raise GenError(f"DiffFit in the first {self.blocks} blocks; the network has {stack[0]}; give fewer")
                stack = [self.blocks]
            found[f"{layer}/gamma"] = (*stack, width)
        return found

    def begin(self, key: jax.Array, config: Any) -> dict[str, jax.Array]:
        """Gives factors of 1."""
        del key
        return {path: jnp.ones(shape) for path, shape in self.extra(config).items()}

    def change(self, params: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Multiplies kernels and biases by the factors of their layers."""
        changed = dict(params)
        for path, gamma in own.items():
            layer = path.removesuffix("/gamma")
            kernel, bias = changed[f"{layer}/kernel"], changed[f"{layer}/bias"]
            if gamma.ndim == 2 and len(gamma) < len(bias):
                gamma = jnp.concatenate([gamma, jnp.ones((len(bias) - len(gamma), gamma.shape[-1]))])
            stacked = gamma.shape[:-1]
            inner = (1,) * (kernel.ndim - gamma.ndim)
            changed[f"{layer}/kernel"] = kernel * gamma.reshape(*stacked, *inner, gamma.shape[-1])
            changed[f"{layer}/bias"] = bias * gamma
        return changed
