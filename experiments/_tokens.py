"""What the experiments of token models share: data, the checks that tokens are the model's, previews, engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen.autoregressive.base import TokenModel
from gen.autoregressive.train import TokenTask
from gen.data.caches import BitCache, TokenCache
from gen.data.loader import expect
from gen.data.random import RANDOM, Random
from gen.errors import GenError
from gen.experiments import Recipe
from gen.nn.conditions import Conditions
from gen.runs import Loaded
from gen.tokenizers.encode import expect_maker
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["SMOKE_EMA", "adamw", "cache_of", "classes_of", "smoke_optim", "token_data", "token_recipe"]

SMOKE_EMA = (Constant(0.99, warmup=True),)


def adamw(lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.95), decay: float = 0.05, **changes: Any) -> Any:
    """AdamW with the weight decay of these papers; `changes` as in `gen.training.optim.OptimConfig`."""
    return OptimConfig(lr, betas=betas, weight_decay=decay, clip=1.0, **changes)


def smoke_optim(lr: float = 2e-3) -> OptimConfig:
    """The optimiser of smoke runs."""
    return OptimConfig(lr, betas=(0.9, 0.95), weight_decay=0.05, schedule="cosine", warmup=40, final=0.02, clip=1.0)


def cache_of(path: str, kind: str = "tokens") -> Any:
    """The cache at `path`. Raises GenError where it is none of this kind, or of another one."""
    cache: Any = TokenCache(path) if kind == "tokens" else BitCache(path)
    cache.source()
    return cache


def classes_of(cache: Any) -> int:
    """Gives the number of classes of a cache's labels; 0 where it has none."""
    source = cache.source()
    return 0 if source.label is None else source.num_classes or int(source.label.max()) + 1


def token_data(path: str, model: TokenModel) -> Any:
    """The data at `path` for a model: its cache of tokens or bits, or random ones (``random``).

    Raises GenError for tokens of another shape or vocabulary, and for a cache without the model's conditions.
    """
    wanted = dict(_shapes(model.conditions))
    if path == RANDOM:
        return Random({model.kind: tuple(model.shape), **wanted})
    if not (Path(path) / "cache.json").exists():
        raise GenError(
            f"{path} is no cache of {model.kind}; encode the images first: gen encode TOKENIZER --data IMAGES --out "
            "CACHE, then --data CACHE"
        )
    cache = cache_of(path, model.kind)
    model.check_tokens(path, model.kind, cache.shape, getattr(cache, "vocabulary", None), None)
    expect(path, cache.source(), **wanted)
    masks = [c.mask for c in model.conditions.values() if c.mask]
    for mask in masks:  # a source takes features without a mask for whole ones
        if not (Path(path) / f"{mask}.npy").exists():
            raise GenError(f"{path} has no {mask}.npy, which says where its captions end; encode them with their mask")
    return cache


def _shapes(conditions: Conditions) -> Mapping[str, tuple[int, ...]]:
    masks = {c.mask: c.shape[:1] for c in conditions.values() if c.mask}
    return {name: c.shape for name, c in conditions.items()} | masks


def token_recipe(
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
    reads_codes: bool = False,
    smoke: bool = False,
    engine: EngineConfig | None = None,
) -> Recipe:
    """A token model on the tokens at `data`.

    Args:
      model: a `gen.autoregressive.base.TokenModel`.
      data: see `token_data`.
      tokenizer: decodes previews and samples; without it the run draws tokens.
      sampler: how the model is sampled.
      reads_codes: whether training needs the tokenizer's arrays too, as the frozen role ``tokenizer``.
      smoke: log and checkpoint as a run of minutes does.

    Raises GenError for tokens that are not the model's, or not the tokenizer's.
    """
    found = token_data(data, model)
    artifacts: dict[str, Any] = {}
    origins = {}
    if tokenizer is not None:
        spec = tokenizer.tokenizer.spec
        model.check_tokens(str(tokenizer.path), spec.kind, spec.shape, spec.vocabulary, spec.scales)
        expect_maker(found, tokenizer.tokenizer, tokenizer.params["tokenizer"])
        artifacts["tokenizer"] = tokenizer.params["tokenizer"]
        origins["tokenizer"] = tokenizer.origin
    elif reads_codes:
        raise GenError(f"preset '{name}' reads the tokenizer's codes while it trains; add --tokenizer RUN")
    usual = EngineConfig(checkpoint_every=10_000, keep_every=100_000, log_every=100, preview_every=10_000)
    engine = engine or (EngineConfig(checkpoint_every=100, log_every=20) if smoke else usual)
    task = TokenTask(model, optim=optim, emas=emas)
    config = RunConfig(
        name,
        (Stage("teacher", task, steps, batch, found),),
        origins,
        sampler,
        None if tokenizer is None else tokenizer.tokenizer,
        engine=engine,
    )
    return Recipe(config, artifacts if reads_codes else {}, artifacts)
