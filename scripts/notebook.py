"""Runs a notebook and writes what it says and shows as Markdown: ``python -m scripts.notebook FILE.py OUTDIR``.

A notebook is a Python file in cells: ``# %% [markdown]`` begins text, ``# %%`` begins code (the percent format of
jupytext and of editors). The file runs as a plain program too.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import matplotlib

from gen.files import atomic


def run(source: Path, outdir: Path) -> None:
    """Executes the cells one after the other; writes NAME.md and its pictures NAME-0.png ... to `outdir`.

    The cells run in an empty folder. What a cell raises ends the run.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    outdir = outdir.resolve()
    outdir.mkdir(parents=True, exist_ok=True)
    space: dict[str, object] = {"__name__": "__main__"}
    parts, pictures = [], 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for cell in re.split(r"^# %%", source.read_text(), flags=re.M)[1:]:
            kind, _, text = cell.partition("\n")
            if "markdown" in kind:
                parts.append(re.sub(r"^# ?", "", text, flags=re.M).strip())
                continue
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(compile(text, str(source), "exec"), space)
            parts.append(f"```python\n{text.strip()}\n```")
            if said.getvalue().strip():
                parts.append(f"```text\n{said.getvalue().rstrip()}\n```")
            for number in plt.get_fignums():
                name = f"{source.stem}-{pictures}.png"
                plt.figure(number).savefig(outdir / name, dpi=120, bbox_inches="tight")
                parts.append(f"![Picture {pictures + 1} of this notebook]({name})")
                pictures += 1
            plt.close("all")
    text = "\n\n".join(parts) + "\n"
    atomic(outdir / f"{source.stem}.md", lambda file: file.write(text.encode()))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
