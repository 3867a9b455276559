"""Distilled Decoding 1: a generator of one or two calls from an autoregressive teacher (arXiv 2412.17153).

The teacher's own randomness is made a function of noise: token i is where the probability flow of its distribution
takes the noise eps_i (`gen.distill.code_flow`). Noise and tokens then belong to each other, and a network can learn to
say all tokens from the noise alone, or, given the first t of them, the rest. Two heads answer: logits over the codes
are surer for early tokens, on which all others depend, and code vectors go straight into the tokenizer's decoder.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.autoregressive.base import cross_entropy
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.network import Cond, Network, Params
from gen.tokenizers.code_vectors import code_table
from gen.training.method import Method, given
from gen.training.part import Aux, Part, warm_start
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = [
    "DistilledDecodingTask",
    "TokenStudentMethod",
    "answered",
    "distillation_loss",
    "nearest",
    "perturbed",
    "sampled",
    "spliced",
    "taught",
]

Student = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # (x, known) -> logits, vectors


def _given(known: jax.Array, length: int) -> jax.Array:
    """(B, N, 1) bool: which positions hold data."""
    return (jnp.arange(length) < known[:, None])[..., None]


def perturbed(data: jax.Array, noise: jax.Array, known: jax.Array) -> jax.Array:
    """Gives x_t: the first `known` (B,) vectors of data (B, N, D), noise after them."""
    return jnp.where(_given(known, data.shape[1]), data, noise)


def nearest(codes: jax.Array, x: jax.Array) -> jax.Array:
    """Gives the ids (...) int32 of the codes (V, D) that are nearest to x (..., D)."""
    inner = jnp.matmul(x, codes.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.square(codes).sum(-1) - 2.0 * inner, axis=-1).astype(jnp.int32)


def answered(
    x: jax.Array, known: jax.Array, logits: jax.Array, vectors: jax.Array, codes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gives the student's ids (B, N) and vectors (B, N, D), those of known positions replaced by what they hold."""
    given = _given(known, x.shape[1])
    ids = jnp.where(given[..., 0], nearest(codes, x), jnp.argmax(logits, axis=-1).astype(jnp.int32))
    return ids, jnp.where(given, x, vectors)


def spliced(ids: jax.Array, vectors: jax.Array, codes: jax.Array, split: int) -> jax.Array:
    """Gives (B, N, D): the codes of the ids before position `split`, the vectors from there on.

    Args:
      ids: (B, N) int32 in [0, V).
      vectors: (B, N, D) what the student says at every position.
      codes: (V, D) the tokenizer's code vectors.
    """
    return jnp.where((jnp.arange(ids.shape[1]) < split)[:, None], codes[ids], vectors)


def sampled(student: Student, noise: jax.Array, codes: jax.Array, starts: Sequence[int], split: int) -> jax.Array:
    """Gives code vectors (B, N, D) of noise by a call for each of `starts`, rising from 0.

    The call at t keeps the first t vectors of the one before; all others start again from their own noise.
    """
    x = noise
    for start in starts:
        known = jnp.full(len(x), start, jnp.int32)
        x = perturbed(x, noise, known)
        x = spliced(*answered(x, known, *student(x, known), codes), codes, split)
    return x


def taught(
    student: Student,
    noise: jax.Array,
    codes: jax.Array,
    write: Callable[[jax.Array | None], jax.Array],
    rewritten: int,
    split: int,
) -> jax.Array:
    """Gives code vectors (B, N, D) of noise, with the teacher's hand in between (released with arXiv 2412.17153).

    The student says all tokens; the teacher keeps the first `rewritten` of them and writes the next; the student goes
    on after these. With `rewritten` 0 the teacher begins, and the first call is saved.

    Args:
      write: gives the first t tokens (B, t) that the teacher writes, after the given ones (B, rewritten) or None.
      split: as in `spliced`.
    """
    begun = None
    if rewritten:
        nothing = jnp.zeros(len(noise), jnp.int32)
        begun = answered(noise, nothing, *student(noise, nothing), codes)[0][:, :rewritten]
    ids = write(begun)
    known = jnp.full(len(noise), ids.shape[1], jnp.int32)
    x = jnp.concatenate([codes[ids], noise[:, ids.shape[1] :]], axis=1)
    return spliced(*answered(x, known, *student(x, known), codes), codes, split)


