"""Exports: the run's own samples from a program that needs jax alone, its page, and what is refused."""

import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from gen import cli
from gen.arrays import save
from gen.cli.export import handler
from gen.config import to_json
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.files import write_json
from gen.nn.network import Network
from gen.runs import load
from gen.sampling.generator import Sampler
from gen.sampling.solvers import Euler
from gen.training.run import RunConfig
from gen.training.task import Model

NET = DiTConfig((8, 8), 1, 4, 8, 1, 2, num_classes=3, remat="none", scan=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights, exported."""
    folder = tmp_path_factory.mktemp("export") / "run"
    config = RunConfig("toy", models={"net": Model(Denoiser(NET, Linear()))}, sampler=Sampler(Euler(), steps=5))
    write_json(folder / "config.json", to_json(config))
    leaves, tree = jax.tree.flatten(Network(NET).init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])
    save(folder / "artifacts" / "net.safetensors", params)
    assert cli.main(["export", str(folder), "--steps", "1", "--platforms", "cpu,tpu"]) == 0
    return folder


def test_same_samples_without_gen(run: Path, tmp_path: Path) -> None:
    code = "import sys, numpy as np, load; np.save(sys.argv[1], load.sample([3, 5, 8], [0, 2, 1]))\n"
    code += "assert not any(name.split('.')[0] == 'gen' for name in sys.modules)"
    out = tmp_path / "images.npy"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=run / "export", check=True, timeout=300)
    expected = load(run).sample([3, 5, 8], [0, 2, 1], steps=1)
    assert np.abs(np.load(out).astype(int) - expected.astype(int)).max() <= 1  # a tie of the rounding to 8 bits
    assert "| network calls | 1 |" in (run / "export" / "README.md").read_text()


def test_page(run: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(run / "export")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_address[1]}"
        assert 'max="2"' in urllib.request.urlopen(root).read().decode()
        picture = Image.open(BytesIO(urllib.request.urlopen(f"{root}/image?seed=3&label=0").read()))
        expected = load(run).sample([3], [0], steps=1)[0, ..., 0]
        assert np.abs(np.asarray(picture).astype(int) - expected.astype(int)).max() <= 1
        for path, status in (("/image?seed=x&label=0", 400), ("/other", 404)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(root + path)
            assert refused.value.code == status
        server.shutdown()


def test_bad_input_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GenError, match=r"holds no model\.stablehlo"):
        handler(tmp_path)
    assert cli.main(["export", str(run), "--platforms", "abacus"]) == 2
    assert "is not a list of cpu, cuda, rocm and tpu" in capsys.readouterr().err
