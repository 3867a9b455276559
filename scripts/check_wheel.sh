#!/usr/bin/env bash
# Builds the source distribution and from it the wheel, installs that into a clean environment and uses it there, away
# from the checkout:
#   scripts/check_wheel.sh [PYTHON]          PYTHON is python3 unless given, such as python3.13
# Needs the network or a package mirror for requirements/core.txt, and mypy in .venv (or MYPY=).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3} root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== build"
"$python" -m venv "$work/env"
bin=$work/env/bin
"$bin/python" -m pip install --quiet --no-compile --disable-pip-version-check --require-hashes -r requirements/core.txt
git archive --prefix=source/ HEAD | tar -x -C "$work"  # what is committed, without tags and what lies beside it
(cd "$work/source" && "$bin/python" -c 'from setuptools import build_meta; build_meta.build_sdist("..")' > /dev/null)
"$bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w "$work" \
  "$work"/gen_image-*.tar.gz
"$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$work"/gen_image-*.whl

echo "== what is in it"
cd "$work"
unset PYTHONPATH
"$bin/python" - <<'PYTHON'
import importlib.metadata
import tomllib
from pathlib import Path

import gen

assert gen.__version__ == tomllib.loads(Path("source/pyproject.toml").read_text())["project"]["version"]
home = Path(gen.__file__).parent
files = {str(file) for file in importlib.metadata.files("gen-image")}
for needed in ("py.typed", "data/digits.npz", "features/digits.safetensors", "metrics/report.html.jinja"):
    assert f"gen/{needed}" in files, needed
assert "gen/experiments/demo.py" in files
assert not [file for file in files if file.startswith(("tests/", "scripts/", "benchmarks/"))]
print(gen.__version__, home)
PYTHON

echo "== commands"
"$bin/gen" list > list.txt
grep -q dit-xl2 list.txt
"$bin/gen" demo --smoke --outdir demo > demo.txt
test -s demo/report.html

echo "== an own experiment"
"$bin/python" - "$root/docs/own-experiment.md" <<'PYTHON'
import re
import sys
from pathlib import Path

Path("myexp.py").write_text(re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.S)[0])
PYTHON
"$bin/gen" train ./myexp.py:my-flow --outdir mine --steps 5 --engine.quiet true
"$bin/gen" sample mine --seeds 0-3 --out grid.png

echo "== types"
cat > typed.py <<'PYTHON'
import jax

import gen

network = gen.DiTConfig(size=(8, 8), channels=1, patch=2, width=64, depth=1, heads=4, num_classes=10)
flow = gen.Denoiser(network, gen.Linear(), gen.Predict("velocity"))
generator = gen.DiffusionGenerator(flow, gen.Sampler(gen.Heun(), gen.Uniform(), steps=2))
images: jax.Array = generator({"net": flow.net.init(jax.random.key(0))}, jax.random.split(jax.random.key(1), 2), {})
calls: int = generator.nfe
PYTHON
mypy=${MYPY:-$root/.venv/bin/mypy}
"$mypy" --python-executable "$bin/python" --ignore-missing-imports --follow-imports silent typed.py
! "$mypy" --python-executable "$bin/python" --ignore-missing-imports --follow-imports silent \
  -c 'import gen; gen.Sampler(steps="ten")' > refused.txt
grep -q 'incompatible type' refused.txt
echo "== all of it holds on $("$bin/python" --version)"