def distillation_loss(
    logits: jax.Array, vectors: jax.Array, ids: jax.Array, codes: jax.Array, known: jax.Array, weight: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Gives -log p(token) + weight |vector - code|^2 / D, both means over the positions from `known` on, (B,).

    The published trainer is not public; this loss follows the paper's account of its two heads, with squared errors in
    place of a perceptual distance of decoded images.

    Args:
      logits: (B, N, V); vectors: (B, N, D); ids: (B, N) the teacher's tokens; known: (B,) int32, below N.
    """
    asked = (jnp.arange(ids.shape[1]) >= known[:, None]).astype(jnp.float32)
    share = asked / asked.sum(axis=1, keepdims=True)
    said = (share * cross_entropy(logits, ids)).sum(axis=1)
    off = (share * jnp.square(vectors - codes[ids]).mean(axis=-1)).sum(axis=1)
    return said + weight * off, {"cross_entropy": said, "distance": off}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStudentMethod(Method):
    """What methods share that train ``net``, a network from noise to all of a teacher's tokens.

    Attributes:
      teacher: the teacher's token model.
      tokenizer: the teacher's tokenizer, whose code vectors the student reads and writes.
      student: the student's network, which starts from what fits of the teacher's.

    Raises GenError for a student of another shape than the teacher's tokens and their codes.
    """

    teacher: Any = given("teacher")
    tokenizer: Any = given("tokenizer")
    student: Any

    takes = ("tokens",)

    def __post_init__(self) -> None:
        length, width = self.student.shape
        if (length, width) != (self.teacher.length, self.tokenizer.spec.width):
            raise GenError(
                f"a student of {length} vectors of {width}, and a teacher of {self.teacher.length} tokens with codes "
                f"of {self.tokenizer.spec.width}; give the student the teacher's"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the shape of a record's tokens."""
        return tuple(self.teacher.shape)

    @property
    def conditions(self) -> Conditions:
        """Gives the teacher's conditions."""
        conditions: Conditions = self.student.conditions
        return conditions

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the student as the only part."""
        return (Part("student", self.student, self.optim, self.emas),)

    def models(self) -> Mapping[str, Model]:
        """Gives the student."""
        return {"net": Model(self.student)}

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives the student of the previous stage, or else what fits of the teacher.

        Raises GenError for a missing frozen role.
        """
        for role in ("teacher", "tokenizer"):
            if role not in frozen:
                raise GenError(f"distilled decoding needs the frozen role '{role}'; got {', '.join(frozen) or 'none'}")
        source = self.student.begun(frozen["teacher"]) if previous is None else previous.params["student"]
        return {"student": warm_start(self.student, key, source)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilledDecodingTask(TokenStudentMethod):
    """Trains ``net`` to say a teacher's tokens from the noise that they were made of.

    Batches: "noise" (B, N, D) and "tokens" (B, *shape), records of the teacher; conditions by name.

    Attributes:
      starts: the numbers of tokens that are given in training, one of them drawn for each sample.
      weight: of the distance of the vectors, beside the cross-entropy.

    Raises GenError for starts that are no positions of the tokens.
    """

    starts: tuple[int, ...] = (0,)
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        length = self.student.shape[0]
        if not self.starts or min(self.starts) < 0 or max(self.starts) >= length:
            raise GenError(f"starts {self.starts} of {length} tokens; expected numbers from 0 to {length - 1}")

    def check(self, row: Mapping[str, np.ndarray]) -> None:
        """Checks what `Method.check` does, and the noise. Raises GenError for data without the teacher's noise."""
        found = np.shape(row.get("noise", ()))[1:]
        if found != tuple(self.student.shape):
            has = f"noise {found}" if "noise" in row else "no noise"
            raise GenError(
                f"the data hold {has}; this student needs noise {tuple(self.student.shape)} beside the tokens: make "
                "records of the teacher (gen distill PRESET --teacher RUN --pairs N)"
            )
        super().check(row)

    def loss(self, params: Params, ids: jax.Array, noise: jax.Array, known: jax.Array, codes: Any, cond: Cond) -> Any:
        """Gives the mean of `distillation_loss` over samples that know their first `known` (B,) tokens."""
        x = perturbed(codes[ids], noise, known)
        logits, vectors = Network(self.student)(params, x, known, cond)
        losses, terms = distillation_loss(logits, vectors, ids, codes, known, self.weight)
        return losses.mean(), Aux({name: term.mean() for name, term in terms.items()})

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step with freshly drawn starts."""
        ids, codes = self.teacher.sequence(batch["tokens"]), code_table(self.tokenizer, frozen["tokenizer"])
        known = jax.random.choice(key, jnp.asarray(self.starts, jnp.int32), ids.shape[:1])
        data = (ids, batch["noise"], known, self.cond(batch))

        def loss(params: Params, data: Any) -> tuple[jax.Array, Aux]:
            ids, noise, known, cond = data
            found: tuple[jax.Array, Aux] = self.loss(params, ids, noise, known, codes, cond)
            return found

        state, metrics, _ = self.parts[0].update(state, loss, data, schedule)
        return state, metrics
