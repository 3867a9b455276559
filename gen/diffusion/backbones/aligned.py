"""Any backbone with projectors on one of its features, to be aligned with a frozen encoder (Yu et al. 2025, REPA).

The projectors are trained with `gen.diffusion.objectives.Aligned` and are not used in sampling.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.diffusion.backbones.backbone import Output
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.layers import linear
from gen.nn.network import Cond

__all__ = ["AlignedConfig", "AlignedNetwork"]


@dataclasses.dataclass(frozen=True)
class AlignedConfig:
    """A backbone and its projectors.

    Attributes:
      network: the config of a backbone whose taps are (B, N, network.width).
      tap: the aligned feature: REPA takes the 8th block of L and XL (``block_7``), the 4th of B.
      widths: channels of each encoder's features; DINOv2 ViT-B/14 has 768.
      hidden: hidden size of the projectors.
    """

    network: Any
    tap: str = "block_7"
    widths: tuple[int, ...] = (768,)
    hidden: int = 2048

    def __post_init__(self) -> None:
        if not self.widths:
            raise GenError("no encoder to align with; give the widths of their features, or leave the projectors out")

    @property
    def size(self) -> Any:
        """The backbone's."""
        return self.network.size

    @property
    def channels(self) -> int:
        """The backbone's."""
        return int(self.network.channels)

    @property
    def num_classes(self) -> int:
        """The backbone's."""
        return int(self.network.num_classes)

    @property
    def times(self) -> int:
        """The backbone's."""
        return int(self.network.times)

    @property
    def null_class(self) -> bool:
        """The backbone's."""
        return bool(self.network.null_class)

    @property
    def dropout(self) -> float:
        """The backbone's."""
        return float(self.network.dropout)

    @property
    def shape(self) -> tuple[int, ...]:
        """The backbone's."""
        shape: tuple[int, ...] = self.network.shape
        return shape

    @property
    def conditions(self) -> Conditions:
        """The backbone's."""
        conditions: Conditions = self.network.conditions
        return conditions

    def build(self, rngs: nnx.Rngs) -> "AlignedNetwork":
        """The module with freshly drawn parameters."""
        return AlignedNetwork(self, rngs)


class Projector(nnx.Module):
    """Linear -> SiLU -> Linear -> SiLU -> Linear, token by token."""

    def __init__(self, width: int, hidden: int, out: int, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(width, hidden, rngs=rngs)
        self.fc2 = linear(hidden, hidden, rngs=rngs)
        self.fc3 = linear(hidden, out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc3(jax.nn.silu(self.fc2(jax.nn.silu(self.fc1(x)))))


class AlignedNetwork(nnx.Module):
    """The network of an `AlignedConfig`: the backbone's, with further taps ``aligned_0`` ... (B, N, widths[i])."""

    def __init__(self, config: AlignedConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.network = config.network.build(rngs)
        for i, width in enumerate(config.widths):
            setattr(self, f"projector_{i}", Projector(config.network.width, config.hidden, width, rngs))

    def null(self, cond: Cond) -> Cond:
        """The backbone's null condition."""
        null: Cond = self.network.null(cond)
        return null

    def __call__(
        self, x: jax.Array, times: tuple[jax.Array, ...], cond: Cond, *, taps: tuple[str, ...] = (), **options: Any
    ) -> Output:
        """See `Backbone`; taps ``aligned_i`` are the projections of the backbone's feature `tap`, float32."""
        names = {f"aligned_{i}": f"projector_{i}" for i in range(len(self.config.widths))}
        wanted = [tap for tap in taps if tap in names]
        inner = tuple(tap for tap in taps if tap not in names)
        inner += (self.config.tap,) if wanted and self.config.tap not in inner else ()
        out, features = self.network(x, times, cond, taps=inner, **options)
        projected = {tap: getattr(self, names[tap])(features[self.config.tap]).astype(jnp.float32) for tap in wanted}
        return out, {tap: features[tap] for tap in taps if tap in features} | projected
