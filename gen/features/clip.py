"""CLIP's image and text towers (Radford et al. 2021)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.arrays import flatten
from gen.config import suggest
from gen.errors import GenError
from gen.features.resize import middle_square, middle_square_host, resize, resize_host
from gen.features.weights import ConvertedWeights, network_of
from gen.nn.attention import Attention
from gen.nn.layers import linear, patchify, run_stack, stack
from gen.nn.network import Network, Params, param_shapes

__all__ = ["CLIP", "MODES", "CLIPConfig", "CLIPExtractor", "CLIPTowerConfig", "model_name"]

# of the range [0, 1]
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
# how an extractor is asked for -> the model
MODES = {
    "cmmd": "vit-l-14-336",
    **{name: name for name in ("vit-b-32", "vit-b-16", "vit-l-14", "vit-l-14-336")},
}


@dataclasses.dataclass(frozen=True)
class CLIPTowerConfig:
    """A transformer: its width, number of blocks, attention heads, and inner width of the MLPs.

    Raises GenError for a width that the heads do not divide.
    """

    width: int
    depth: int
    heads: int
    hidden: int

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise GenError(f"width {self.width} cannot be shared by {self.heads} heads; choose a divisor of it")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Architecture; the defaults are ViT-L/14.

    Attributes:
      vision, text: the towers.
      size, patch: side of the images and of a patch, in pixels.
      vocabulary, length: number of tokens, and the longest text.
      projection: width of the common space.
      activation: of the MLPs; OpenAI's models have "quick_gelu", x sigmoid(1.702 x), later ones the exact "gelu".
      end_token: whose first position a text is read at; 2 stands for the largest token of each text, as in OpenAI's
        published configurations.
      eps: of the layer norms.

    Raises GenError for a size that is no multiple of the patch.
    """

    vision: CLIPTowerConfig = CLIPTowerConfig(1024, 24, 16, 4096)
    text: CLIPTowerConfig = CLIPTowerConfig(768, 12, 12, 3072)
    size: int = 224
    patch: int = 14
    vocabulary: int = 49408
    length: int = 77
    projection: int = 768
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    end_token: int = 2
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.size % self.patch or self.size < self.patch:
            raise GenError(f"size {self.size} is not a multiple of patch {self.patch}; choose one that is")

    def build(self, rngs: nnx.Rngs) -> "CLIP":
        """Builds both towers with fresh weights."""
        return CLIP(self, rngs)


def _norm(width: int, eps: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, rngs=rngs)


