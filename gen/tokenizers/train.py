"""Training a tokenizer on what it gives back: pixels, frozen networks' distances, and what its latents cost.

`gen.tokenizers.adversarial` adds a discriminator.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gen.errors import GenError
from gen.nn.conditions import Conditions, empty_conditions
from gen.nn.mesh import gathered
from gen.nn.network import Cond, Network, Params
from gen.sampling.noise import decode_keys
from gen.tokenizers.losses import expect_frozen, penalties
from gen.tokenizers.quantizers.base import usage
from gen.training.method import Method, signed
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = ["Rows", "TokenizerMethod", "TokenizerTask"]

_ENCODE = 2**31 - 2  # the stream of encoders that draw, beside `gen.sampling.noise.decode_keys`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What one step learns from; every array has leading axis B.

    Attributes:
      images: (B, H, W, C) float32 in [-1, 1].
      keys: (B,) typed keys: all that encoder, posterior and decoder draw.
      cond: the tokenizer's conditions by name.
      draws: what a task's corruption drew.
    """

    images: jax.Array
    keys: jax.Array
    cond: Cond = dataclasses.field(default_factory=dict)
    draws: Any = None


@dataclasses.dataclass(frozen=True)
class TokenizerMethod(Method):
    """What all methods that train ``tokenizer`` share; a method adds its `loss`.

    Batches: "image" (B, H, W, C) uint8, and the tokenizer's conditions by name.

    Attributes:
      tokenizer: the tokenizer (a configuration such as `gen.tokenizers.kl_vae.KLVAEConfig`).
      kl: weight of the KL of a posterior to the standard normal, summed over one image's latents.
      quantizer: weights of a quantizer's losses by name; one that has no such loss ignores them.
      augment: (key, images) -> images on [-1, 1], such as `gen.data.augment.RandomAffine`, or None.
      augmented: fraction of the images that are augmented. Resampled images are smoother than real ones: a share of
        real ones keeps their sharpness.
      pictures: images shown in previews.
      train: patterns of the parameters that learn (`gen.training.part.Part`): ("decoder/*",) tunes a decoder on the
        latents of a fixed encoder, whose quantizer then keeps its statistics as well.

    Raises GenError for a negative weight, and a fraction out of [0, 1].
    """

    tokenizer: Any
    kl: float = 1e-6
    quantizer: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"commitment": 0.25, "codebook": 1.0, "entropy": 0.1}
    )
    augment: Any = None
    augmented: float = 1.0
    pictures: int = 8
    train: tuple[str, ...] = ("*",)

    takes: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        if self.kl < 0 or not 0 <= self.augmented <= 1:
            raise GenError(
                f"kl {self.kl}, augmented {self.augmented}; the weight is at least 0, the fraction in [0, 1]"
            )

    @abc.abstractmethod
    def loss(self, params: Params, rows: Rows, frozen: Frozen) -> tuple[jax.Array, Aux]:
        """Gives the whole loss () of a batch, with its parts."""

    @property
    def looks(self) -> tuple[Any, ...]:
        """Gives the terms of the loss that look through a frozen network, whose weights a run is given; here none."""
        return ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the tokenizer."""
        return (Part("tokenizer", self.tokenizer, self.optim, self.emas, self.train),)

    def models(self) -> Mapping[str, Model]:
        """Gives the tokenizer."""
        return {"tokenizer": Model(self.tokenizer)}

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of the images."""
        shape: tuple[int, ...] = self.tokenizer.spec.image
        return shape

    @property
    def conditions(self) -> Conditions:
        """Gives the tokenizer's own conditions."""
        conditions: Conditions = self.tokenizer.spec.conditions
        return conditions

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Fresh parameters, or those of the previous stage."""
        del frozen
        return {"tokenizer": Network(self.tokenizer).init(key) if previous is None else previous.params["tokenizer"]}

    def aux(self) -> Mapping[str, Any]:
        """Room for the images that previews show, with their conditions."""
        images = jnp.zeros((self.pictures, *self.tokenizer.spec.image), jnp.uint8)
        cond = empty_conditions(self.conditions, self.pictures)
        return {"shown": images, **{f"shown_{name}": jnp.asarray(value) for name, value in cond.items()}}

    def encode(self, params: Params, rows: Rows) -> tuple[Any, jax.Array]:
        """(posterior or quantised features, the latents or codes that are decoded)."""
        keys = jax.vmap(lambda key: jax.random.fold_in(key, _ENCODE))(rows.keys)
        encoded = self.tokenizer.encode(params, rows.images, cond=rows.cond, keys=keys)
        return encoded, encoded.sample(rows.keys)

    def decode(self, params: Params, latents: jax.Array, rows: Rows) -> jax.Array:
        """Images (B, H, W, C) of latents or codes."""
        decoded: jax.Array = self.tokenizer.decode(params, latents, cond=rows.cond, keys=decode_keys(rows.keys))
        return decoded

    def reconstruct(self, params: Params, rows: Rows) -> tuple[Any, jax.Array, jax.Array]:
        """Says what `encode` gives, and the images (B, H, W, C) of it."""
        encoded, latents = self.encode(params, rows)
        return encoded, latents, self.decode(params, latents, rows)

    def latent_loss(self, encoded: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Says what a posterior or quantised features cost: the loss () and its parts; the use of the ids."""
        loss = penalties(encoded.losses, {**self.quantizer, "kl": self.kl})
        metrics = {name: value.mean() for name, value in encoded.losses.items()}
        spec = self.tokenizer.spec
        if spec.kind == "continuous":
            return loss, metrics
        used = usage(encoded.ids, spec.vocabulary)
        return loss, metrics | {f"codebook_{name}": value for name, value in used.items()}

    def drawn(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Rows]:
        """Gives the rows of a batch; its first images are kept for the preview."""
        augment_key, choose_key, sample_key = jax.random.split(key, 3)
        images, cond = self.data(batch), self.cond(batch)
        count = images.shape[0]
        if self.augment is not None:
            chosen = jax.random.bernoulli(choose_key, self.augmented, (count, 1, 1, 1))
            images = jnp.where(chosen, self.augment(augment_key, images), images)
        new = {"shown": batch["image"], **{f"shown_{name}": value for name, value in cond.items()}}
        # whole on every device first: from parts of a batch to parts of a picture all devices would exchange pieces
        first = gathered({name: rows[: self.pictures] for name, rows in new.items()})
        shown = {name: state.aux[name].at[:count].set(rows) for name, rows in first.items()}
        rows = Rows(images, jax.random.split(sample_key, count), cond)
        return dataclasses.replace(state, aux=state.aux | shown), rows

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """One step of the tokenizer."""
        state, rows = self.drawn(state, batch, key)
        state, metrics, _ = self.parts[0].update(state, lambda p, r: self.loss(p, r, frozen), rows, schedule)
        return state, metrics

    def preview(self, state: State, frozen: Frozen, key: jax.Array, generator: Any) -> Mapping[str, jax.Array]:
        """Gives the newest images and their reconstructions from the posterior mode."""
        del frozen, generator
        params, images = self.export(state)["tokenizer"], signed(state.aux["shown"])
        cond = {name.removeprefix("shown_"): v for name, v in state.aux.items() if name.startswith("shown_")}
        keys = jax.random.split(key, len(images))
        codes = self.tokenizer.encode(params, images, cond=cond, keys=keys).mode()
        decoded = self.tokenizer.decode(params, codes, cond=cond, keys=decode_keys(keys))
        pictures = {"images": images, "reconstructions": jnp.clip(decoded, -1.0, 1.0)}
        # of a video the middle frame
        return {name: x if x.ndim == 4 else x[:, x.shape[1] // 2] for name, x in pictures.items()}


@dataclasses.dataclass(frozen=True)
class TokenizerTask(TokenizerMethod):
    """Trains ``tokenizer``, continuous or discrete, to give images back.

    The loss is l2 mean (x - y)^2 + l1 mean |x - y| + the weighted terms, and the weighted losses of the latents: the KL
    of a posterior, or those of a quantizer. y is decoded from a posterior sample, or from code vectors with
    straight-through gradients. Errors are on the [0, 1] scale. The defaults are the single-stage loss of TA-TiTok
    without its perceptual and adversarial terms (Kim et al. 2025, section 3).

    Attributes:
      l1, l2: weights of the absolute and the squared error.
      terms: distances by frozen networks, such as `gen.tokenizers.losses.LPIPS`; ``frozen`` holds their weights.
      signed: errors are measured on [-1, 1], where they are twice as large: latent diffusion's convention.
      summed: errors and terms are summed over an image's entries and not averaged: latent diffusion's convention, to
        which its weights of the KL belong.
      corruption: how latents are disturbed before they are decoded (`gen.tokenizers.rae.LatentNoise`,
        `gen.tokenizers.detok.LatentDenoising`); None for a posterior sample as it is.

    Raises GenError for negative weights, and terms of one name.
    """

    l1: float = 0.0
    l2: float = 1.0
    terms: tuple[Any, ...] = ()
    signed: bool = False
    summed: bool = False
    corruption: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.l1, self.l2) < 0:
            raise GenError(f"l1 {self.l1}, l2 {self.l2}; weights are at least 0")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise GenError(f"the terms {', '.join(names)} repeat; give each once")

    @property
    def looks(self) -> tuple[Any, ...]:
        """Gives the terms, `terms`."""
        return self.terms

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Fresh parameters, or those of the previous stage. Raises GenError where a term's weights are not given."""
        for term in self.terms:
            expect_frozen(frozen, term)
        return super().start(key, frozen, previous)

    def encode(self, params: Params, rows: Rows) -> tuple[Any, jax.Array]:
        """Does what `TokenizerMethod` says; the latents are disturbed where that is asked for."""
        if self.corruption is None:
            return super().encode(params, rows)
        disturbed: tuple[Any, jax.Array] = self.corruption.encode(self.tokenizer, params, rows.images, rows.draws)
        return disturbed

    def decode(self, params: Params, latents: jax.Array, rows: Rows) -> jax.Array:
        """Does what `TokenizerMethod` says."""
        if self.corruption is None:
            return super().decode(params, latents, rows)
        decoded: jax.Array = self.corruption.decode(self.tokenizer, params, latents, rows.draws)
        return decoded

    def drawn(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Rows]:
        """Does what `TokenizerMethod` says; what disturbs the latents is drawn here, once."""
        state, rows = super().drawn(state, batch, key)
        if self.corruption is None:
            return state, rows
        return state, dataclasses.replace(rows, draws=self.corruption.draw(self.tokenizer, rows.keys))

    def image_loss(
        self, frozen: Frozen, images: jax.Array, decoded: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Says what images (B, H, W, C) and reconstructions differ by: the loss () and its parts."""
        error, scale = 0.5 * (decoded - images), 2.0 if self.signed else 1.0
        mse, l1 = jnp.square(error).mean(), jnp.abs(error).mean()
        loss = self.l2 * scale**2 * mse + self.l1 * scale * l1
        metrics = {"mse": mse, "psnr": -10.0 * jnp.log10(jnp.maximum(mse, 1e-10))} | ({"l1": l1} if self.l1 else {})
        for term in self.terms:
            metrics[term.name] = term(frozen[term.name], images, decoded).mean()
            loss = loss + term.weight * metrics[term.name]
        return (images[0].size if self.summed else 1.0) * loss, metrics

    def beside(
        self, params: Params, rows: Rows, frozen: Frozen, encoded: Any, latents: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Gives a further loss () of a method that inherits from this one, with its parts; none here."""
        del params, rows, frozen, encoded, latents
        return jnp.zeros(()), {}

    def loss(self, params: Params, rows: Rows, frozen: Frozen) -> tuple[jax.Array, Aux]:
        """Gives the whole loss () of a batch, with its parts."""
        encoded, latents, decoded = self.reconstruct(params, rows)
        images, metrics = self.image_loss(frozen, rows.images, decoded)
        cost, more = self.latent_loss(encoded)
        further, others = self.beside(params, rows, frozen, encoded, latents)
        return images + cost + further, Aux(metrics | more | others, encoded.statistics)
