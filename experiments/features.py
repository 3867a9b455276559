"""Diffusion features for classification: heads on a frozen denoiser's blocks (Mukhopadhyay et al. 2023).

arXiv 2307.08702, 2311.17921. Paper's backbone: the unconditional ADM of ImageNet-256; block 24 of 37 (the fifth of the
decoder, ``out.4`` of its kind) at step 150 of 1000 is the best, little noise and the middle of the decoder. Heads: a
linear one on 2 x 2 pooled cells, and a transformer of two blocks on 16 x 16. SGD in the official code, 28 epochs; here
AdamW. `table` probes every block at every noise level on cached features, beside raw pixels and the zero-shot diffusion
classifier.

Expected (ImageNet-1k, frozen backbone, top-1; public summary): 71.89 % with the attention head. Not reproduced here
yet.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.arrays import digest
from gen.config import fingerprint
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._students import student_data
from gen.files import read_json, write_json
from gen.finetune.probe_task import ProbeTask, attention_head, feature_shapes, unlabelled
from gen.finetune.probes import (
    Fit,
    LinearHead,
    accuracy,
    class_losses,
    fit_head,
    flattened,
    noisy_features,
    pooled,
)
from gen.runs import Loaded
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["PRESETS", "inputs", "table", "zero_shot"]

TIMES = (0.1, 0.25, 0.5)


def inputs(loaded: Loaded, images: np.ndarray) -> np.ndarray:
    """Gives images (N, H, W, C) uint8 as the model takes them: in [-1, 1], or encoded and on its latents' scale.

    Raises GenError for images of another size.
    """
    shape = loaded.generator.shape
    if tuple(images.shape[1:]) != tuple(shape):
        raise GenError(f"the images are {tuple(images.shape[1:])}, and {loaded.path} takes {tuple(shape)}; resize them")
    if "tokenizer" not in loaded.params:
        return images.astype(np.float32) / 127.5 - 1.0
    latents = loaded.encode(images)
    if "normalizer" not in loaded.params:
        return latents
    shift, scale = (np.asarray(loaded.params["normalizer"][name]) for name in ("shift", "scale"))
    return (latents - shift) / scale


def cached(
    loaded: Loaded,
    x: np.ndarray,
    times: Sequence[float],
    taps: tuple[str, ...],
    side: int,
    folder: Path,
    batch: int = 256,
) -> dict[str, np.ndarray]:
    """Gives pooled features of x (N, *shape) by ``<t>/<tap>``; read from the folder where they were made before.

    The noise of an image is the same whenever it is asked for.
    """
    name = f"features-{fingerprint([loaded.origin, digest({'x': x}), list(times), list(taps), side])}.npz"
    if (folder / name).exists():
        with np.load(folder / name) as held:
            return {key: held[key] for key in held.files}
    denoiser, params = loaded.denoiser, loaded.params["net"]

    @jax.jit
    def look(params: Any, x: jax.Array, keys: jax.Array, t: jax.Array) -> dict[str, jax.Array]:
        eps = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
        found = noisy_features(denoiser, params, x, t, eps, unlabelled(denoiser, params, len(x)), taps)
        return {tap: pooled(feature, side) for tap, feature in found.items()}

    rows: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(x), batch):
        part = jnp.asarray(x[start : start + batch])
        for t in times:
            keys = jax.vmap(lambda i, t=t: jax.random.fold_in(jax.random.key(0), i))(start + jnp.arange(len(part)))
            for tap, feature in look(params, part, keys, jnp.float32(t)).items():
                rows.setdefault(f"{t:g}/{tap}", []).append(np.asarray(feature))
    made = {key: np.concatenate(parts) for key, parts in rows.items()}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / name, **made)
    return made


def probed(train: np.ndarray, labels: np.ndarray, test: np.ndarray, answers: np.ndarray, fit: Fit) -> float:
    """Gives the accuracy on held-out rows of a linear probe; features are standardised by the training rows."""
    mean, spread = train.mean(0), train.std(0) + 1e-6
    known, held = ({"x": jnp.asarray((rows - mean) / spread)} for rows in (train, test))
    head = LinearHead(train.shape[1:], int(max(labels.max(), answers.max())) + 1, side=max(train.shape[1:]))
    return accuracy(head, fit_head(head, known, labels, fit), held, answers)


def zero_shot(loaded: Loaded, x: np.ndarray, labels: np.ndarray, *, draws: int = 32, batch: int = 256) -> float:
    """Gives the accuracy of the diffusion classifier, whose losses are means over `draws` times and noises.

    Raises GenError for a model without classes.
    """
    denoiser, params = loaded.denoiser, loaded.params["net"]
    classes = denoiser.network.num_classes
    if not classes:
        raise GenError(f"{loaded.path} has no classes to choose from; leave the zero-shot classifier out")

    @jax.jit
    def losses(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return class_losses(denoiser, params, x, denoiser.objective.draw(key, denoiser.process, x), classes)

    right = 0
    for start in range(0, len(x), batch):
        part = jnp.asarray(x[start : start + batch])
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), start), draws)
        total = sum(np.asarray(losses(params, part, key), np.float64) for key in keys)
        right += int((np.argmin(total, axis=1) == labels[start : start + batch]).sum())
    return right / len(x)


def table(
    loaded: Loaded,
    train: tuple[np.ndarray, np.ndarray],
    heldout: tuple[np.ndarray, np.ndarray],
    folder: Path,
    *,
    taps: tuple[str, ...] = (),
    times: tuple[float, ...] = TIMES,
    side: int = 2,
    fit: Fit = Fit(),
    seeds: int = 1,
) -> dict[str, tuple[float, ...]]:
    """Gives accuracies on held-out images by feature, one for each seed of the probe: every tap at every time,
    ``pixels`` and, of a model with classes, ``zero-shot`` (one number).

    Args:
      train, heldout: images (N, H, W, C) uint8 and labels (N,).
      folder: where features are kept, and table.json is written.
      taps: names of features; all by default. Raises GenError for one that the network has not.
    """
    taps = taps or tuple(loaded.denoiser.net.module(loaded.params["net"]).features())
    feature_shapes(loaded.denoiser, taps)
    x, y = inputs(loaded, train[0]), inputs(loaded, heldout[0])
    known, held = (cached(loaded, rows, times, taps, side, folder) for rows in (x, y))
    known["pixels"], held["pixels"] = (rows[0].astype(np.float32) / 127.5 - 1.0 for rows in (train, heldout))
    fits = [dataclasses.replace(fit, seed=seed) for seed in range(seeds)]
    found = {
        name: tuple(probed(_rows(known[name]), train[1], _rows(held[name]), heldout[1], one) for one in fits)
        for name in sorted(known)
    }
    if loaded.denoiser.network.num_classes:
        found["zero-shot"] = (zero_shot(loaded, y, heldout[1]),)
    write_json(folder / "table.json", {name: list(values) for name, values in found.items()})
    return {name: tuple(values) for name, values in read_json(folder / "table.json").items()}


def _rows(feature: np.ndarray) -> np.ndarray:
    rows = np.asarray(flattened(jnp.asarray(feature)))
    return rows[:, None]  # one place


def probe(
    name: str,
    teacher: Loaded,
    data: str,
    *,
    taps: tuple[str, ...],
    times: tuple[float, ...],
    head: Any,
    updates: int,
    batch: int,
) -> Recipe:
    """Gives the recipe of a head on the teacher's features, trained on labelled data with fresh noise."""
    source = student_data(data, teacher)
    optim = OptimConfig(3e-3, betas=(0.9, 0.99), schedule="cosine", warmup=20, final=0.01)
    task = ProbeTask(teacher=teacher.denoiser, head=head, taps=taps, times=times, optim=optim)
    stage = Stage("probe", task, updates, batch, source)
    engine = EngineConfig(checkpoint_every=500, log_every=50)
    config = RunConfig(name, (stage,), {"teacher": teacher.origin}, engine=engine)
    return Recipe(config, frozen={"teacher": teacher.params["net"]})


