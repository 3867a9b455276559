"""Distilled Decoding 1 and 2: an autoregressive teacher in one or two calls (arXiv 2412.17153, arXiv 2510.21003).

Data are records of the teacher: noise and the tokens that its probabilities make of it (``--pairs N``), drawn with the
teacher's own guidance and filters; no real images are needed. The authors' trainer is not public: settings of the paper
preset are of common use, and the loss of the vectors is a squared error where theirs looks at decoded images.

Expected (ImageNet-256, FID of 50k random classes against the authors' statistics; official README):

| | one call | two calls | of the teacher |
|---|---|---|---|
| LlamaGen-B | 15.50 | 11.17 (80 tokens kept) | - |
| LlamaGen-L | 11.35 | 7.58 (80 tokens kept, codes up to 130) | 4.11 |
| VAR-d16 | 9.94 | 7.82 (5 maps kept) | 4.19 |
| VAR-d20 | 9.55 | 7.33 (4 maps kept) | 3.40 |
| VAR-d24 | 8.92 | 6.95 (4 maps kept) | - |

Distilled Decoding 2 has 5.43 with one call of VAR (teacher 3.40) and 7.58 of LlamaGen (4.11; abstract of its paper, of
which no more is public): ``distilled-decoding-2`` begins as a one-call student of the first kind. Not reproduced here
yet. On digits: see docs/distillers.md.
"""

import dataclasses
from typing import Any

from gen.autoregressive.gpt import GPTConfig
from gen.autoregressive.maskgit import MaskGITConfig, MaskGITSkipConfig
from gen.autoregressive.var import VARConfig
from gen.data.loader import expect
from gen.data.random import RANDOM, Random
from gen.distill.conditional_score import ConditionalScoreTask
from gen.distill.distilled_decoding import DistilledDecodingTask
from gen.distill.gpt_student import GPTStudentConfig
from gen.distill.maskgit_student import MaskGITStudentConfig
from gen.distill.noise_decoder import NoiseDecoding
from gen.distill.var_student import VARStudentConfig
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._students import student_recipe
from gen.runs import Loaded
from gen.sampling.records import Records
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig
from gen.training.task import Stage

__all__ = ["PRESETS", "decoder_of", "student_of"]


Writer = GPTConfig | VARConfig | MaskGITConfig | MaskGITSkipConfig


def decoder_of(teacher: Loaded) -> Writer:
    """Gives the teacher's model. Raises GenError for another than LlamaGen's, VAR's or MaskGIT's."""
    model = teacher.generator.subject
    if not isinstance(model, Writer):
        raise GenError(
            f"{teacher.path} is a {type(model).__name__}; distilled decoding takes a LlamaGen, a VAR or a MaskGIT: "
            "give its run"
        )
    return model


def student_of(teacher: Loaded) -> GPTStudentConfig | VARStudentConfig | MaskGITStudentConfig:
    """Gives the student's network for a teacher that `decoder_of` takes."""
    model = decoder_of(teacher)
    if isinstance(model, VARConfig):
        return VARStudentConfig(model)
    width = teacher.tokenizer.spec.width
    return GPTStudentConfig(model, width) if isinstance(model, GPTConfig) else MaskGITStudentConfig(model, width)


