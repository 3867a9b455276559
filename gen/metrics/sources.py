"""What is evaluated: images by sample index, made inside the jitted evaluation step or read on the host for it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.arrays import digest
from gen.data.stores import ArrayStore, Store
from gen.data.vanished import ahead
from gen.errors import GenError
from gen.features.extractor import Extractor
from gen.training.indexed import sample_keys

__all__ = ["LABEL_RULES", "QUANTISERS", "ImageSet", "balanced_labels", "from_arrays", "from_store", "generated"]

# float images in [-1, 1] -> integers 0..255, still float32
QUANTISERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "round": lambda x: jnp.floor(jnp.clip(127.5 * x + 128, 0, 255)),  # DiT, EDM, LightningDiT: rounds to nearest
    "truncate": lambda x: jnp.floor(jnp.clip(127.5 * (x + 1), 0, 255)),  # ADM: darker by half a level on average
}


_LABELS_SEED = 1  # of random labels; the images' noise has seed 0


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images by index.

    Attributes:
      function: ``(arguments, indices (B,) int32) -> {"image": (B, H, W, C), "label": (B,) int32 where there is one}``;
        pure. Images are float in [-1, 1], or uint8; float32 on the 0..255 grid under the name "levels" when they were
        resized for the extractor already. Sample i depends on indices[i] alone.
      arguments: tree of arrays passed to `function` (parameters ...): never baked into the program.
      count: how many samples there are; indices run over 0..count - 1.
      identity: what tells these samples from any others: goes into results, references and resumable state.
      quantiser: a name in `QUANTISERS` for float images; for uint8 ones how they came about, "given" when unknown.
      labels: the rule behind the labels; "none" without.
      classes: how many classes the labels are of; 0 without.
      seeds: the seeds of generated samples as text.
      read: for stored images: ``indices (n,) -> rows by name`` on the host, one batch at a time, so that memory does
        not grow with `count`; `function` then gets those rows in place of `arguments`, or beside them, as
        "arguments", where there are any.
      beside: what some measures look at beside samples and reference, by name: its identity and the thing itself; see
        `gen.metrics.beside`.
    """

    function: Callable[[Any, jax.Array], Mapping[str, jax.Array]]
    arguments: Any
    count: int
    identity: str
    quantiser: str = "round"
    labels: str = "none"
    classes: int = 0
    seeds: str = ""
    read: Callable[[np.ndarray], Mapping[str, np.ndarray]] | None = None
    beside: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)

    def named(self) -> str:
        """Gives what is beside, by name and identity, as it stands in protocols."""
        return ", ".join(f"{name} {identity}" for name, (identity, _) in sorted(self.beside.items()))


def _classes(labels: np.ndarray | None) -> int:
    return 0 if labels is None else int(np.max(labels)) + 1


def balanced_labels(count: int, classes: int) -> np.ndarray:
    """Label i = i mod classes, (count,) int32: equal numbers per class at any multiple of `classes`."""
    return (np.arange(count) % classes).astype(np.int32)


def _random_labels(seeds: range, classes: int) -> np.ndarray:
    keys = sample_keys(_LABELS_SEED, jnp.asarray(list(seeds), jnp.int32))
    return np.asarray(jax.vmap(lambda key: jax.random.randint(key, (), 0, classes))(keys), np.int32)


