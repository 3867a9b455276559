"""What evaluation asks of a frozen network that looks at images."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax

from gen.nn.network import Params

__all__ = ["Extractor", "accepts", "in_parts"]


class Extractor(Protocol):
    """A frozen dataclass (the config); the weights are loaded at the edge and passed in.

    One that resizes images of any size itself may also have a method ``fit(image (H, W, C) uint8) -> float32``: the
    same resize of one image, on the host, for sets in which every image has its own size.
    """

    modes: ClassVar[tuple[str, ...]]  # values of its field ``mode``, for ``NAME:MODE``; () without such a field

    @property
    def name(self) -> str:
        """Gives the short name for protocols and tables."""
        ...

    @property
    def image(self) -> tuple[int | None, int | None, int]:
        """Gives (H, W, C) of the images it takes; None where any number will do (it resizes them itself).

        Where C is 3, evaluation repeats the channel of grey images.
        """
        ...

    @property
    def resize(self) -> str:
        """Tells how images reach the network's size, for protocols; "none" when they have it."""
        ...

    @property
    def precision(self) -> str:
        """Gives the arithmetic, for protocols: "float32-highest" for scores that are reported."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """Gives names of what a call returns."""
        ...

    @property
    def classes(self) -> int:
        """Tells how many classes there are logits of; 0 without. Label k is class k only in sets of just as many
        classes.
        """
        ...

    def load(self) -> Params:
        """Gives the weights; raises GenError when the file is missing or not the one `fingerprint` names."""
        ...

    def fingerprint(self) -> str:
        """Gives the identity of the weights, as it stands in every protocol."""
        ...

    def __call__(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Maps images (B, H, W, C) float32 on the 0..255 grid -> float32 arrays by name, those of `outputs`.

        "features" (B, D) always; "logits" (B, K) of a classifier whose class k is label k; "spatial" (B, S) features
        of a feature map for sFID; "unbiased_logits" (B, K) for the Inception Score.
        """
        ...


def accepts(extractor: Extractor, shape: tuple[int, ...]) -> bool:
    """Tells whether images of `shape` (H, W, C) may be given to an extractor."""
    height, width, channels = extractor.image
    fits = len(shape) == 3 and all(w in (None, n) for w, n in zip((height, width), shape[:2], strict=True))
    return fits and (shape[2] == channels or (shape[2], channels) == (1, 3))


def in_parts(function: Callable[[Params, jax.Array], Any], params: Params, images: jax.Array, size: int) -> Any:
    """``function(params, images)``, on CPUs for at most `size` images of each device's at a time.

    A CPU's caches hold the maps of a few images only, so parts are faster there, and memory no longer grows with the
    batch; accelerators get the whole batch. The parts are equal: the largest divisor up to `size` of a device's share.

    Args:
      function: ``(params, images (B, ...)) -> tree of arrays (B, ...)``; row i depends on image i alone.
      images: (B, H, W, C), split over the mesh that is set, if any.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    split = math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp"))
    if len(images) % split:
        return function(params, images)
    share = len(images) // split
    part = max(n for n in range(1, size + 1) if share % n == 0)

    def parts(params: Params, images: jax.Array) -> Any:
        rows = images.reshape(split, share // part, part, *images.shape[1:]).swapaxes(0, 1)
        found = jax.lax.map(lambda x: function(params, x.reshape(split * part, *x.shape[2:])), rows)
        ordered = jax.tree.map(lambda a: a.reshape(share // part, split, part, *a.shape[2:]).swapaxes(0, 1), found)
        return jax.tree.map(lambda a: a.reshape(len(images), *a.shape[3:]), ordered)

    return jax.lax.platform_dependent(params, images, cpu=parts, default=function)
