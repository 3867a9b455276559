"""Any backbone with projectors on one of its features, to be aligned with a frozen encoder (Yu et al. 2025, REPA).

The projectors are trained with `gen.diffusion.objectives.Aligned` and are not used in sampling.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import suggest
from gen.diffusion.backbones.backbone import Backbone, Call, Output, WrappedConfig
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.layers import linear

__all__ = ["AlignedConfig", "AlignedNetwork", "Projector"]


@dataclasses.dataclass(frozen=True)
class AlignedConfig(WrappedConfig):
    """A backbone and its projectors.

    Attributes:
      network: the config of a backbone whose taps are (B, N, network.width).
      tap: the aligned feature: REPA takes the 8th block of L and XL (``block_7``), the 4th of B.
      widths: channels of each encoder's features; DINOv2 ViT-B/14 has 768.
      hidden: hidden size of the projectors.

    Raises GenError for no encoder to align with.
    """

    network: Any
    tap: str = "block_7"
    widths: tuple[int, ...] = (768,)
    hidden: int = 2048

    def __post_init__(self) -> None:
        if not self.widths:
            raise GenError("no encoder to align with; give the widths of their features, or leave the projectors out")

    @property
    def times(self) -> int:
        """Gives the backbone's times."""
        return int(self.network.times)

    @property
    def width(self) -> int:
        """Gives the backbone's width."""
        return int(self.network.width)

    @property
    def conditions(self) -> Conditions:
        """Gives the backbone's conditions."""
        conditions: Conditions = self.network.conditions
        return conditions

    def build(self, rngs: nnx.Rngs) -> "AlignedNetwork":
        """Gives the module with freshly drawn parameters."""
        return AlignedNetwork(self, rngs)


class Projector(nnx.Module):
    """Linear -> SiLU -> Linear -> SiLU -> Linear, token by token."""

    def __init__(self, width: int, hidden: int, out: int, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(width, hidden, rngs=rngs)
        self.fc2 = linear(hidden, hidden, rngs=rngs)
        self.fc3 = linear(hidden, out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc3(jax.nn.silu(self.fc2(jax.nn.silu(self.fc1(x)))))


class AlignedNetwork(Backbone):
    """The network of an `AlignedConfig`: the backbone's, with further features ``aligned_0`` ... (B, N, widths[i]).

    They are the projections of the backbone's feature `tap`, float32. Inputs, conditions and controls are those of the
    backbone.

    Raises GenError for a tap that the network does not have.
    """

    def __init__(self, config: AlignedConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.network = config.network.build(rngs)
        self.title = self.network.title
        known = self.network.features()
        if config.tap not in known:
            raise GenError(f"{self.title} has no feature '{config.tap}' to align; {suggest(config.tap, known)}")
        for i, width in enumerate(config.widths):
            setattr(self, f"projector_{i}", Projector(config.network.width, config.hidden, width, rngs))

    def check(self, shape: tuple[int, ...]) -> None:
        """Checks what the backbone checks."""
        self.network.check(shape)

    def controls(self) -> dict[str, tuple[int, ...]]:
        """Gives the backbone's controls."""
        controls: dict[str, tuple[int, ...]] = self.network.controls()
        return controls

    def features(self) -> list[str]:
        """Gives the backbone's features, with the projections after the feature that they project."""
        names: list[str] = self.network.features()
        end = names.index(self.config.tap) + 1
        return [*names[:end], *self._projectors(), *names[end:]]

    def forward(self, call: Call) -> Output:
        """Does what `Backbone.forward` says."""
        projectors = self._projectors()
        inner = dict.fromkeys(self.config.tap if tap in projectors else tap for tap in call.taps)
        out, features = self.network(
            call.x, call.times, call.cond, controls=call.controls, taps=tuple(inner), stop=call.stop
        )
        projected = {
            tap: getattr(self, projectors[tap])(features[self.config.tap]).astype(jnp.float32)
            for tap in call.taps
            if tap in projectors
        }
        if self.config.tap not in call.taps:
            features.pop(self.config.tap, None)
        features |= projected
        if call.stop and call.taps:
            out = features[max(call.taps, key=self.features().index)]
        return out, features

    def _projectors(self) -> dict[str, str]:
        """Feature -> the projector that makes it."""
        return {f"aligned_{i}": f"projector_{i}" for i in range(len(self.config.widths))}