def _calls(model: Writer) -> tuple[tuple[int, ...], int]:
    """How many tokens each call keeps, and up to where codes are taken.

    A second call keeps the coarser half of a VAR's maps, or a quarter of a LlamaGen's tokens. A MaskGIT has no first
    tokens that the others follow from: its student makes one call.
    """
    match model:
        case VARConfig():
            kept = sum(model.groups[: len(model.groups) // 2])
            return (0, kept), kept
        case GPTConfig():
            return (0, model.length // 4), model.length // 2
        case _:
            return (0,), model.length


def _recipe(
    name: str,
    teacher: Loaded,
    data: str,
    starts: tuple[int, ...],
    split: int,
    *,
    steps: int,
    batch: int,
    engine: EngineConfig | None = None,
    **settings: Any,
) -> Recipe:
    task = DistilledDecodingTask(**_shared(teacher), starts=starts, **settings)
    stages = (Stage("regression", task, steps, batch, _records(teacher, data)),)
    return _student(name, teacher, stages, NoiseDecoding(starts, split), engine)


def _shared(teacher: Loaded) -> dict[str, Any]:
    """The settings of a task that are the teacher's."""
    return {"teacher": decoder_of(teacher), "tokenizer": teacher.tokenizer, "student": student_of(teacher)}


def _records(teacher: Loaded, data: str) -> Any:
    """Noise and tokens of the teacher."""
    model, student = decoder_of(teacher), student_of(teacher)
    random = Random({"noise": student.shape, "tokens": tuple(model.shape), "label": ()})
    records = random if data == RANDOM else Records(data, teacher.origin)
    expect(data, records.source(), noise=student.shape, tokens=tuple(model.shape))
    return records


def _student(
    name: str, teacher: Loaded, stages: tuple[Stage, ...], sampler: NoiseDecoding, engine: EngineConfig | None
) -> Recipe:
    codes = {"tokenizer": (teacher.origin, teacher.params["tokenizer"])}
    return student_recipe(name, teacher, stages, sampler=sampler, frozen=codes, engine=engine)


def distilled_decoding(teacher: Loaded, data: str, *, updates: int = 3000, batch: int = 128) -> Recipe:
    """Any LlamaGen or VAR in two calls, any MaskGIT in one, minutes on a laptop for digits (data: its records)."""
    starts, split = _calls(decoder_of(teacher))
    optim = OptimConfig(2e-3, betas=(0.9, 0.99), schedule="cosine", warmup=50, final=0.01, clip=1.0)
    return _recipe(
        "distilled-decoding",
        teacher,
        data,
        starts,
        split,
        steps=updates,
        batch=batch,
        optim=optim,
        emas=(Constant(0.99, warmup=True),),
    )


def distilled_decoding_2(
    teacher: Loaded, data: str, *, regression: int = 1500, updates: int = 2000, batch: int = 128
) -> Recipe:
    """Any LlamaGen or VAR: Distilled Decoding 2 in one call, minutes on a laptop for digits (data: its records)."""
    optim = OptimConfig(2e-3, betas=(0.9, 0.99), schedule="cosine", warmup=50, final=0.05, clip=1.0)
    first = DistilledDecodingTask(**_shared(teacher), optim=optim, emas=(Constant(0.99, warmup=True),))
    falling = OptimConfig(2e-4, betas=(0.0, 0.99), schedule="cosine", warmup=20, final=0.05, clip=1.0)
    second = ConditionalScoreTask(
        **_shared(teacher),
        sampler=teacher.config.sampler,
        head_width=128,
        head_depth=2,
        ratio=2,
        aligned=updates // 4,
        optim=falling,
        fake_optim=dataclasses.replace(falling, lr=1e-3),
        emas=(Constant(0.98, warmup=True),),
    )
    records = _records(teacher, data)
    stages = (
        Stage("regression", first, regression, batch, records),
        Stage("matching", second, updates, batch, records),
    )
    return _student("distilled-decoding-2", teacher, stages, NoiseDecoding(), None)


def distilled_decoding_imagenet(teacher: Loaded, data: str) -> Recipe:
    """Distilled Decoding on ImageNet-256 in two calls, 80 tokens kept (teacher: LlamaGen-L; data: 1M records)."""
    optim = OptimConfig(1e-4, betas=(0.9, 0.95), warmup=1000, clip=1.0)
    engine = EngineConfig(checkpoint_every=5000, log_every=100)
    return _recipe(
        "distilled-decoding-imagenet",
        teacher,
        data,
        (0, 80),
        130,
        steps=200_000,
        batch=512,
        engine=engine,
        optim=optim,
        emas=(Constant(0.9999),),
    )


def distilled_decoding_var(teacher: Loaded, data: str) -> Recipe:
    """Distilled Decoding on ImageNet-256 in two calls, 5 maps kept (teacher: VAR-d16; data: 1M records)."""
    kept = sum(decoder_of(teacher).groups[:5])
    optim = OptimConfig(1e-4, betas=(0.9, 0.95), warmup=1000, clip=1.0)
    engine = EngineConfig(checkpoint_every=5000, log_every=100)
    return _recipe(
        "distilled-decoding-var",
        teacher,
        data,
        (0, kept),
        kept,
        steps=200_000,
        batch=512,
        engine=engine,
        optim=optim,
        emas=(Constant(0.9999),),
    )


def distilled_decoding_smoke(teacher: Loaded, data: str) -> Recipe:
    """Any LlamaGen, VAR or MaskGIT: Distilled Decoding for a few steps, which checks the path and not the quality."""
    return distilled_decoding(teacher, data, updates=20, batch=32)


PRESETS = {
    "distilled-decoding": distilled_decoding,
    "distilled-decoding-imagenet": distilled_decoding_imagenet,
    "distilled-decoding-var": distilled_decoding_var,
    "distilled-decoding-2": distilled_decoding_2,
    "distilled-decoding-smoke": distilled_decoding_smoke,
}
