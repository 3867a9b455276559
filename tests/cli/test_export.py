"""Exports: the run's own samples from a program that needs jax alone, its page, and what is refused."""

import json
import re
import shutil
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
from gen.training.indexed import sample_keys
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
    """The program's images are the run's to 1e-5, and what the loader rounds them to to one of 256 levels."""
    code = "import sys, numpy as np, load\n"
    code += "seeds, labels = np.array([3, 5, 8], np.int32), np.array([0, 2, 1], np.int32)\n"
    code += "exact = load.program.call(load.weights, seeds, labels)\n"
    code += "np.savez(sys.argv[1], exact=exact, rounded=load.sample(seeds, labels))\n"
    code += "print(sorted({name.split('.')[0] for name in sys.modules} & {'gen', 'flax', 'optax', 'orbax', 'jax'}))"
    out, loaded = tmp_path / "images.npz", load(run)
    said = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=run / "export", check=True, timeout=300, capture_output=True
    )
    assert said.stdout.split() == [b"['jax']"]
    sampler = loaded.config.sampler.changed(steps=1)
    cond = {"label": np.array([0, 2, 1], np.int32)}
    one_step = jax.jit(loaded.with_sampler(sampler).generator)
    expected = np.asarray(one_step(loaded.params, sample_keys(0, np.array([3, 5, 8], np.int32)), cond))
    assert expected.std() > 0.1
    with np.load(out) as found:
        np.testing.assert_allclose(found["exact"], expected, rtol=0.0, atol=1e-5)
        levels = loaded.sample([3, 5, 8], [0, 2, 1], steps=1).astype(int)
        assert np.abs(found["rounded"].astype(int) - levels).max() <= 1  # a tie of the rounding
    assert "| network calls | 1 |" in (run / "export" / "README.md").read_text()
    weights = np.asarray(loaded.params["net"]["patch"]["kernel"]).tobytes()
    assert weights in (run / "export" / "weights.safetensors").read_bytes()
    assert weights not in (run / "export" / "model.stablehlo").read_bytes()  # which cannot hold more than 2 GB


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


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)

# moves the sliders of the page in a frame, and says what the picture then shows
DRIVER = """<!doctype html><body>waits<iframe src="/"></iframe><script>
document.querySelector("iframe").onload = event => {
  const page = event.target.contentDocument, image = page.getElementById("image");
  page.getElementById("seed").value = 3;
  page.getElementById("seed").dispatchEvent(new Event("input"));
  page.getElementById("label").value = 2;
  image.onload = () => {
    if (!image.src.endsWith("image?seed=3&label=2")) return;
    const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    pen.drawImage(image, 0, 0);
    const pixels = pen.getImageData(0, 0, canvas.width, canvas.height).data.filter((_, i) => i % 4 == 0);
    const [seed, label] = ["s", "l"].map(name => page.getElementById(name).value);
    document.body.textContent = JSON.stringify([seed, label, [...pixels]]);
  };
  page.getElementById("label").dispatchEvent(new Event("input"));
};
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
def test_sliders_in_a_browser(run: Path, tmp_path: Path) -> None:
    class Driven(handler(run / "export")):
        def do_GET(self) -> None:
            if self.path == "/driver":
                self._answer(200, "text/html; charset=utf-8", DRIVER.encode())
            else:
                super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), Driven) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
        url = f"http://127.0.0.1:{server.server_address[1]}/driver"
        command = [BROWSER, *flags, "--virtual-time-budget=60000", url]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
        server.shutdown()
    seed, label, pixels = json.loads(re.search(r"<body>(.*)</body>", shown, re.S)[1])
    assert (seed, label) == ("3", "2")
    expected = load(run).sample([3], [2], steps=1)[0, ..., 0]
    assert np.abs(np.reshape(pixels, expected.shape) - expected.astype(int)).max() <= 1


def test_bad_input_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GenError, match=r"holds no model\.stablehlo"):
        handler(tmp_path)
    assert cli.main(["export", str(run), "--platforms", "abacus"]) == 2
    assert "is not a list of cpu, cuda, rocm and tpu" in capsys.readouterr().err
