"""Reflow: straight paths from a teacher's pairs, once or in rounds (arXiv 2209.03003; 2-rectified flow++, 2405.20320).

Data: pairs of noise and sample of the teacher (``gen distill PRESET --teacher RUN --pairs N``). The student is a flow
on the teacher's network and weights: one Euler step makes an image, more steps better ones. The rounds of k-rectified
flow are one resumable plan, in which each flow makes the pairs of the next::

    python -m gen.experiments.rectified_flow runs/demo/teacher --rounds 2

Expected (2-rectified flow++, FID-50k, 1 and 2 calls; tables of the paper as a summary quotes them): CIFAR-10 12.21 with
1 for plain reflow, 7.14 and 3.61 from EDM's weights with squared errors, 3.38 and 2.76 with all of the recipe
(`rfpp_cifar10`); AFHQ-64 4.11 and 3.12; FFHQ-64 5.65 and 4.41 (5.21 and 4.26 without the division by t); ImageNet-64
4.31 and 3.64 (`rfpp_imagenet64`). Not reproduced here yet. On the digits teacher of the demo: see docs/distillers.md.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from gen.diffusion.conversions import rectified
from gen.distill.rectified_flow import ReflowTask, UShaped, straightness
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._students import student_data, student_recipe
from gen.experiments._tokenizers import perceptual
from gen.files import read_json
from gen.metrics.report import Report
from gen.plan import Made, Plan
from gen.runs import Loaded, load
from gen.sampling.generator import Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import ClassifierFree
from gen.sampling.records import Inverted, Records, make_records
from gen.sampling.solvers import Euler, Heun
from gen.sampling.student_solvers import Anchored
from gen.steps import MakeRecords, Train
from gen.tokenizers.losses import frozen_terms
from gen.training.ema import Constant
from gen.training.method import signed
from gen.training.optim import OptimConfig
from gen.training.program import enable_compile_cache
from gen.training.run import EngineConfig
from gen.training.task import Stage

__all__ = ["PRESETS", "plan", "run"]

PATHS = Sampler(Heun(), Uniform(), 12, ClassifierFree(1.0))  # by which a flow makes the pairs of the next
PICTURED = 16


def _sampler(steps: int) -> Sampler:
    return Sampler(Euler(), Uniform(), steps, ClassifierFree(1.0))


def _reflow(
    name: str,
    teacher: Loaded,
    data: Any,
    *,
    updates: int,
    batch: int,
    calls: int = 1,
    law: Any = None,
    distance: Any = "squared",
) -> Recipe:
    optim = OptimConfig(2e-3, betas=(0.9, 0.99), schedule="cosine", warmup=20, final=0.02, clip=1.0)
    averages = (Constant(0.99, warmup=True),)
    settings = {} if law is None else {"law": law}
    task = ReflowTask(teacher=teacher.denoiser, distance=distance, optim=optim, emas=averages, **settings)
    return student_recipe(name, teacher, (Stage("reflow", task, updates, batch, data),), sampler=_sampler(calls))


def reflow(teacher: Loaded, data: str, calls: int = 1, *, updates: int = 6000, batch: int = 128) -> Recipe:
    """Any teacher: one round of reflow, two minutes on a laptop for the demo's (data: pairs of the teacher)."""
    return _reflow("reflow", teacher, student_data(data, teacher), calls=calls, updates=updates, batch=batch)


def rfpp(teacher: Loaded, data: str, calls: int = 1, *, updates: int = 6000, batch: int = 128) -> Recipe:
    """Any teacher: reflow with U-shaped times and pseudo-Huber distances (data: pairs of the teacher)."""
    found = student_data(data, teacher)
    return _reflow("rfpp", teacher, found, calls=calls, updates=updates, batch=batch, law=UShaped(), distance="huber")


def _images(
    name: str, teacher: Loaded, data: str, *, lr: float, warmup: int, batch: int, updates: int, over_time: bool
) -> Recipe:
    """The whole recipe, on images, with LPIPS where its weights are on this machine."""
    terms = perceptual(1.0)
    frozen, origins = frozen_terms(terms)
    task = ReflowTask(
        teacher=teacher.denoiser,
        law=UShaped(),
        distance="huber",
        perceptual=next(iter(terms), None),
        over_time=over_time,
        optim=OptimConfig(lr, warmup=warmup),
        emas=(Constant(0.9999),),
    )
    further = {role: (origins[role], arrays) for role, arrays in frozen.items()}
    stage = Stage("reflow", task, updates, batch, student_data(data, teacher))
    engine = EngineConfig(checkpoint_every=2000, log_every=100, preview_every=10_000)
    sampler = Sampler(Anchored(), Uniform(), 2, ClassifierFree(1.0))
    return student_recipe(name, teacher, (stage,), sampler=sampler, frozen=further, engine=engine)


