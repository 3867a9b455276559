"""``gen export`` and ``gen serve-demo``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any

import tyro

from gen.cli.flags import USUAL, SamplingFlags, flag
from gen.errors import GenError

__all__ = ["export", "handler", "serve_demo"]


def export(
    run: Annotated[Path, tyro.conf.Positional, flag("RUN")],
    /,
    *,
    out: Annotated[Path | None, flag("DIR")] = None,
    platforms: Annotated[str, flag("A,B,..")] = "cpu,cuda,tpu",
    sampling: SamplingFlags = USUAL,
) -> None:
    """Writes a run as a folder that needs jax alone: a StableHLO program, its weights, a loader, a model card.

    OUT/model.stablehlo takes the weights, and seeds and classes in any number, and gives the run's images;
    OUT/weights.safetensors has the weights, of any size; OUT/load.py is twenty lines; OUT/README.md has the settings,
    and the scores of gen evaluate where there are.

    Examples:
      gen export runs/demo/student --out student/
      gen export runs/demo/teacher --steps 4 --platforms cpu
      python student/load.py 7 3

    Args:
      run: the run folder.
      out: the folder to write; RUN/export if not given.
      platforms: what the program runs on: cpu, cuda, rocm, tpu.
      sampling: how images are made.
    """
    from gen import arrays
    from gen.cli.opening import open_run
    from gen.files import atomic, read_json
    from gen.nn.conditions import class_count
    from gen.nn.network import count
    from gen.sampling.deployed import LOADER, card, deployed_weights, exported

    names = tuple(name for name in platforms.split(",") if name)
    if not names or set(names) - {"cpu", "cuda", "rocm", "tpu"}:
        raise GenError(f"--platforms '{platforms}' is not a list of cpu, cuda, rocm and tpu")
    loaded, folder = open_run(run, sampling), out or run / "export"
    generator = loaded.generator
    weights = deployed_weights(loaded.params)
    program = exported(generator, weights, names)
    facts = {
        "made from": loaded.origin,
        "images": " x ".join(map(str, generator.shape)),
        "classes": class_count(generator.conditions) or "none",
        "network calls": generator.nfe,
        "parameters": f"{count(loaded.params):,}",
        "platforms": ", ".join(names),
    }
    scores = read_json(run / "scores.json") if (run / "scores.json").exists() and sampling == USUAL else None
    arrays.write(folder / "weights.safetensors", weights, {"origin": loaded.origin})
    texts = {"model.stablehlo": program, "load.py": LOADER.encode()}
    about = {"shape": list(generator.shape), "classes": class_count(generator.conditions)}
    texts |= {"README.md": card(loaded.config.name, facts, scores).encode(), "model.json": json.dumps(about).encode()}
    for name, content in texts.items():
        atomic(folder / name, _putting(content))
    size = len(program) + sum(array.nbytes for array in weights.values())
    print(f"{size / 1e6:.1f} MB for {', '.join(names)}; written to {folder}; try: python {folder}/load.py 0 0")


def _putting(content: bytes) -> Callable[[IO[bytes]], Any]:
    return lambda file: file.write(content)


PAGE = """<!doctype html><meta charset="utf-8"><title>gen</title>
<style>body{font:16px sans-serif;max-width:32em;margin:3em auto}img{image-rendering:pixelated;width:16em}</style>
<h1>One image for each seed</h1>
<p><label>seed <input id="seed" type="range" min="0" max="999" value="0"> <output id="s">0</output></label></p>
<p><label>class <input id="label" type="range" min="0" max="LAST" value="0"> <output id="l">0</output></label></p>
<img id="image" alt="sample" src="image?seed=0&amp;label=0">
<script>
for (const id of ["seed", "label"]) document.getElementById(id).oninput = () => {
  const [s, l] = ["seed", "label"].map(name => document.getElementById(name).value);
  document.getElementById("s").value = s; document.getElementById("l").value = l;
  document.getElementById("image").src = `image?seed=${s}&label=${l}`;
};
</script>
"""


def serve_demo(
    folder: Annotated[Path, tyro.conf.Positional, flag("DIR")],
    /,
    *,
    port: Annotated[int, flag("N")] = 8000,
) -> None:
    """Serves a local page with a slider for the seed and one for the class, from what gen export wrote.

    Examples:
      gen serve-demo runs/demo/student/export

    Args:
      folder: of gen export.
      port: on this machine alone.
    """
    from http.server import ThreadingHTTPServer

    with ThreadingHTTPServer(("127.0.0.1", port), handler(folder)) as server:
        print(f"http://127.0.0.1:{server.server_address[1]} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def handler(folder: Path) -> Any:
    """Gives the request handler of an export's page. Raises GenError for a folder that is none."""
    import io
    import urllib.parse
    from http.server import BaseHTTPRequestHandler

    import jax
    import jax.export
    import numpy as np
    from PIL import Image

    from gen import arrays
    from gen.files import read_json, reading

    if not (folder / "model.stablehlo").is_file():
        raise GenError(f"{folder} holds no model.stablehlo; give the folder of gen export")
    with reading(folder / "model.stablehlo"):
        program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    weights = jax.device_put(arrays.read(folder / "weights.safetensors"))
    classes = read_json(folder / "model.json")["classes"] or 1

    def picture(seed: int, label: int) -> bytes:
        rows = (np.asarray([value], np.int32) for value in (seed, label % classes))
        levels = np.clip(np.rint((np.asarray(program.call(weights, *rows))[0] + 1.0) * 127.5), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(file, "PNG")
        return file.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            asked = urllib.parse.parse_qs(url.query)
            try:
                if url.path == "/image":
                    self._answer(200, "image/png", picture(*(int(asked[name][0]) for name in ("seed", "label"))))
                elif url.path == "/":
                    page = PAGE.replace("LAST", str(classes - 1)).encode()
                    self._answer(200, "text/html; charset=utf-8", page)
                else:
                    self._answer(404, "text/plain", b"there is only this page")
            except (KeyError, ValueError, OverflowError):
                self._answer(400, "text/plain", b"expected seed and label as whole numbers")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing of each request."""

    return Handler
