#!/usr/bin/env bash
# Everything that is to be seen on the day a GPU is at hand, in under 8 minutes where the packages are there:
#
#     benchmarks/gpu.sh [--out DIR] [--parts steps,evaluation] [--toy]
#
# Correctness on the device, step times and their share of peak beside torch.compile (where torch is), Inception images
# per second, an evaluation of 50,000 images, and the memory that gen compile foretells. Results go to DIR/gpu.json and
# DIR/gpu.md; a part that is there already is not run again. --toy: small sizes, for a machine without one.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
exec "$PYTHON" benchmarks/gpu.py "$@"
