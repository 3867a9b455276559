"""MaskGIT's bidirectional transformer over the tokens of one image, in TiTok's two forms: BERT, and with long skips.

Chang et al. 2022, arXiv 2202.04200; Yu et al. 2024, arXiv 2406.07550; Bao et al. 2022, "All are Worth Words", arXiv
2209.12152. The sequence is the class, then the K tokens, some of them masked. One table embeds all: tokens 0 to V - 1,
the mask V, class c as V + 1 + c, and no class as V + 1 + classes. A layer of its own gives the logits.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.autoregressive.masked import MaskedModel
from gen.config import suggest
from gen.errors import GenError
from gen.nn.attention import Attention
from gen.nn.layers import MLP, Embed, Remat, dropout, linear, run_stack, stack
from gen.nn.network import Cond
from gen.nn.vit import normed
from gen.training.sharding import constrain

__all__ = ["MaskGITConfig", "MaskGITSkipConfig", "maskgit"]

_normal = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes(MaskedModel):
    """What the two forms share.

    Attributes:
      shape: of one image's tokens.
      width, depth, heads, hidden: of the transformer; `hidden` is the inner width of its feed-forward layers.
      dtype: compute type of the matrix products.
      remat, scan: see `gen.nn.layers.run_stack`.
    """

    shape: tuple[int, ...] = (32,)
    vocabulary: int = 4096
    num_classes: int = 1000
    width: int = 768
    depth: int = 24
    heads: int = 16
    hidden: int = 3072
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise GenError(f"MaskGIT width {self.width} is no multiple of its {self.heads} heads; change one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGITConfig(_Sizes):
    """BERT's encoder: norms after the sums. The defaults are the generator of TiTok-L-32.

    `dropout` acts on the embeddings and on what each half of a block adds; the published training drops attention
    weights as well, which fused attention cannot.
    """

    dropout: float = 0.1

    def build(self, rngs: nnx.Rngs) -> "MaskGIT":
        """Gives the module with freshly drawn parameters."""
        return MaskGIT(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGITSkipConfig(_Sizes):
    """A U-ViT: the second half of the blocks sees the outputs of the first half, last one first.

    `depth` counts these two halves; one more block stands between them. The defaults are TiTok-S-128's generator.

    Raises GenError for an odd depth, and for dropout, which the network has not.
    """

    shape: tuple[int, ...] = (128,)
    width: int = 1024
    depth: int = 20
    hidden: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth % 2 or self.dropout:
            raise GenError(
                f"a MaskGIT with skips has depth {self.depth} and dropout {self.dropout}; expected an even depth, half "
                "of it on each side, and no dropout"
            )

    def build(self, rngs: nnx.Rngs) -> "MaskGITSkip":
        """Gives the module with freshly drawn parameters."""
        return MaskGITSkip(self, rngs)


# TiTok's generators by the tokenizer that they go with: ImageNet classes, 4096 codes
PUBLISHED: dict[str, Any] = {
    "l32": MaskGITConfig(),
    "b64": MaskGITConfig(shape=(64,)),
    "s128": MaskGITSkipConfig(),
}


def maskgit(name: str, **changes: Any) -> Any:
    """Gives a published generator by its tokenizer, "l32", "b64" or "s128". Raises GenError for another name."""
    if name not in PUBLISHED:
        raise GenError(f"unknown MaskGIT '{name}'; {suggest(name, PUBLISHED)}")
    return dataclasses.replace(PUBLISHED[name], **changes)


class _Masked(nnx.Module):
    """The token space of both forms."""

    config: Any
    init: ClassVar[Any]

    def _ends(self, config: Any, rngs: nnx.Rngs) -> None:
        """Makes the table of ids, the positions and the last layer."""
        self.config = config
        rows = config.vocabulary + config.num_classes + 2
        self.embedding = Embed(rows, config.width, init=self.init, rngs=rngs)
        self.positions = nnx.Param(self.init(rngs.params(), (config.length + 1, config.width)))
        self.head = linear(config.width, config.vocabulary, init=self.init, dtype=jnp.dtype(config.dtype), rngs=rngs)

    def null(self, cond: Cond) -> Cond:
        """Gives the condition of no class; GenError for a model without classes."""
        if not self.config.num_classes:
            raise GenError("this MaskGIT is unconditional; sample it without guidance")
        return {**cond, "label": jnp.full_like(cond["label"], self.config.num_classes)}

    def labelled(self, cond: Cond, batch: int) -> jax.Array:
        """Gives the embedding of the class, or of none, (B, width)."""
        label = cond["label"] if self.config.num_classes else jnp.zeros(batch, jnp.int32)
        return self.embedding(self.config.vocabulary + 1 + label)

    def sequence(self, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Embeds the class and the tokens with their positions: (B, 1 + K, width) float32.

        Raises GenError for another number of tokens than the configuration's.
        """
        if tokens.shape[1:] != (self.config.length,):
            raise GenError(f"tokens are {tokens.shape}; this MaskGIT takes (B, {self.config.length})")
        first = self.labelled(cond, len(tokens))
        return constrain(jnp.concatenate([first[:, None], self.embedding(tokens)], axis=1) + self.positions[...])

    @abc.abstractmethod
    def trunk(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Gives what the last layer reads, (B, 1 + K, width), of embedded tokens."""

    def __call__(self, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Gives logits (B, K, vocabulary) float32.

        Args:
          tokens: (B, K) int32 in [0, vocabulary], the last of which is the mask.
          cond: ``label`` (B,) int32 in [0, num_classes], the last of which is no class; in training of a network with
            dropout ``dropout``, keys (B,).
        """
        x = self.trunk(self.sequence(tokens, cond), cond.get("dropout"))
        logits: jax.Array = self.head(x[:, 1:]).astype(jnp.float32)
        return logits


class _PostNorm(nnx.Module):
    """y = norm1(x + attention(x)); norm2(y + MLP(y))."""

    def __init__(self, config: MaskGITConfig, rngs: nnx.Rngs) -> None:
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.rate = config.dropout
        self.attn = Attention(width, config.heads, init=_normal, proj_init=_normal, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, config.hidden, approximate=False, init=_normal, dtype=dtype, rngs=rngs)
        self.norm1, self.norm2 = (normed("layer", width, 1e-12, rngs) for _ in range(2))

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        first, second = (None, None) if keys is None else _streams(keys, 2)
        x = self.norm1(x + _dropped(self.attn(x).astype(jnp.float32), self.rate, first))
        return self.norm2(x + _dropped(self.mlp(x).astype(jnp.float32), self.rate, second))


def _streams(keys: jax.Array, count: int) -> list[jax.Array]:
    """`count` arrays of keys (B,) from one."""
    return list(jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys))


