"""What is evaluated: images by sample index, as a pure function that runs inside the jitted evaluation step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.data.sources import array_identity
from gen.errors import GenError
from gen.training.indexed import sample_keys

__all__ = ["QUANTISERS", "Source", "balanced_labels", "from_arrays", "generated"]

# float images in [-1, 1] -> integers 0..255, still float32
QUANTISERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "round": lambda x: jnp.floor(jnp.clip(127.5 * x + 128, 0, 255)),  # DiT, EDM, LightningDiT: rounds to nearest
    "truncate": lambda x: jnp.floor(jnp.clip(127.5 * (x + 1), 0, 255)),  # ADM: darker by half a level on average
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Images by index.

    Attributes:
      function: ``(arguments, indices (B,) int32) -> {"image": (B, H, W, C), "label": (B,) int32 where there is one}``;
        pure. Images are float in [-1, 1], or uint8. Sample i depends on indices[i] alone.
      arguments: tree of arrays passed to `function` (parameters, stored images): never baked into the program.
      count: how many samples there are; indices run over 0..count - 1.
      identity: what tells these samples from any others: goes into results, references and resumable state.
      quantiser: a name in `QUANTISERS` for float images; for uint8 ones how they came about, "given" when unknown.
      labels: the rule behind the labels; "none" without.
      seeds: the seeds of generated samples as text.
    """

    function: Callable[[Any, jax.Array], Mapping[str, jax.Array]]
    arguments: Any
    count: int
    identity: str
    quantiser: str = "round"
    labels: str = "none"
    seeds: str = ""


def balanced_labels(count: int, classes: int) -> np.ndarray:
    """Label i = i mod classes, (count,) int32: equal numbers per class at any multiple of `classes`."""
    return (np.arange(count) % classes).astype(np.int32)


def from_arrays(
    images: np.ndarray, labels: np.ndarray | None = None, *, quantiser: str = "given", rule: str = "given"
) -> Source:
    """A source of stored images.

    Args:
      images: (N, H, W, C) uint8, or float in [-1, 1] to be quantised by `quantiser`.
      labels: (N,) integers, or None.
      quantiser: see `Source`.
      rule: the rule behind the labels.

    Raises:
      GenError: no images, another shape or dtype, labels that do not match.
    """
    if images.ndim != 4 or len(images) == 0:
        raise GenError(f"images of shape {images.shape}; expected (N, H, W, C) with N > 0; check the file")
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise GenError(f"images of type {images.dtype}; expected uint8, or float in [-1, 1]; convert them")
    if images.dtype.kind == "f" and quantiser not in QUANTISERS:
        raise GenError(f"float images need a quantiser, got '{quantiser}'; expected one of {', '.join(QUANTISERS)}")
    arrays = {"image": images}
    if labels is not None:
        if np.shape(labels) != (len(images),) or np.asarray(labels).dtype.kind not in "iu":
            raise GenError(
                f"labels of shape {np.shape(labels)}, type {np.asarray(labels).dtype} for {len(images)} images; "
                "expected one integer per image"
            )
        arrays["label"] = np.asarray(labels, np.int32)
    return Source(
        function=_rows,
        arguments=arrays,
        count=len(images),
        identity=f"arrays {array_identity(arrays)}",
        quantiser=quantiser,
        labels="none" if labels is None else rule,
    )


def generated(
    sample: Callable[[Any, jax.Array, Mapping[str, jax.Array]], jax.Array],
    params: Any,
    *,
    seeds: range,
    identity: str,
    labels: np.ndarray | None = None,
    rule: str = "given",
    quantiser: str = "round",
) -> Source:
    """A source that draws its images: any generator.

    Args:
      sample: ``(params, keys (B,), cond) -> images (B, H, W, C)`` float in [-1, 1].
      params: its parameters.
      seeds: one seed per sample; sample i has the key ``sample_keys(0, seeds[i])``, as ``gen sample --seeds`` gives it.
      identity: of generator and weights.
      labels: (N,) integers, given to `sample` as ``cond["label"]``; None for an unconditional generator.
      rule: the rule behind the labels.
      quantiser: a name in `QUANTISERS`.

    Raises:
      GenError: unknown quantiser, no seeds, labels that do not match.
    """
    if quantiser not in QUANTISERS:
        raise GenError(f"unknown quantiser '{quantiser}'; expected one of {', '.join(QUANTISERS)}")
    if not seeds or (labels is not None and labels.shape != (len(seeds),)):
        raise GenError(
            f"{len(seeds)} seeds with {0 if labels is None else labels.size} labels; expected at least one seed, and a "
            "label for each; make the two agree"
        )

    named = f"{seeds.start}-{seeds[-1]}" + ("" if seeds.step == 1 else f" by {seeds.step}")
    return Source(
        function=_Draw(sample),
        arguments={"params": params, "seeds": np.asarray(seeds, np.int32)}
        | ({} if labels is None else {"label": np.asarray(labels, np.int32)}),
        count=len(seeds),
        identity=identity if labels is None else f"{identity} labels {array_identity({'label': np.asarray(labels)})}",
        quantiser=quantiser,
        labels="none" if labels is None else rule,
        seeds=named,
    )


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Equal for equal generators, so that one compiled program serves every set of seeds and weights."""

    sample: Any

    def __call__(self, arguments: Mapping[str, Any], indices: jax.Array) -> dict[str, jax.Array]:
        cond = {"label": arguments["label"][indices]} if "label" in arguments else {}
        image = self.sample(arguments["params"], sample_keys(0, arguments["seeds"][indices]), cond)
        return {"image": image, **cond}


def _rows(arguments: Mapping[str, jax.Array], indices: jax.Array) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array)[indices] for name, array in arguments.items()}