class _Block(nnx.Module):
    """x + attention(norm1 x), then x + MLP(norm2 x)."""

    def __init__(self, tower: CLIPTowerConfig, config: CLIPConfig, rngs: nnx.Rngs) -> None:
        self.quick = config.activation == "quick_gelu"
        self.norm1, self.norm2 = (_norm(tower.width, config.eps, rngs) for _ in range(2))
        self.attn = Attention(tower.width, tower.heads, rngs=rngs)
        self.fc1 = linear(tower.width, tower.hidden, rngs=rngs)
        self.fc2 = linear(tower.hidden, tower.width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = x + self.attn(self.norm1(x), mask=mask)
        y = self.fc1(self.norm2(x))
        y = y * jax.nn.sigmoid(1.702 * y) if self.quick else jax.nn.gelu(y, approximate=False)
        return x + self.fc2(y)


class _Vision(nnx.Module):
    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs) -> None:
        width, normal = config.vision.width, nnx.initializers.normal(0.02)
        self.patch = linear(3 * config.patch**2, width, bias=False, rngs=rngs)
        self.cls = nnx.Param(normal(rngs.params(), (width,)))
        self.positions = nnx.Param(normal(rngs.params(), (1 + (config.size // config.patch) ** 2, width)))
        self.before, self.after = (_norm(width, config.eps, rngs) for _ in range(2))
        self.blocks = stack(lambda r: _Block(config.vision, config, r), config.vision.depth, rngs)


class _Text(nnx.Module):
    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs) -> None:
        width, normal = config.text.width, nnx.initializers.normal(0.02)
        self.tokens = nnx.Param(normal(rngs.params(), (config.vocabulary, width)))
        self.positions = nnx.Param(normal(rngs.params(), (config.length, width)))
        self.after = _norm(width, config.eps, rngs)
        self.blocks = stack(lambda r: _Block(config.text, config, r), config.text.depth, rngs)


class CLIP(nnx.Module):
    """Images and texts in one space: `encode_image`, `encode_text`, `similarity`."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.vision, self.text = _Vision(config, rngs), _Text(config, rngs)
        self.project_image = linear(config.vision.width, config.projection, bias=False, rngs=rngs)
        self.project_text = linear(config.text.width, config.projection, bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(2.6592))

    def encode_image(self, images: jax.Array, keep: tuple[int, ...] = ()) -> dict[str, jax.Array]:
        """Encodes images (B, size, size, 3) float32, with CLIP's mean and deviation removed.

        Args:
          keep: blocks whose output is returned as "block_0" ..., not normed.

        Returns:
          "embedding" (B, projection), not normalised; "pooled" (B, width), before the projection; "embedded"
          (B, N, width), what the first block takes.

        Raises GenError for images of another shape.
        """
        size, tower = self.config.size, self.vision
        if images.shape[1:] != (size, size, 3):
            raise GenError(f"this CLIP takes images of shape (B, {size}, {size}, 3), got {images.shape}")
        x = tower.patch(patchify(images, self.config.patch))
        x = jnp.concatenate([jnp.broadcast_to(tower.cls[...], (len(x), 1, x.shape[-1])), x], 1)
        embedded = tower.before(x + tower.positions[...])
        x, _, kept = run_stack(tower.blocks, embedded, lambda block, x, _: (block(x, None), None), keep=keep)
        pooled = tower.after(x[:, 0])
        blocks = {f"block_{i}": kept[i] for i in keep}
        return blocks | {"embedding": self.project_image(pooled), "pooled": pooled, "embedded": embedded}

    def encode_text(
        self, tokens: jax.Array, mask: jax.Array | None = None, keep: tuple[int, ...] = ()
    ) -> dict[str, jax.Array]:
        """Encodes tokens (B, N) int32, each text with its end token.

        Args:
          mask: (B, N) bool, False where a text is padded; without it nothing is masked but the future.
          keep: as in `encode_image`.

        Returns:
          "embedding", "pooled" and "embedded" as in `encode_image`; "last" (B, N, width), all positions normed.

        Raises GenError for texts longer than `length`.
        """
        tower, length = self.text, tokens.shape[1]
        if length > self.config.length:
            raise GenError(f"this CLIP reads {self.config.length} tokens, got {length}; cut the text")
        visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if mask is not None:
            visible = visible & mask[:, None, None, :]
        embedded = jnp.asarray(tower.tokens[...])[tokens] + tower.positions[:length]
        x, _, kept = run_stack(tower.blocks, embedded, lambda block, x, _: (block(x, visible), None), keep=keep)
        last = tower.after(x)
        ends = tokens if self.config.end_token == 2 else tokens == self.config.end_token
        pooled = last[jnp.arange(len(last)), ends.argmax(1)]
        blocks = {f"block_{i}": kept[i] for i in keep}
        found = {"embedding": self.project_text(pooled), "pooled": pooled, "embedded": embedded, "last": last}
        return blocks | found

    def similarity(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """Gives the logits (images, texts) of embeddings: their cosine times the learned scale."""
        images, texts = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
        return jnp.exp(self.logit_scale[...]) * images @ texts.T


def model_name(config: CLIPConfig) -> str:
    """Gives the published name of a size, such as vit-l-14-336; for sizes that were not published one of the same
    kind.
    """
    letter = {768: "b", 1024: "l"}.get(config.vision.width, f"w{config.vision.width}")
    return f"vit-{letter}-{config.patch}" + ("" if config.size == 224 else f"-{config.size}")


@dataclasses.dataclass(frozen=True)
class CLIPExtractor(ConvertedWeights):
    """CLIP's embeddings of images, for CMMD, CLIP-FID and the CLIP score.

    Attributes:
      mode: cmmd is the embedding of Jayasumana et al. 2024 (section 4): ViT-L/14 at 336 pixels, images stretched to
        that square by torch's bicubic filter without antialiasing, embeddings of length 1. The names of models are
        those models with CLIP's own preprocessing: the shorter side resized by Pillow's bicubic filter to 8-bit
        values, the middle square cut out, embeddings as they come.
      weights: a file made by ``gen convert clip``; the model's in the per-user cache by default.

    Raises GenError for a model that is not known.
    """

    modes: ClassVar[tuple[str, ...]] = tuple(MODES)

    mode: str = "cmmd"
    weights: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise GenError(f"unknown CLIP '{self.mode}'; {suggest(self.mode, MODES)}")

    @property
    def name(self) -> str:
        """Gives the short name for protocols and tables."""
        return f"clip-{MODES[self.mode]}"

    @property
    def resize(self) -> str:
        """Does what `Extractor.resize` says."""
        return "torch-bicubic stretched" if self.mode == "cmmd" else "pil-bicubic shorter side, centre crop"

    @property
    def hint(self) -> str:
        """Does what `ConvertedWeights.hint` says."""
        return f"get the {MODES[self.mode]} model of openai/CLIP (or its CLIPModel file) and run gen convert clip FILE"

    @property
    def network(self) -> CLIPConfig:
        """Gives the architecture of the weights, both towers. Raises GenError when there are none."""
        return network_of(self.path, CLIPConfig, self.hint)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Does what `ConvertedWeights.shapes` says."""
        return {name: value.shape for name, value in flatten(param_shapes(self.network)).items()}

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Gives one image (H, W, 3) of any size resized on the host to (size, size, 3) float32, which a call takes as
        is.
        """
        side = self.network.size
        if self.mode == "cmmd":
            return resize_host(image, (side, side), "torch-bicubic")
        return middle_square_host(image, side, side, "pil-bicubic")

    def prepared(self, images: jax.Array) -> jax.Array:
        """Maps images (B, H, W, 3) on the 0..255 grid -> (B, size, size, 3) with CLIP's mean and deviation removed."""
        side = self.network.size
        if self.mode == "cmmd":
            x = resize(images, (side, side), "torch-bicubic")
        else:
            x = middle_square(images, side, side, "pil-bicubic")
        return (x / 255 - jnp.asarray(_MEAN)) / jnp.asarray(_DEVIATION)

    def __call__(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Maps images (B, H, W, 3) float32 on the 0..255 grid -> "features" (B, projection) float32."""
        with jax.default_matmul_precision("highest"):
            found = Network(self.network).apply(params, self.prepared(images), method="encode_image")["embedding"]
        unit = self.mode == "cmmd"
        return {"features": found / jnp.linalg.norm(found, axis=-1, keepdims=True) if unit else found}

    def texts(self, tokens: np.ndarray, batch: int = 256) -> np.ndarray:
        """Gives embeddings (N, projection) float32 of length 1 of texts: tokens (N, T) integer, each with its end
        token.

        Raises GenError for tokens that this CLIP does not know, or more than it reads.
        """
        network = self.network
        if tokens.ndim != 2 or not len(tokens) or tokens.dtype.kind not in "iu":
            raise GenError(
                f"tokens {tokens.dtype} {tokens.shape}; expected (N, T) integers, padded behind the end token"
            )
        if tokens.min() < 0 or tokens.max() >= network.vocabulary:
            raise GenError(
                f"tokens from {tokens.min()} to {tokens.max()}; this CLIP has {network.vocabulary}: use its vocabulary"
            )
        params, call = self.load(), _text_program(network)
        rows = [np.minimum(np.arange(i, i + batch), len(tokens) - 1) for i in range(0, len(tokens), batch)]
        return np.concatenate([np.asarray(call(params, tokens[r])) for r in rows])[: len(tokens)]


@functools.lru_cache(maxsize=2)
def _text_program(network: CLIPConfig) -> "jax.stages.Wrapped":
    def call(params: Params, tokens: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            found = Network(network).apply(params, tokens, method="encode_text")["embedding"]
        return found / jnp.linalg.norm(found, axis=-1, keepdims=True)

    return jax.jit(call)