def rfpp_cifar10(teacher: Loaded, data: str) -> Recipe:
    """2-rectified flow++ on CIFAR-10, the paper's 800k steps (teacher: EDM's NCSN++; data: 1M pairs of it)."""
    return _images("rfpp-cifar10", teacher, data, lr=2e-4, warmup=5000, batch=512, updates=800_000, over_time=True)


def rfpp_imagenet64(teacher: Loaded, data: str) -> Recipe:
    """2-rectified flow++ on ImageNet-64, the paper's 700k steps (teacher: EDM's ADM; data: 5M pairs of it)."""
    return _images("rfpp-imagenet64", teacher, data, lr=1e-4, warmup=2500, batch=2048, updates=700_000, over_time=False)


def rfpp_cifar10_gpu(teacher: Loaded, data: str) -> Recipe:
    """2-rectified flow++ on CIFAR-10, 10k steps of 256 on one GPU (teacher: EDM's NCSN++; data: 200k pairs of it)."""
    return _images("rfpp-cifar10-gpu", teacher, data, lr=2e-4, warmup=500, batch=256, updates=10_000, over_time=True)


def reflow_smoke(teacher: Loaded, data: str) -> Recipe:
    """Any teacher: reflow for a few steps, which checks the path and not the quality (data: pairs)."""
    return reflow(teacher, data, updates=20, batch=32)


PRESETS = {
    "reflow": reflow,
    "rfpp": rfpp,
    "rfpp-cifar10": rfpp_cifar10,
    "rfpp-imagenet64": rfpp_imagenet64,
    "rfpp-cifar10-gpu": rfpp_cifar10_gpu,
    "reflow-smoke": reflow_smoke,
}


@dataclasses.dataclass(frozen=True)
class InvertData:
    """A step of a plan: the noise from which the teacher's flow comes to its own training data (`Inverted`).

    Attributes:
      name: of the step.
      teacher: the step, or given run, that is inverted; the data are those of its last stage.
      count: how many rows, as the first batch of a shuffled epoch has them.
      about: what it is for, in a line; printed when it begins.
    """

    name: str
    teacher: str
    count: int
    about: str = ""

    @property
    def takes(self) -> Mapping[str, str]:
        """Does what `gen.plan.Step.takes` says."""
        return {"teacher": self.teacher}

    def settings(self, given: Mapping[str, Any]) -> Any:
        """Gives the number of rows, and what the data are."""
        data = given["teacher"].config.stages[-1].data
        return {"count": self.count, "data": data.identity(), "make": Inverted(given["teacher"].denoiser).identity}

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """Does what `gen.plan.Step.run` says."""
        teacher = given["teacher"]
        stage = teacher.config.stages[-1]
        rows = next(stage.data.batches(batch=self.count, seed=0, start=0))
        latent = np.asarray(signed(rows["image"])) if "image" in rows and "latent" not in rows else rows["latent"]
        beside = {name: rows[name] for name in teacher.denoiser.network.conditions}
        make_records(
            Inverted(teacher.denoiser),
            teacher.params,
            out,
            count=len(latent),
            maker=teacher.origin,
            cond={"latent": latent, **beside},
            label=self.name,
        )

    def open(self, out: Path) -> Records:
        """Gives the records, for students of this teacher."""
        return Records(str(out), str(read_json(out / "records.json")["maker"]))


