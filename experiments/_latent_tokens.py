"""What the experiments with models of continuous tokens share."""

from typing import Any

from gen.autoregressive.train_latents import LatentTokenTask
from gen.experiments import Recipe
from gen.experiments._latents import latents
from gen.runs import Loaded
from gen.tokenizers.encode import expect_maker
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["latent_token_recipe"]


def latent_token_recipe(
    name: str,
    model: Any,
    data: str,
    tokenizer: Loaded | None,
    *,
    sampler: Any,
    steps: int,
    batch: int,
    optim: OptimConfig,
    emas: tuple[Any, ...] = (),
    smoke: bool = False,
) -> Recipe:
    """A model of the latents at `data` as continuous tokens.

    Args:
      data: see `gen.experiments._latents.latents`.
      tokenizer: decodes previews and samples; without it the run generates latents.
      smoke: log and checkpoint as a run of minutes does.
    """
    beside = {name: condition.shape for name, condition in model.conditions.items()}
    found, origins = latents(data, latent=tuple(model.shape), **beside), {}
    decoder: dict[str, Any] = {"normalizer": found.normalizer()}
    if tokenizer is not None:
        expect_maker(found, tokenizer.tokenizer, tokenizer.params["tokenizer"])
        decoder["tokenizer"], origins["tokenizer"] = tokenizer.params["tokenizer"], tokenizer.origin
    usual = EngineConfig(checkpoint_every=10_000, keep_every=100_000, log_every=100, preview_every=10_000)
    task = LatentTokenTask(model, optim=optim, emas=emas)
    config = RunConfig(
        name,
        (Stage("tokens", task, steps, batch, found),),
        origins,
        sampler,
        None if tokenizer is None else tokenizer.tokenizer,
        engine=EngineConfig(checkpoint_every=100, log_every=20) if smoke else usual,
    )
    return Recipe(config, artifacts=decoder)