# how the label of a generated sample follows from its seed: (seeds, number of classes) -> (len(seeds),) int32
LABEL_RULES: dict[str, Callable[[range, int], np.ndarray]] = {
    "seed mod classes": lambda seeds, classes: (np.asarray(seeds) % classes).astype(np.int32),  # balanced
    "random": _random_labels,  # uniform, by the seed alone: DiT's and EDM's rule, with draws of our own
}


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    quantiser: str = "given",
    rule: str = "given",
    seeds: str = "",
    identity: str = "",
) -> ImageSet:
    """Gives a source of stored images; they may be memory-mapped, and only a batch of them is ever on the device.

    Args:
      images: (N, H, W, C) uint8, or float in [-1, 1] to be quantised by `quantiser`.
      labels: (N,) integers, or None.
      quantiser, seeds: see `ImageSet`.
      rule: the rule behind the labels.
      identity: of the images where it is known; found by reading them all otherwise.

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
    return ImageSet(
        function=_rows,
        arguments=(),
        count=len(images),
        identity=f"arrays {identity or digest(arrays)}",
        quantiser=quantiser,
        labels="none" if labels is None else rule,
        classes=_classes(labels),
        seeds=seeds,
        read=lambda indices: {name: array[indices] for name, array in arrays.items()},
    )


def from_store(
    store: Store,
    extractor: Extractor,
    *,
    quantiser: str = "given",
    rule: str = "given",
    seeds: str = "",
    one_size: bool = False,
) -> ImageSet:
    """Gives a source of image files, decoded a batch at a time by several threads.

    Images of any size are taken by an extractor that has a method ``fit`` (one image (H, W, C) uint8 -> float32 of the
    network's size, as its own resize makes it): each is resized by itself, on the host.

    Args:
      store: the files, with or without classes.
      extractor: the network they are for: decides the number of channels and the size.
      quantiser, seeds: see `ImageSet`.
      rule: the rule behind the labels.
      one_size: all images are known to have one size: they are resized on the device.

    Raises:
      GenError: (when read) a damaged image, or one of another size for an extractor without ``fit``; names the file.
    """
    known = {"quantiser": quantiser, "rule": rule, "seeds": seeds}
    if isinstance(store, ArrayStore):
        return from_arrays(store.images, store.label, identity=store.identity(), **known)
    fit = None if one_size else getattr(extractor, "fit", None)
    channels, wanted = extractor.image[2], list[tuple[int, ...]]()

    def load(index: int) -> np.ndarray:
        pixels = np.asarray(store.image(index, channels))
        pixels = pixels.reshape(*pixels.shape[:2], channels)
        return pixels if fit is None else np.asarray(fit(pixels), np.float32)

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        rows, where = np.unique(indices, return_inverse=True)  # padding repeats an index
        images = [done.result() for _, done in ahead(load, rows.tolist(), store.title)]
        wanted[:] = wanted or [images[0].shape]
        for index, image in zip(rows.tolist(), images, strict=True):
            if fit is None and image.shape != wanted[0]:
                raise GenError(
                    f"{store.title(index)} is {image.shape}, others are {wanted[0]}; expected one size for the "
                    f"{extractor.name} extractor; resize them (gen data convert)"
                )
        labels = {} if store.label is None else {"label": store.label[indices]}
        return {"image" if fit is None else "levels": np.stack(images)[where]} | labels

    return ImageSet(
        function=_rows,
        arguments=(),
        count=len(store),
        identity=f"files {store.identity()}",
        quantiser=quantiser,
        labels="none" if store.label is None else rule,
        classes=_classes(store.label),
        seeds=seeds,
        read=read,
    )


def generated(
    sample: Callable[[Any, jax.Array, Mapping[str, jax.Array]], jax.Array],
    params: Any,
    *,
    seeds: range,
    identity: str,
    labels: np.ndarray | None = None,
    classes: int | None = None,
    cond: Mapping[str, np.ndarray] | None = None,
    rule: str = "given",
    quantiser: str = "round",
) -> ImageSet:
    """Gives a source that draws its images: any generator.

    Args:
      sample: ``(params, keys (B,), cond) -> images (B, H, W, C)`` float in [-1, 1].
      params: its parameters.
      seeds: one seed per sample; sample i has the key ``sample_keys(0, seeds[i])``, as ``gen sample --seeds`` gives it.
      identity: of generator and weights.
      labels: (N,) integers, given to `sample` as ``cond["label"]``; None for an unconditional generator.
      classes: how many there are; as many as the labels name by default.
      cond: further conditions by name, (N, ...) each, with the masks of sequences.
      rule: the rule behind the labels.
      quantiser: a name in `QUANTISERS`.

    Raises:
      GenError: unknown quantiser, no seeds, labels or conditions that do not match.
    """
    given = dict(cond or {}) | ({} if labels is None else {"label": np.asarray(labels, np.int32)})
    if quantiser not in QUANTISERS:
        raise GenError(f"unknown quantiser '{quantiser}'; expected one of {', '.join(QUANTISERS)}")
    for name, array in given.items():
        if len(array) != len(seeds):
            raise GenError(f"{len(seeds)} seeds with {len(array)} values of '{name}'; expected one for each seed")
    if not seeds:
        raise GenError("no seeds; expected at least one seed")
    named = f"{seeds.start}-{seeds[-1]}" + ("" if seeds.step == 1 else f" by {seeds.step}")
    return ImageSet(
        function=_Draw(sample),
        arguments={"params": params, "seeds": np.asarray(seeds, np.int32), "cond": given},
        count=len(seeds),
        identity=f"{identity} cond {digest(given)}" if given else identity,
        quantiser=quantiser,
        labels="none" if labels is None else rule,
        classes=_classes(labels) if classes is None else classes,
        seeds=named,
    )


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Equal for equal generators, so that one compiled program serves every set of seeds and weights."""

    sample: Any

    def __call__(self, arguments: Mapping[str, Any], indices: jax.Array) -> dict[str, jax.Array]:
        cond = {name: array[indices] for name, array in arguments["cond"].items()}
        image = self.sample(arguments["params"], sample_keys(0, arguments["seeds"][indices]), cond)
        return {"image": image} | ({"label": cond["label"]} if "label" in cond else {})


def _rows(rows: Mapping[str, jax.Array], indices: jax.Array) -> Mapping[str, jax.Array]:
    return rows