def plan(
    outdir: str | Path,
    teacher: Loaded,
    *,
    rounds: int = 2,
    pairs: int = 8192,
    updates: int = 3000,
    batch: int = 128,
    real: int = 0,
) -> Plan:
    """Rounds of reflow: the teacher makes pairs, a flow learns them, that flow makes the next pairs, and so on.

    Args:
      outdir: gets pairs-1/, flow-1/, pairs-2/ ... and report.html.
      teacher: what makes the first pairs, by its own sampler.
      rounds: how many flows are trained.
      pairs: rows of each round's records.
      updates, batch: of each round's training.
      real: rows of the teacher's training data, inverted by the teacher, on which the last flow trains on for a tenth
        of the updates (the paper's last step, on 50,000 images); 0 for none. They bring detail that no sample has.

    Raises GenError for no rounds.
    """
    if rounds < 1:
        raise GenError(f"{rounds} rounds of reflow; expected at least 1")

    def train(name: str, teacher: Loaded, pairs: Records) -> Recipe:
        return _reflow(name, teacher, pairs, updates=updates, batch=batch)

    steps: list[Any] = []
    before = "teacher"
    for k in range(1, rounds + 1):
        own = None if before == "teacher" else PATHS
        about = "noise and what the flow before makes of it"
        steps += [
            MakeRecords(f"pairs-{k}", before, pairs, sampler=own, about=about),
            Train(
                f"flow-{k}",
                functools.partial(train, f"reflow-{k}"),
                {"teacher": before, "pairs": f"pairs-{k}"},
                about="straight paths between them",
            ),
        ]
        before = f"flow-{k}"
    if real:
        steps += [
            InvertData("real-pairs", "teacher", real, about="training data and the noise that leads to them"),
            Train(
                "flow-real",
                functools.partial(_tuned, max(updates // 10, 1), batch),
                {"teacher": "teacher", "flow": before, "pairs": "real-pairs"},
                about="the last flow, trained on on those",
            ),
        ]
    return Plan(
        outdir,
        tuple(steps),
        {"teacher": teacher},
        functools.partial(_page, tuple(s.name for s in steps if isinstance(s, Train))),
    )


def _tuned(updates: int, batch: int, teacher: Loaded, flow: Loaded, pairs: Records) -> Recipe:
    """A flow trained on, on pairs of the teacher."""
    recipe = _reflow("reflow-real", teacher, pairs, updates=updates, batch=batch)
    config = dataclasses.replace(recipe.config, frozen=recipe.config.frozen | {"start": flow.origin})
    return dataclasses.replace(recipe, config=config, frozen={**recipe.frozen, "start": flow.params["net"]})


def run(teacher: str | Path, outdir: str | Path = "runs/reflow", **settings: int) -> Made:
    """Carries out the `plan` of a teacher's run; the same call again goes on where it was."""
    enable_compile_cache()
    return plan(outdir, load(teacher), **settings).run()


def curvature(flow: Loaded, seeds: Sequence[int]) -> float:
    """Gives how far a model's paths are from straight lines (`straightness`), mean over seeds; 0 for straight ones.

    The paths are those of its latents on the linear process, without guidance.
    """
    import jax

    from gen.nn.conditions import make_conditions
    from gen.sampling.noise import prior
    from gen.training.indexed import sample_keys

    denoiser = rectified(flow.denoiser)
    keys = sample_keys(0, np.asarray(seeds, np.int32))
    cond = make_conditions(denoiser.network.conditions, seeds)
    grid = PATHS.times(denoiser.process)

    @jax.jit
    def measured(params: Any) -> jax.Array:
        start = prior(grid, keys, denoiser.network.shape)
        path = PATHS(denoiser, params, keys, denoiser.network.shape, cond, trajectory=True)
        return straightness(jax.numpy.concatenate([start[None], path]), grid.times).mean()

    return float(measured(flow.params["net"]))


def _page(flows: tuple[str, ...], made: Made) -> Report:
    """Every flow at few steps from the same noise, and how straight its paths are."""
    names = ["teacher", *flows]
    seeds = range(PICTURED)
    page = Report("Rounds of reflow", f"{len(flows)} flows, each trained on pairs of the one before.")
    page.section("Straightness", "Mean squared distance of the velocity from the straight line of its path.")
    page.table(["model", "distance from straight"], [[name, curvature(made[name], seeds)] for name in names])
    page.section("The same noise through every flow")
    rows = {f"{name}, its own sampler": made[name].sample(seeds) for name in names}
    for steps in (2, 4):
        rows |= {f"{name}, {steps} steps": made[name].sample(seeds, steps=steps, solver=Euler()) for name in names}
    return page.pictures(rows, columns=PICTURED)


def main(
    teacher: Annotated[Path, tyro.conf.Positional],
    /,
    outdir: Path = Path("runs/reflow"),
    rounds: int = 2,
    pairs: int = 8192,
    updates: int = 3000,
    real: int = 0,
) -> None:
    """Trains ROUNDS rectified flows, the first on pairs of TEACHER (a run folder), the last on REAL inverted rows."""
    try:
        run(teacher, outdir, rounds=rounds, pairs=pairs, updates=updates, real=real)
    except GenError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"open {outdir / 'report.html'}")


if __name__ == "__main__":
    tyro.cli(main)