def _dropped(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    return x if keys is None or not rate else dropout(x, rate, keys)


class MaskGIT(_Masked):
    """The network of a `MaskGITConfig`."""

    init = staticmethod(_normal)

    def __init__(self, config: MaskGITConfig, rngs: nnx.Rngs) -> None:
        self._ends(config, rngs)
        # BERT tells two kinds of tokens apart, of which a generator has the first alone
        self.kinds = nnx.Param(_normal(rngs.params(), (2, config.width)))
        self.norm = normed("layer", config.width, 1e-12, rngs)
        self.blocks = stack(lambda r: _PostNorm(config, r), config.depth, rngs)

    def start(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Gives what the first block reads: the embeddings, normed."""
        return _dropped(self.norm(x + self.kinds[...][0]), self.config.dropout, keys)

    def trunk(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Does what the base says."""
        config = self.config
        first, layers = None, None
        if keys is not None:
            first, *rest = _streams(keys, config.depth + 1)
            layers = jnp.stack(rest)
        found = run_stack(
            self.blocks,
            self.start(x, first),
            lambda block, x, keys: (constrain(block(x, keys)), None),
            per_layer=layers,
            remat=config.remat,
            scan=config.scan,
        )
        return found.x


class _PreNorm(nnx.Module):
    """x + attention(norm1 x), then x + MLP(norm2 x); `joins` says whether x is first mixed with a skip."""

    def __init__(self, config: MaskGITSkipConfig, joins: bool, rngs: nnx.Rngs) -> None:
        width, dtype, init = config.width, jnp.dtype(config.dtype), _truncated
        if joins:
            self.join = linear(2 * width, width, init=init, dtype=dtype, rngs=rngs)
        self.norm1, self.norm2 = (normed("layer", width, 1e-5, rngs) for _ in range(2))
        self.attn = Attention(width, config.heads, bias=False, init=init, proj_init=init, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, config.hidden, approximate=False, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        if skip is not None:
            x = self.join(jnp.concatenate([x, skip], axis=-1)).astype(jnp.float32)
        x = x + self.attn(self.norm1(x))
        return constrain(x + self.mlp(self.norm2(x)))


_truncated = nnx.initializers.truncated_normal(0.02)


class MaskGITSkip(_Masked):
    """The network of a `MaskGITSkipConfig`."""

    init = staticmethod(_truncated)

    def __init__(self, config: MaskGITSkipConfig, rngs: nnx.Rngs) -> None:
        self._ends(config, rngs)
        half = config.depth // 2
        self.down = stack(lambda r: _PreNorm(config, False, r), half, rngs)
        self.middle = _PreNorm(config, False, rngs)
        self.up = stack(lambda r: _PreNorm(config, True, r), half, rngs)
        self.norm = normed("layer", config.width, 1e-5, rngs)

    def halves(self, x: jax.Array, keep: tuple[int, ...] = ()) -> tuple[Any, jax.Array, Any]:
        """Gives what the first half, the middle block and the second half say; halves as `gen.nn.layers.StackOutput`.

        Args:
          keep: blocks of both halves whose outputs are kept.
        """
        options: dict[str, Any] = {"remat": self.config.remat, "scan": self.config.scan, "keep": keep}

        def first(block: Any, x: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
            x = block(x)
            return x, x

        down = run_stack(self.down, x, first, **options)
        middle = self.middle(down.x)
        skips = down.outputs[::-1]
        up = run_stack(self.up, middle, lambda block, x, skip: (block(x, skip), None), per_layer=skips, **options)
        return down, middle, up

    def trunk(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Does what the base says; it drops nothing."""
        del keys
        out: jax.Array = self.norm(self.halves(x)[2].x)
        return out
