"""The one call shape of the backbones, and the checks of a call."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import suggest
from gen.errors import GenError
from gen.nn.conditions import Conditions, label
from gen.nn.network import Cond

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Call",
    "Factors",
    "Output",
    "UNetBackbone",
    "UNetConfig",
    "WrappedConfig",
    "branch_factors",
    "scaled",
]

Output = tuple[jax.Array, dict[str, jax.Array]]
Factors = tuple[jax.Array, ...] | None  # one for each residual branch of a block; None for all ones


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of a call, checked; see `Backbone`."""

    x: jax.Array
    times: tuple[jax.Array, ...]
    cond: Cond
    controls: Mapping[str, jax.Array]
    taps: tuple[str, ...]
    stop: bool


class BackboneConfig:
    """What the configuration of every backbone shows, so that no caller needs to know which one it is.

    Attributes:
      size: sides of one input.
      channels: of one input.
      num_classes: number of labels, 0 for an unconditional network.
      times: number of times in a call: 1, or 2 for flow maps.
      null_class: whether the network has an unconditional input to train and to guide with.
      dropout: share of activations that training drops; where it is positive the condition "dropout" brings the keys.
    """

    size: Any
    channels: int
    num_classes: int = 0
    times: Any = 1
    null_class: bool = True
    dropout: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the shape of one input, channels last."""
        return (*self.size, self.channels)

    @property
    def classes_at(self) -> str:
        """Gives the path of the setting that says how many classes there are."""
        return "num_classes"

    @property
    def conditions(self) -> Conditions:
        """Gives what the network is conditioned on beside its times."""
        return label(self.num_classes)


class WrappedConfig:
    """What a configuration around another backbone's shows of it, as `BackboneConfig` has it.

    Attributes:
      network: the backbone's configuration.
    """

    network: Any

    @property
    def size(self) -> Any:
        """Gives the backbone's size."""
        return self.network.size

    @property
    def channels(self) -> int:
        """Gives the backbone's channels."""
        return int(self.network.channels)

    @property
    def num_classes(self) -> int:
        """Gives the backbone's number of classes."""
        return int(self.network.num_classes)

    @property
    def null_class(self) -> bool:
        """Tells whether the backbone has an unconditional input."""
        return bool(self.network.null_class)

    @property
    def dropout(self) -> float:
        """Gives the backbone's dropout."""
        return float(self.network.dropout)

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the backbone's shape."""
        shape: tuple[int, ...] = self.network.shape
        return shape

    @property
    def classes_at(self) -> str:
        """Gives the path of the backbone's number of classes."""
        return f"network.{self.network.classes_at}"


class UNetConfig(BackboneConfig):
    """The same for networks of square inputs, whose `size` is one number."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the shape (size, size, channels) of one input."""
        return (self.size, self.size, self.channels)


class Backbone(nnx.Module):
    """A network that a denoiser evaluates: called with a noisy input, its times and conditions.

    Its configuration has ``channels``, ``num_classes`` and ``times`` (1, or 2 for flow maps). A subclass computes in
    `forward` and says what it knows: `shape`, `features`, `controls`.
    """

    title: str  # what messages call it
    config: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the shape of one input, channels last."""
        shape: tuple[int, ...] = self.config.shape
        return shape

    @abc.abstractmethod
    def features(self) -> list[str]:
        """Gives names of the features that can be tapped, in the order in which they are computed."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises GenError for the shape of one input that the network cannot take; by default any but `shape`."""
        if shape != self.shape:
            raise GenError(f"{self.title} input is {shape}; expected {self.shape}, the network's size and channels")

    def controls(self) -> dict[str, tuple[int, ...]]:
        """Gives shapes of the arrays that change the network while it runs, by name; all ones leave it as it is."""
        return {}

    @abc.abstractmethod
    def forward(self, call: Call) -> Output:
        """Gives what a checked call gives."""

    def null(self, cond: Cond) -> Cond:
        """Gives the same condition with the null label num_classes; GenError where the network knows none.

        Raises GenError for a network without a condition, or without a null class.
        """
        if not self.config.num_classes:
            raise GenError(f"this {self.title} is unconditional; sample with guidance 1 and train with dropout 0")
        if not self.config.null_class:
            raise GenError(
                f"this {self.title} has no null class; train it with null_class=True or sample with guidance 1"
            )
        return {**cond, "label": jnp.full_like(cond["label"], self.config.num_classes)}

    def __call__(
        self,
        x: jax.Array,
        times: tuple[jax.Array, ...],
        cond: Cond,
        *,
        controls: Mapping[str, jax.Array] | None = None,
        taps: tuple[str, ...] = (),
        stop: bool = False,
    ) -> Output:
        """Gives the raw output and the features named by `taps`.

        Args:
          x: (B, *`shape`), or of another size that `check` lets pass.
          times: one (B,) array on the network's own clock, or two.
          cond: ``label`` (B,) int32 in [0, num_classes], where num_classes is the null label; and what else the network
            takes.
          controls: arrays of the network's `controls`; searching over them does not recompile.
          taps: names among the network's `features`.
          stop: end at the last tap; the output is then that tap.

        Returns:
          (B, ..., channels, twice as many with learned variance) float32, and the features by name.

        Raises:
          GenError: an input, times, controls or taps that do not fit the network.
        """
        controls, known, names = controls or {}, self.controls(), self.features()
        self.check(x.shape[1:])
        if len(times) != self.config.times:
            raise GenError(f"{self.title} was given {len(times)} times; expected {self.config.times}")
        for name, value in controls.items():
            if name not in known:
                advice = suggest(name, known) if known else "remove it"
                raise GenError(f"{self.title} knows no control '{name}'; {advice}")
            if value.shape != known[name]:
                raise GenError(f"{self.title}'s control {name} has shape {value.shape}; expected {known[name]}")
        for tap in taps:
            if tap not in names:
                raise GenError(f"{self.title} has no feature '{tap}'; {suggest(tap, names)}")
        return self.forward(Call(x, times, cond, controls, taps, stop))


def branch_factors(controls: Mapping[str, jax.Array], branches: tuple[str, ...], depth: int) -> Factors:
    """Gives factors on the residual branches of each block, one (depth,) array for each of `branches`; None for all
    ones.

    The controls ``blocks`` (depth,) scales all branches of a block, so that 0 leaves the identity; the name of a branch
    (depth,) scales that branch alone.
    """
    if not {"blocks", *branches} & set(controls):
        return None
    ones = jnp.ones((depth,))
    return tuple(controls.get("blocks", ones) * controls.get(branch, ones) for branch in branches)


def scaled(gates: tuple[jax.Array, ...], factors: Factors) -> tuple[jax.Array, ...]:
    """Multiplies the gates of a block's residual branches by their scalar factors."""
    return gates if factors is None else tuple(gate * factor for gate, factor in zip(gates, factors, strict=True))


class UNetBackbone(Backbone):
    """A backbone of square images of ``size`` that halves them between the levels of ``widths``.

    It takes any image that can be halved as often, square or not; attention stays at the levels that have it.
    """

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises GenError for an input of other channels, or one that cannot be halved so often."""
        step, channels = 2 ** (len(self.config.widths) - 1), self.config.channels
        if len(shape) != 3 or shape[0] % step or shape[1] % step or shape[2] != channels:
            raise GenError(
                f"{self.title} input is {shape}; expected sides divisible by {step}, and {channels} channels"
            )
