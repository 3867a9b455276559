"""Pictures and a random network for the comparisons with other people's tools; ``make test-peers`` runs them.

Elsewhere, where those tools are not installed, nothing here is collected. GEN_PICTURES names an image folder or zip to
be used in place of scikit-image's sample pictures.
"""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

NEEDED = ("torch", "cleanfid", "pytorch_fid", "torch_fidelity", "prdc", "skimage")
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = ["test_*.py"]
else:
    from gen.features.inception import Inception
    from gen.metrics.cleanfid import require

    require(Inception())  # torchvision beside a CPU build of torch, before a test imports it

COUNT, SIZE = 16, (72, 96)  # pictures a side; height and width
AGREED: list[tuple[str, float, float]] = []  # what was compared: its name, our value, theirs


def agree(what, ours, theirs, rel=1e-4):
    """Asserts that two values are equal, and keeps them for the table at the end."""
    AGREED.append((what, float(ours), float(theirs)))
    assert ours == pytest.approx(theirs, rel=rel), what


def pytest_terminal_summary(terminalreporter):
    """The table of what was compared."""
    if AGREED:
        terminalreporter.section("ours, theirs, relative difference")
    for what, ours, theirs in AGREED:
        difference = abs(ours - theirs) / max(abs(theirs), 1e-30)
        terminalreporter.line(f"{what:50}{ours:14.7g}{theirs:14.7g}{difference:11.1e}")


def _crops(rng):
    """Random cuts of photographs, (COUNT, *SIZE, 3) uint8."""
    if "GEN_PICTURES" in os.environ:
        from gen.data.stores import open_store

        store = open_store(os.environ["GEN_PICTURES"])
        photos = [np.asarray(store.image(int(i), 3)) for i in rng.choice(len(store), COUNT, replace=len(store) < COUNT)]
    else:
        from skimage import data

        photos = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.hubble_deep_field()]
    cuts = []
    for i in range(COUNT):
        photo = photos[i % len(photos)]
        top, left = (int(rng.integers(max(1, n - m))) for n, m in zip(photo.shape, SIZE, strict=False))
        cut = photo[top : top + SIZE[0], left : left + SIZE[1]]
        cuts.append(np.pad(cut, [(0, n - m) for n, m in zip((*SIZE, 3), cut.shape, strict=True)], mode="wrap"))
    return np.stack(cuts)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two folders of PNG files: samples, which are noisy, and real pictures."""
    from PIL import Image

    rng = np.random.default_rng(0)
    real, fake = _crops(rng), _crops(rng)
    fake = np.clip(fake * 0.6 + rng.normal(0, 40, fake.shape), 0, 255).astype(np.uint8)
    found = []
    for name, images in (("fake", fake), ("real", real)):
        folder = tmp_path_factory.mktemp(name)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{i:04d}.png")
        found.append(folder)
    return tuple(found)


def draw_weights(classes):
    """Random weights under the names of the .pth file, scaled so that activations neither grow nor die."""
    from gen.features.inception import conv_shapes

    rng = np.random.default_rng(1)
    weights = {
        "fc.weight": rng.standard_normal((classes, 2048)) / 45,
        "fc.bias": rng.standard_normal(classes) / 2,
    }
    for layer, (channels, out, height, width) in conv_shapes().items():
        path = layer.replace("/", ".")
        scale = np.sqrt(2 / (channels * height * width))
        weights[f"{path}.conv.weight"] = rng.standard_normal((out, channels, height, width)) * scale
        weights |= {f"{path}.bn.bias": rng.standard_normal(out) / 10, f"{path}.bn.weight": np.ones(out)}
        weights |= {f"{path}.bn.running_mean": rng.standard_normal(out) / 10}
        weights |= {f"{path}.bn.running_var": 0.5 + rng.random(out)}
    return {name: array.astype(np.float32) for name, array in weights.items()}


@pytest.fixture(scope="session")
def official():
    """Those of FID's network."""
    return draw_weights(1008)


@pytest.fixture(scope="session")
def pth(official, tmp_path_factory) -> Path:
    """The file as the field publishes it."""
    import torch

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({name: torch.from_numpy(array) for name, array in official.items()}, path)
    return path


@pytest.fixture(scope="session")
def cache(pth, tmp_path_factory):
    """A cache that holds our conversion of the file, as ``gen convert inception FILE`` makes it."""
    from gen.pretrained.features import convert_network

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        convert_network("inception", pth)
    return folder


@pytest.fixture
def installed(cache, monkeypatch):
    """That cache in use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(scope="session")
def scores(cache, folders):
    """Our results by mode, of the two folders: what ``gen evaluate`` computes."""
    from gen.data.stores import open_store
    from gen.features.inception import RESIZES, Inception
    from gen.metrics.evaluate import Settings, evaluate
    from gen.metrics.reference import make_reference
    from gen.metrics.sources import from_store

    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        for mode in RESIZES:
            network = Inception(mode)
            fake, real = (from_store(open_store(folder), network) for folder in folders)
            reference = make_reference("pictures", real, network, batch=8)
            results[mode] = evaluate(fake, reference, network, Settings(extra=("kid",)), batch=8).values
    return results
