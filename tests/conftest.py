"""Before jax is imported: what the tests compile is kept, for the processes they start and for the next run."""

import gc
import os
from pathlib import Path

_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# traces are trees of many small objects: looking for cycles among them after every 700 is a tenth of the time
gc.set_threshold(50_000, 20, 20)