def _classes(teacher: Loaded, data: str) -> int:
    known: int | None = student_data(data, teacher).source().num_classes
    return known or teacher.denoiser.network.num_classes or 10


def features(teacher: Loaded, data: str, *, updates: int = 1500, batch: int = 128) -> Recipe:
    """Any denoiser: an attention head on its middle block at little noise, on a laptop (data: labelled)."""
    names = teacher.denoiser.net.module(teacher.params["net"]).features()
    taps, times = (names[len(names) // 2],), (0.1, 0.25)
    head = attention_head(teacher.denoiser, taps, len(times), _classes(teacher, data), width=64, heads=4, depth=1)
    return probe("features", teacher, data, taps=taps, times=times, head=head, updates=updates, batch=batch)


def features_smoke(teacher: Loaded, data: str) -> Recipe:
    """Any denoiser: a few steps of a head on its middle block, which check the path (data: labelled)."""
    return features(teacher, data, updates=20, batch=32)


def features_imagenet(teacher: Loaded, data: str, *, batch: int = 128, updates: int = 280_000) -> Recipe:
    """The paper's attention head on ImageNet, 28 epochs in batches of 128 on 4 GPUs (data: ImageNet images)."""
    names = teacher.denoiser.net.module(teacher.params["net"]).features()
    taps, times = (names[int(0.65 * len(names))],), (0.15,)
    head = attention_head(teacher.denoiser, taps, 1, _classes(teacher, data))
    return probe("features-imagenet", teacher, data, taps=taps, times=times, head=head, updates=updates, batch=batch)


def features_imagenet_gpu(teacher: Loaded, data: str) -> Recipe:
    """The same on one GPU, in batches of 32 (data: ImageNet images)."""
    return features_imagenet(teacher, data, batch=32, updates=1_120_000)


PRESETS = {
    "features": features,
    "features-smoke": features_smoke,
    "features-imagenet": features_imagenet,
    "features-imagenet-gpu": features_imagenet_gpu,
}
