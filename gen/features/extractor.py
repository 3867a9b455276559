"""What evaluation asks of a frozen network that looks at images."""

from typing import Protocol

import jax

from gen.nn.network import Params

__all__ = ["Extractor"]


class Extractor(Protocol):
    """A frozen dataclass (the config); the weights are loaded at the edge and passed in."""

    @property
    def name(self) -> str:
        """Short name for protocols and tables."""
        ...

    @property
    def image(self) -> tuple[int, int, int]:
        """(H, W, C) of the images it takes."""
        ...

    def load(self) -> Params:
        """The weights; raises GenError when the file is missing or not the one `fingerprint` names."""
        ...

    def fingerprint(self) -> str:
        """Identity of the weights, as it stands in every protocol."""
        ...

    def __call__(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """images (B, H, W, C) float32 on the 0..255 grid -> "features" (B, D) and "logits" (B, K), float32."""
        ...
