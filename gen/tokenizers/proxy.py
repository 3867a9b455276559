"""TiTok's first stage: the decoder names the codes of a trained 2D tokenizer (Yu et al. 2024, arXiv 2406.07550, 3.3).

The second stage trains the decoder on pixels: `gen.tokenizers.adversarial.AdversarialTask` with ``train`` set to
`SECOND_STAGE`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.errors import GenError
from gen.nn.network import Params
from gen.tokenizers.train import Rows, TokenizerMethod
from gen.training.part import Aux
from gen.training.task import Frozen, State

__all__ = ["SECOND_STAGE", "ProxyTask", "code_loss"]

# what learns in the second stage: the decoder of the tokens, and the 2D tokenizer's that paints its codes
SECOND_STAGE = ("decoder_embed/*", "mask_token", "decoder/*", "head/*", "pixel_codes", "pixel_decoder/*")


def code_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Gives the cross-entropy () in nats of logits (B, ..., n) for ids (B, ...), its mean over all positions."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)
    return -chosen.mean()


@dataclasses.dataclass(frozen=True)
class ProxyTask(TokenizerMethod):
    """Trains ``tokenizer`` to predict the ids of ``frozen["proxy"]``, the weights of its 2D tokenizer `pixels`.

    The loss is `code_loss` and the quantizer's weighted losses. The 2D tokenizer's codes and decoder are taken over
    into the tokenizer at the start and learn nothing here.

    Raises GenError for a tokenizer without such a 2D tokenizer.
    """

    train: tuple[str, ...] = ("[!p]*", "patch_embed/*")  # all but pixel_codes and pixel_decoder

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer.pixels is None:
            raise GenError("proxy codes are those of the tokenizer's 2D tokenizer; this one has none: set its `pixels`")

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives fresh parameters with the 2D tokenizer's decoder, or those of the previous stage.

        Raises GenError without the frozen role "proxy".
        """
        if "proxy" not in frozen:
            raise GenError("proxy codes need the frozen role 'proxy', the weights of the tokenizer's 2D tokenizer")
        own = super().start(key, frozen, previous)["tokenizer"]
        proxy = frozen["proxy"]
        painter = {"pixel_codes": proxy["quantizer"]["embedding"], "pixel_decoder": proxy["decoder"]}
        return {"tokenizer": {**own, **painter}}

    def loss(self, params: Params, rows: Rows, frozen: Frozen) -> tuple[jax.Array, Aux]:
        """Gives the whole loss () of a batch; ``accuracy`` is the share of codes that are named rightly."""
        ids = self.tokenizer.pixels.encode(frozen["proxy"], rows.images).ids
        encoded, codes = self.encode(params, rows)
        logits = self.tokenizer.logits(params, codes)
        named, (cost, metrics) = code_loss(logits, ids), self.latent_loss(encoded)
        accuracy = (logits.argmax(-1) == ids).mean()
        return named + cost, Aux({**metrics, "code_loss": named, "accuracy": accuracy}, encoded.statistics)
