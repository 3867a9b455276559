"""Noise to tokens: what a token model's own randomness makes of noise, kept as records, and the student that says it.

Both read the noise of a sample as one normal vector for each token, in the space of the code vectors.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.autoregressive.decoding import filtered
from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.sampler import TokenSampler, write
from gen.autoregressive.scales import ScaleSampler, decode_scales
from gen.autoregressive.unmasking import MaskedSampler
from gen.config import fingerprint
from gen.distill.code_flow import flow_to_codes
from gen.distill.distilled_decoding import sampled, taught
from gen.errors import GenError
from gen.nn.network import Cond, Network
from gen.sampling.generator import GeneratorParams, LatentGenerator, changes, decode
from gen.sampling.noise import unit_noise
from gen.tokenizers.code_vectors import code_table, decodable
from gen.training.task import Model

__all__ = ["FlowedTokens", "NoiseDecoder", "NoiseDecoding"]

_COLDEST = 1e-6  # of a temperature that falls to 0: the likeliest token then has all the probability


@dataclasses.dataclass(frozen=True)
class FlowedTokens:
    """A `gen.sampling.records.Make`: ``noise`` (B, N, D) and the ``tokens`` that a teacher's probabilities make of it.

    Token i is where the flow of the teacher's (guided, filtered) distribution takes noise i, and the distributions of
    the next one, or of the next map, follow from it (arXiv 2412.17153, sec. 4). Of a masked model all candidates of a
    round flow at once, and the noise on its confidences is one for all samples, so that tokens follow from their own
    noise alone.

    Attributes:
      generator: the teacher, which writes token by token, map by map or round by round, with its sampler and tokenizer.
      steps: of Euler's method along each flow.

    Raises GenError for a teacher that draws otherwise, or without its tokenizer.
    """

    generator: TokenGenerator
    steps: int = 100

    def __post_init__(self) -> None:
        sampler = self.generator.sampler
        if not isinstance(sampler, TokenSampler | ScaleSampler | MaskedSampler):
            raise GenError(
                f"{type(sampler).__name__} draws tokens neither one by one, by maps nor by rounds of a masked model; "
                "give a teacher that does"
            )
        if self.generator.tokenizer is None:
            raise GenError("flows end in code vectors, and this teacher has no tokenizer; train it with --tokenizer")

    @property
    def identity(self) -> str:
        """Does what `gen.sampling.records.Make.identity` says."""
        return f"flowed {fingerprint(self.generator)} in {self.steps} steps"

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> Mapping[str, jax.Array]:
        """Does what `gen.sampling.records.Make.__call__` says."""
        model, sampler = self.generator.model, self.generator.sampler
        codes = code_table(self.generator.tokenizer, params["tokenizer"])
        noise = unit_noise(keys, (model.length, codes.shape[1]))
        if isinstance(sampler, MaskedSampler):
            shared = jax.random.key(0)

            def draw(scores: jax.Array, spread: jax.Array, i: Any) -> jax.Array:
                del i
                log_p = jax.nn.log_softmax(scores / jnp.maximum(spread, _COLDEST))
                return flow_to_codes(log_p, codes, noise, self.steps)[0]

            def order(i: Any) -> jax.Array:
                return jax.random.gumbel(jax.random.fold_in(shared, i), (1, model.length))

            ids = sampler.unmasked(model, params, cond, len(keys), draw, order)
            return {"noise": noise, "tokens": model.stored(ids)}

        starts = jnp.asarray([0, *itertools.accumulate(model.groups)])
        temperature = getattr(sampler, "temperature", 1.0)

        def pick(logits: jax.Array, group: Any) -> jax.Array:
            kept = filtered(logits, temperature=temperature, k=sampler.top_k, p=sampler.top_p)
            own = jax.lax.dynamic_slice_in_dim(noise, starts[group], logits.shape[1], axis=1)
            found, _ = flow_to_codes(jax.nn.log_softmax(kept), codes, own, self.steps)
            return found

        if isinstance(sampler, ScaleSampler):
            quantizer = params["tokenizer"]["quantizer"]
            ids, _ = decode_scales(model, params["net"], quantizer, cond, pick, sampler.guidance)
        else:
            ids = write(model, params["net"], cond, len(keys), pick, sampler.guidance)
        return {"noise": noise, "tokens": model.stored(ids)}


@dataclasses.dataclass(frozen=True)
class NoiseDecoding:
    """How a student of Distilled Decoding is sampled.

    Attributes:
      starts: for each network call how many tokens it keeps of the one before; the first keeps none.
      split: the position from which on the vectors are taken instead of the likeliest code.
      writer: the sampler of the teacher, which writes anew the tokens that the second call keeps, from number
        `rewritten` on; its arrays are those of the role ``guide``. None for the student alone.
      rewritten: the first token that the teacher writes; 0 saves the student's first call.
      decoding: settings of a tokenizer's decoder that samples; None for the tokenizer's own.

    Raises GenError for starts that do not rise from 0, and rewriting without a teacher or without two calls.
    """

    starts: tuple[int, ...] = (0,)
    split: int = 0
    writer: Any = None
    rewritten: int = 0
    decoding: Any = None

    def __post_init__(self) -> None:
        if self.writer is None and self.rewritten:
            raise GenError("no teacher writes here; give it (gen sample --guide TEACHER), or leave out rewritten")
        if self.writer is not None and not (len(self.starts) == 2 and 0 <= self.rewritten < self.starts[1]):
            raise GenError(
                f"a teacher writes from token {self.rewritten} on between the calls {self.starts}; expected two calls, "
                "(0, K), and a token before K"
            )
        if self.starts[:1] != (0,) or list(self.starts) != sorted(set(self.starts)) or self.split < 0:
            raise GenError(f"starts {self.starts}, split {self.split}; expected numbers rising from 0, and 0 or more")

    def changed(self, **settings: Any) -> "NoiseDecoding":
        """Gives this sampler where nothing is given but its own number of calls as ``steps``.

        Raises GenError for any other setting: the student has its own calls.
        """
        if changes(None, settings) not in ({}, {"steps": len(self.starts)}):
            raise GenError("a student of noise and tokens has its own calls; change sampler.starts and sampler.split")
        return self

    def guided_by(self, writer: Any) -> "NoiseDecoding":
        """Gives this sampler with the teacher's own in it, whose tokens all are written that the second call keeps.

        Raises GenError for a masked teacher, which does not write the first tokens first.
        """
        if isinstance(writer, MaskedSampler):
            raise GenError("a masked teacher writes no first tokens for its student to go on from; leave out --guide")
        return dataclasses.replace(self, writer=writer)

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> "NoiseDecoder":
        """Gives the Generator of the student ``net`` of a run."""
        return NoiseDecoder(models["net"].config, self, tokenizer)


@dataclasses.dataclass(frozen=True)
class NoiseDecoder(LatentGenerator):
    """Noise -> all tokens, in one call or a few -> the tokenizer's image; a `gen.sampling.generator.Generator`.

    Attributes:
      student: configuration of the network.
      sampler: the calls.
      tokenizer: configuration of the teacher's tokenizer; without one nothing can be made, for both read its codes.

    Raises GenError for calls that keep more tokens than there are.
    """

    student: Any
    sampler: NoiseDecoding = NoiseDecoding()
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if self.sampler.starts[-1] >= self.student.shape[0]:
            raise GenError(f"starts {self.sampler.starts} of {self.student.shape[0]} tokens; keep fewer")

    @property
    def subject(self) -> Any:
        """Gives the configuration of the network."""
        return self.student

    @property
    def network(self) -> Any:
        """Gives the same: the student's configuration is its network's."""
        return self.student

    @property
    def model(self) -> Any:
        """Gives the teacher's model, whose tokens the student makes."""
        return self.student.of

    @property
    def options(self) -> Any:
        """Gives settings of the tokenizer's decoder, as the sampler states them."""
        return self.sampler.decoding

    @property
    def nfe(self) -> int:
        """Gives the network calls per sample, the teacher's among them."""
        sampler, ends = self.sampler, itertools.accumulate(self.model.groups)
        if sampler.writer is None:
            return len(sampler.starts)
        return (1 if sampler.rewritten else 0) + sum(sampler.rewritten < end <= sampler.starts[1] for end in ends) + 1

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Does what `gen.sampling.generator.Generator.__call__` says. Raises GenError without a tokenizer."""
        if self.tokenizer is None:
            raise GenError(
                "this student makes code vectors, which only its teacher's tokenizer decodes; give it (gen convert "
                "FILE --vae TOKENIZER)"
            )
        codes, net = code_table(self.tokenizer, params["tokenizer"]), Network(self.student)
        noise = unit_noise(keys, self.student.shape)
        sampler, student = self.sampler, lambda x, known: net(params["net"], x, known, cond)
        if sampler.writer is None:
            vectors = sampled(student, noise, codes, sampler.starts, sampler.split)
        else:
            held = {**params, "net": params["guide"]}

            def write(begun: jax.Array | None) -> jax.Array:
                found: jax.Array = sampler.writer.tokens(
                    self.model, held, keys, cond, self.tokenizer, begun=begun, count=sampler.starts[1]
                )
                return found

            vectors = taught(student, noise, codes, write, sampler.rewritten, sampler.split)
        latents = decodable(self.tokenizer, params["tokenizer"], vectors)
        return decode(self.tokenizer, params, latents, keys=keys, cond=cond, options=self.options)
