"""The first stage of the two-stage TiTok: the decoder learns to name the codes of a frozen 2D tokenizer.

Yu et al. 2024, "An Image is Worth 32 Tokens" (arXiv 2406.07550), section 3.3. The second stage is
`gen.tokenizers.adversarial.AdversarialTask` with ``train`` set to `SECOND_STAGE`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.errors import GenError
from gen.nn.network import Params
from gen.tokenizers.train import Rows, TokenizerTask
from gen.training.part import Aux
from gen.training.task import Frozen, State

__all__ = ["SECOND_STAGE", "ProxyTask", "naming_loss"]

_DECODER = ("decoder_embed/*", "mask_token", "decoder/*", "head/*")
# what learns in each stage: all but the 2D tokenizer's parts, and the decoder with them
_FIRST_STAGE = ("latent_tokens", "patch_embed/*", "encoder/*", "encoder_out/*", "quantizer/*", *_DECODER)
SECOND_STAGE = (*_DECODER, "pixel_codes", "pixel_decoder/*")


def naming_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Cross-entropy (B,) of logits (B, h, w, n) with ids (B, h, w), mean over places."""
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)
    return -found.reshape(len(ids), -1).mean(axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxyTask(TokenizerTask):
    """`TokenizerTask` on the codes that a frozen 2D tokenizer gives the same image, in place of pixels.

    The 2D tokenizer is the configuration's own (`gen.tokenizers.titok.TiTokConfig.pixels`), its weights are the frozen
    role "proxy". Its codebook and decoder are copied into the tokenizer, where they wait for the second stage and show
    previews. Weights of errors and terms have no meaning here.
    """

    train: tuple[str, ...] = _FIRST_STAGE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer.pixels is None:
            raise GenError("only the two-stage TiTok learns to name codes; give its configuration the 2D tokenizer")

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Fresh parameters with the 2D tokenizer's codebook and decoder, or those of the previous stage."""
        if "proxy" not in frozen:
            raise GenError("the first stage of TiTok needs the frozen role 'proxy': the weights of its 2D tokenizer")
        begun, proxy = super().start(key, frozen, previous), frozen["proxy"]
        if previous is not None:
            return begun
        pixels = {"pixel_codes": proxy["quantizer"]["embedding"], "pixel_decoder": proxy["decoder"]}
        return {"tokenizer": {**begun["tokenizer"], **pixels}}

    def loss(self, params: Params, rows: Rows, frozen: Frozen) -> tuple[jax.Array, Aux]:
        """The cross-entropy and the weighted losses of the quantizer (), with their parts."""
        encoded, codes = self.encode(params, rows)
        logits = self.tokenizer.logits(params, codes)
        ids = self.tokenizer.pixels.encode(frozen["proxy"], rows.images).ids
        named = naming_loss(logits, ids).mean()
        latents, more = self.latent_loss(encoded)
        right = (logits.argmax(axis=-1) == ids).mean()
        return named + latents, Aux({"naming": named, "named_right": right, **more}, encoded.statistics)
