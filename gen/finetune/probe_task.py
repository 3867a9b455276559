"""Training a head on a frozen denoiser's features, with fresh noise for every image and epoch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gen.diffusion.denoiser import Denoiser
from gen.errors import GenError
from gen.finetune.probes import AttentionHead, LinearHead, noisy_features
from gen.nn.conditions import Conditions, label
from gen.nn.network import Network, Params, param_shapes
from gen.training.method import Method, given
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = ["ProbeTask", "attention_head", "feature_shapes", "unlabelled"]


def unlabelled(denoiser: Denoiser, params: Params, count: int) -> dict[str, jax.Array]:
    """Gives a condition of `count` samples that shows the network no label: its null one, or none.

    Raises GenError for a class-conditional network without a null label.
    """
    if "label" not in denoiser.network.conditions:
        return {}
    found: dict[str, jax.Array] = denoiser.net.apply(params, {"label": jnp.zeros(count, jnp.int32)}, method="null")
    return found


def feature_shapes(denoiser: Denoiser, taps: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Gives the shape (*places, C) of each feature; allocates nothing. Raises GenError for a name that is none."""
    params = param_shapes(denoiser.network)
    x = jax.ShapeDtypeStruct((1, *denoiser.network.shape), jnp.float32)
    found = jax.eval_shape(
        lambda p, x: noisy_features(denoiser, p, x, 0.5, x, unlabelled(denoiser, p, 1), taps), params, x
    )
    return {name: leaf.shape[1:] for name, leaf in found.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeTask(Method):
    """Trains ``head`` to classify what the frozen ``teacher`` sees of noisy images.

    Batches hold labelled data as the teacher takes them.

    Attributes:
      teacher: the teacher's Denoiser.
      head: a `LinearHead` of one feature at one time, or an `AttentionHead` of `taps` at `times`.
      taps: names of the features.
      times: of the noise, on the teacher's clock.

    Raises GenError for no feature or time, and a head of other ones.
    """

    teacher: Denoiser = given("teacher")
    head: Any
    taps: tuple[str, ...]
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.taps or not self.times:
            raise GenError("a probe of no feature or at no time; name at least one of each")
        single = isinstance(self.head, LinearHead)
        if single and (len(self.taps), len(self.times)) != (1, 1):
            raise GenError(f"a linear head takes one feature at one time, not {self.taps} at {self.times}")
        if not single and (tuple(name for name, _ in self.head.blocks), self.head.levels) != (
            self.taps,
            len(self.times),
        ):
            raise GenError(
                f"the head is of other features or levels than {self.taps} at {self.times}; make it of these"
            )

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the head as the only part."""
        return (Part("head", self.head, self.optim, self.emas),)

    def models(self) -> Mapping[str, Model]:
        """Gives the head."""
        return {"head": Model(self.head)}

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the shape of the teacher's data."""
        shape: tuple[int, ...] = self.teacher.network.shape
        return shape

    @property
    def conditions(self) -> Conditions:
        """Gives the label, which the head learns and the teacher does not see."""
        return label(self.head.classes)

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives a fresh head, or that of the previous stage. Raises GenError for a missing frozen teacher."""
        if "teacher" not in frozen:
            raise GenError(f"a probe needs the frozen role 'teacher'; got {', '.join(frozen) or 'none'}")
        return {"head": Network(self.head).init(key) if previous is None else previous.params["head"]}

    def features(self, teacher: Params, x: jax.Array, eps: jax.Array) -> dict[str, jax.Array]:
        """Gives the features of x (B, *shape) as the head takes them; `eps` (levels, B, *shape)."""
        cond = unlabelled(self.teacher, teacher, len(x))
        seen: dict[str, jax.Array] = {}
        for level, t in enumerate(self.times):
            found = noisy_features(self.teacher, teacher, x, t, eps[level], cond, self.taps)
            seen |= {f"{level}/{name}": feature for name, feature in found.items()}
        return seen

    def loss(self, params: Params, features: Mapping[str, jax.Array], labels: jax.Array) -> tuple[jax.Array, Aux]:
        """Gives the mean cross-entropy, with the accuracy."""
        logits = Network(self.head)(params, features)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), Aux({"accuracy": (logits.argmax(-1) == labels).mean()})

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step on fresh noise."""
        x = self.data(batch)
        eps = jax.random.normal(key, (len(self.times), *x.shape))
        data = (self.features(frozen["teacher"], x, eps), batch["label"])
        state, metrics, _ = self.parts[0].update(state, lambda p, d: self.loss(p, *d), data, schedule)
        return state, metrics


def attention_head(denoiser: Denoiser, taps: tuple[str, ...], levels: int, classes: int, **settings: Any) -> Any:
    """Gives an `AttentionHead` of a denoiser's features."""
    return AttentionHead(tuple(feature_shapes(denoiser, taps).items()), levels, classes, **settings)
