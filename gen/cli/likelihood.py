"""``gen evaluate RUN --measures likelihood``: bits per image of a token model, beside those of tokens by themselves."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from gen.cli.compare import show
from gen.cli.flags import Sampling
from gen.errors import GenError

__all__ = ["likelihood"]


def likelihood(run: Path, data: str, sampling: Sampling, batch: int, out: Path | None) -> None:
    """Scores the tokens of a cache under a run's model, prints a table and writes JSON with its protocol.

    Args:
      run: a token model's run folder.
      data: a cache of tokens, or of bits, by the run's tokenizer, of images that it was not trained on.
      sampling: says which weights; batch: rows at a time.
      out: RUN/likelihood.json if None.

    Raises GenError for a run of another kind, a model without likelihood, and tokens that are not the run's.
    """
    import jax
    import numpy as np

    from gen.autoregressive.base import TokenModel
    from gen.autoregressive.likelihood import bits_of_rows
    from gen.data.caches import BitCache, TokenCache
    from gen.metrics.intervals import mean_error
    from gen.metrics.protocol import Protocol, Result
    from gen.runs import load
    from gen.tokenizers.encode import expect_maker
    from gen.training.sharding import make_mesh

    began, loaded = time.monotonic(), load(run, weights=sampling.weights)
    model = loaded.generator.subject
    if not isinstance(model, TokenModel):
        raise GenError(f"{run} is no token model ({type(model).__name__}); likelihoods are of tokens")
    cache: Any = TokenCache(data) if model.kind == "tokens" else BitCache(data)
    source = cache.source()
    model.check_tokens(data, model.kind, cache.shape, getattr(cache, "vocabulary", None), None)
    if "tokenizer" in loaded.params:
        expect_maker(cache, loaded.tokenizer, loaded.params["tokenizer"])
    bits = bits_of_rows(model, loaded.params, source, batch=batch, mesh=make_mesh())
    values = {"bits_per_image": float(bits.mean()), "bits_per_token": float(bits.mean()) / model.length}
    within = {"bits_per_image": mean_error(bits)} if len(bits) > 1 else {}
    baseline = _unigram(loaded, source, model)
    if baseline is not None:
        values["unigram_bits_per_image"] = float(np.mean(baseline))
    protocol = Protocol(
        "none", "none", len(bits), reference=data, reference_fingerprint=cache.identity(), split="held-out"
    )
    about = {"name": str(run), "weights": loaded.weights, "step": str(loaded.step)}
    result = Result(values, protocol, about, within=within)
    result = dataclasses.replace(result, seconds=time.monotonic() - began)
    out = out or run / "likelihood.json"
    if jax.process_index() == 0:
        result.save(out)
        print(f"written to {out}")
    show({str(run): result})


def _unigram(loaded: Any, source: Any, model: Any) -> Any:
    """Bits per image of tokens, or bits, by themselves, as often as the run's training data have them; None where these
    are unknown.
    """
    from gen.autoregressive.likelihood import coin_bits, unigram_bits

    data = loaded.config.stages[-1].data if loaded.config.stages else None
    if data is None or not (Path(getattr(data, "path", "")) / "cache.json").exists():
        return None
    trained, heldout = (held.rows.arrays[model.kind] for held in (data.source(), source))
    return coin_bits(trained, heldout) if model.kind == "bits" else unigram_bits(trained, heldout, model.vocabulary)
