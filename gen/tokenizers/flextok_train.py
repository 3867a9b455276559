"""Training FlexTok: flow matching on the latents, given the first k tokens of the image (arXiv 2502.13967).

The authors published no training code. The loss follows from their sampler, noise and dropout modules; the alignment of
one block with DINOv2 features (REPA, arXiv 2410.06940) from their description.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.config import check_choices
from gen.diffusion.backbones.aligned import Projector
from gen.diffusion.denoiser import drop
from gen.diffusion.objectives import Draws, VelocityMatching, alignment
from gen.diffusion.prediction import Prediction
from gen.diffusion.times import TimeSampler
from gen.errors import GenError
from gen.features.alignment import patch_features
from gen.features.resize import resize
from gen.features.vit import ViTConfig
from gen.nn.conditions import Conditions
from gen.nn.network import Cond, Network, Params
from gen.sampling.noise import decode_keys
from gen.tokenizers.flextok import FlexTokConfig, Pixels
from gen.tokenizers.quantizers.base import usage
from gen.training.method import Method, signed
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = ["Alignment", "FlexTokDraws", "FlexTokTask", "KeepLaw"]


@dataclasses.dataclass(frozen=True)
class KeepLaw:
    """How many tokens each image keeps in training.

    Attributes:
      law: ``pow2`` draws a power of two, 1, 2, 4 ... N, each as often; ``uniform`` any number from 1 to N;
        ``uniform-pow2`` the same rounded up to a power of two.
    """

    law: Literal["pow2", "uniform", "uniform-pow2"] = "pow2"

    def __post_init__(self) -> None:
        check_choices(self)

    @staticmethod
    def powers(tokens: int) -> np.ndarray:
        """Gives the powers of two up to `tokens`, int32."""
        return 2 ** np.arange(int(math.log2(tokens)) + 1, dtype=np.int32)

    def kept(self, number: jax.Array, tokens: int) -> jax.Array:
        """Says what uniform numbers from 1 to `tokens` become under the laws that start from them."""
        if self.law == "uniform":
            return number
        powers = jnp.asarray(np.append(self.powers(tokens), tokens))
        return powers[jnp.searchsorted(powers, number)]

    def __call__(self, key: jax.Array, count: int, tokens: int) -> jax.Array:
        """(count,) int32 in [1, tokens], one for each image."""
        if self.law == "pow2":
            return jax.random.choice(key, jnp.asarray(self.powers(tokens)), (count,))
        return self.kept(jax.random.randint(key, (count,), 1, tokens + 1), tokens)


@dataclasses.dataclass(frozen=True)
class Alignment:
    """REPA: the patches of one of the decoder's blocks are trained to tell DINOv2's features of the clean image.

    Attributes:
      encoder: the frozen network, whose parameters are the frozen role "encoder". The paper's is ViT-L/14.
      block: whose output is projected; 1 is the second.
      tokens: patches per side at which the features are compared, those of 518 pixels in the paper; the decoder's are
        brought to as many by bilinear interpolation.
      weight: factor on -cos, the mean over patches.
    """

    encoder: ViTConfig
    block: int = 1
    tokens: int = 37
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Projected:
    """A FlexTok with a projector beside it, under the same paths."""

    tokenizer: FlexTokConfig
    width: int

    def build(self, rngs: nnx.Rngs) -> Any:
        module: Any = self.tokenizer.build(rngs)
        inner = self.tokenizer.decoder.width
        module.projector = Projector(inner, 4 * inner, self.width, rngs)
        return module


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlexTokDraws:
    """All randomness of a step, for the whole batch.

    Attributes:
      keep: (B,) int32 tokens that are kept.
      dropped: (B,) bool, images whose tokens are all left out, for guidance.
      keys: (B,) typed keys for the quantizer.
      flow: times and noise.
    """

    keep: jax.Array
    dropped: jax.Array
    keys: jax.Array
    flow: Draws


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexTokTask(Method):
    """Trains encoder and decoder of ``tokenizer``; its first stage, the frozen role "first", stays as it is.

    Batches: "image" (B, H, W, C) uint8.

    Attributes:
      tokenizer: the FlexTok.
      objective: the flow's loss; times by SD3's mode law with scale 0.25.
      keep: how many tokens are kept.
      dropout: share of images whose tokens are all replaced by the unconditional vector.
      alignment: with a foundation encoder; None for none.
      pictures: images shown in previews.

    Raises GenError for a dropout out of [0, 1), and an alignment with a block that the decoder has not.
    """

    tokenizer: FlexTokConfig
    objective: Any = VelocityMatching(TimeSampler("mode", scale=0.25))
    keep: KeepLaw = KeepLaw()
    dropout: float = 0.2
    alignment: Alignment | None = None
    pictures: int = 8

    takes: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise GenError(f"the dropout of all tokens is {self.dropout}; expected a share in [0, 1)")
        if self.alignment is not None and not 0 <= self.alignment.block < self.tokenizer.decoder.depth:
            raise GenError(
                f"the decoder has {self.tokenizer.decoder.depth} blocks, none of number {self.alignment.block}"
            )

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the tokenizer, with the projector of its alignment where there is one."""
        network, train = self.tokenizer, ("encoder/*", "decoder/*")
        if self.alignment is None:
            return (Part("tokenizer", network, self.optim, self.emas, train),)
        projected = _Projected(network, self.alignment.encoder.width)
        return (Part("tokenizer", projected, self.optim, self.emas, (*train, "projector/*")),)

    def models(self) -> Mapping[str, Model]:
        """Gives the tokenizer."""
        return {"tokenizer": Model(self.tokenizer)}

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of the images."""
        return self.tokenizer.spec.image

    @property
    def conditions(self) -> Conditions:
        """None: the number of tokens is drawn, not read."""
        return {}

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Fresh transformers around the given first stage, or the networks of the previous stage.

        Raises GenError where there is a first stage and it is not given.
        """
        if previous is not None:
            return {"tokenizer": previous.params["tokenizer"]}
        first = {} if isinstance(self.tokenizer.first, Pixels) else {"first": frozen.get("first")}
        if None in first.values():
            raise GenError("FlexTok works on the latents of a trained autoencoder; give its run as the tokenizer")
        return {"tokenizer": {**Network(self.parts[0].network).init(key), **first}}

    def aux(self) -> Mapping[str, Any]:
        """Room for the images that previews show."""
        return {"shown": jnp.zeros((self.pictures, *self.tokenizer.spec.image), jnp.uint8)}

    def draw(self, key: jax.Array, count: int) -> FlexTokDraws:
        """Gives the randomness of a step on `count` images."""
        keep, dropped, keys, flow = jax.random.split(key, 4)
        denoiser = self.tokenizer.flow
        return FlexTokDraws(
            self.keep(keep, count, self.tokenizer.tokens),
            jax.random.bernoulli(dropped, self.dropout, (count,)),
            jax.random.split(keys, count),
            self.objective.draw(flow, denoiser.process, jnp.zeros((count, *denoiser.network.shape))),
        )

    def loss(
        self, params: Params, images: jax.Array, draws: FlexTokDraws, encoder: Params | None = None
    ) -> tuple[jax.Array, Aux]:
        """Gives the loss () and its terms; `Aux.out` are the tokens (B, N).

        Args:
          images: (B, H, W, C) float in [-1, 1].
          encoder: parameters of the alignment's encoder.
        """
        tokenizer, flow = self.tokenizer, self.tokenizer.flow
        own = {name: tree for name, tree in params.items() if name != "projector"}
        latents = jax.lax.stop_gradient(tokenizer.latents(own, images))
        found = tokenizer.read(own, latents, draws.keys)
        codes = found.sample(draws.keys)
        cond = flow.net.apply(own["decoder"], codes, draws.keep, method="condition")
        cond = drop(flow.net, own["decoder"], cond, draws.dropped)
        taps: tuple[str, ...] = () if self.alignment is None else (f"block_{self.alignment.block}",)
        seen: list[Prediction] = []

        def evaluate(x_t: jax.Array, t: jax.Array, cond: Cond) -> Prediction:
            seen.append(flow(own["decoder"], x_t, t, cond, taps=taps))
            return seen[-1]

        losses, terms = self.objective.loss(evaluate, flow.process, latents, cond, draws.flow)
        if self.alignment is not None:
            aligned = self._aligned(params, seen[0].extra[taps[0]], images, encoder)
            losses, terms = losses + self.alignment.weight * aligned, {**terms, "alignment": aligned}
        return losses.mean(), Aux({name: value.mean() for name, value in terms.items()}, out=found.ids)

    def _aligned(self, params: Params, tokens: jax.Array, images: jax.Array, encoder: Any) -> jax.Array:
        """-cos of the projected patches among `tokens` (B, P + N, D) and the encoder's features, (B,)."""
        assert self.alignment is not None
        grid, side = self.tokenizer.grid, self.alignment.tokens
        patches = tokens[:, : grid[0] * grid[1]].reshape(len(tokens), *grid, -1)
        patches = resize(patches, (side, side), "torch-bilinear").reshape(len(tokens), side * side, -1)
        projected = Network(self.parts[0].network).module(params).projector(patches)
        features = patch_features(self.alignment.encoder, encoder, images, side)
        return alignment(projected, jax.lax.stop_gradient(features))

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """One step; the first images of the batch are kept for the preview."""
        images, encoder = self.data(batch), frozen.get("encoder")
        count = images.shape[0]
        shown = state.aux["shown"].at[:count].set(batch["image"][: self.pictures])
        state = dataclasses.replace(state, aux=state.aux | {"shown": shown})
        data = (images, self.draw(key, count))
        state, metrics, ids = self.parts[0].update(
            state, lambda p, d: self.loss(p, d[0], d[1], encoder), data, schedule
        )
        return state, metrics | dict(usage(ids, self.tokenizer.spec.vocabulary))

    def export(self, state: State) -> Mapping[str, Any]:
        """Gives the tokenizer without the projector."""
        whole = self.parts[0].averaged(state)
        return {"tokenizer": {name: tree for name, tree in whole.items() if name != "projector"}}

    def preview(self, state: State, frozen: Frozen, key: jax.Array, generator: Any) -> Mapping[str, jax.Array]:
        """Gives the newest images, and what one, about the square root of all, and all of their tokens decode to."""
        del frozen, generator
        params, images = self.export(state)["tokenizer"], signed(state.aux["shown"])
        tokens, count = self.tokenizer.tokens, len(images)
        numbers = sorted({1, math.isqrt(tokens), tokens})
        codes = self.tokenizer.encode(params, images).codes
        keep = jnp.repeat(jnp.asarray(numbers), count)
        keys = decode_keys(jnp.tile(jax.random.split(key, count), len(numbers)))
        decoded = self.tokenizer.decode(params, jnp.tile(codes, (len(numbers), 1, 1)), cond={"keep": keep}, keys=keys)
        parts = jnp.split(jnp.clip(decoded, -1.0, 1.0), len(numbers))
        return {"images": images} | {f"tokens_{n}": part for n, part in zip(numbers, parts, strict=True)}
