import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from gen.errors import GenError
from gen.metrics import onepass
from gen.metrics.frechet import frechet_distance
from gen.metrics.onepass import Tally, collect, merge_tallies
from gen.metrics.sources import balanced_labels, from_arrays, generated
from gen.metrics.statistics import Accuracy, Features, Moments
from tests.metrics.toy import PARAMS, Toy, draw, features, images, poisoned
from tests.processes import devices, ended, free_port

STATISTICS = {"moments": Moments(), "features": Features(150), "accuracy": Accuracy()}
COUNT = 333


def _generator(count=COUNT, start=0):
    seeds = range(start, start + count)
    return generated(draw, PARAMS, seeds=seeds, identity="draw", labels=balanced_labels(count, 4), rule="balanced")


def _same(a, b, rtol=0.0):
    assert (a.identity, a.spans) == (b.identity, b.spans)
    for name, accumulator in a.accumulators.items():
        for key, array in accumulator.items():
            np.testing.assert_allclose(array, b.accumulators[name][key], rtol=rtol, atol=rtol * 100, err_msg=key)


def test_stored_images_give_the_moments_of_their_features():
    pixels = images(COUNT)
    tally = collect(from_arrays(pixels), Toy(), {"moments": Moments(), "features": Features(20)}, batch=50)
    found = Moments().finalise(tally.accumulators["moments"])
    np.testing.assert_allclose(found["mean"], features(pixels).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["covariance"], np.cov(features(pixels).T), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tally.accumulators["features"]["rows"], features(pixels)[:20], rtol=1e-6)
    assert (tally.count, tally.spans) == (COUNT, ((0, COUNT),))


@pytest.mark.parametrize("batch", [7, 500])
def test_batch_size_does_not_matter(batch):
    _same(collect(_generator(), Toy(), STATISTICS, batch=batch), collect(_generator(), Toy(), STATISTICS), rtol=1e-5)


def test_one_compilation_for_all_seeds_and_tails():
    onepass._program.cache_clear()
    named = tuple(STATISTICS.items())
    collect(_generator(), Toy(), STATISTICS, batch=64)
    program = onepass._program(_generator().function, "round", Toy(), named, None)
    collect(_generator(COUNT, start=1000), Toy(), STATISTICS, batch=64)
    assert program._cache_size() == 1


def test_parts_merge_to_the_whole(tmp_path):
    whole = collect(_generator(), Toy(), STATISTICS, batch=32)
    parts = []
    for i, span in enumerate((range(200, COUNT), range(90), range(90, 200))):
        collect(_generator(), Toy(), STATISTICS, indices=span, batch=32, path=tmp_path / f"{i}.npz")
        parts.append(Tally.load(tmp_path / f"{i}.npz"))
    merged = merge_tallies(parts, STATISTICS)
    _same(merged, whole, rtol=1e-5)
    with pytest.raises(GenError, match="sample 90 is in two"):
        merge_tallies([*parts, parts[2]], STATISTICS)
    other = Tally(parts[0].identity + "x", parts[0].spans, parts[0].accumulators)
    with pytest.raises(GenError, match="different jobs"):
        merge_tallies([parts[1], other], STATISTICS)
    with pytest.raises(GenError, match="at least one"):
        merge_tallies([], STATISTICS)


KILLED = """
import os, signal, sys
from gen.metrics import onepass
from tests.metrics.test_onepass import STATISTICS, _generator
from tests.metrics.toy import Toy
onepass._FLUSH, onepass._SAVE_SECONDS = 64, 0.0
def progress(done, total):
    if done >= 200: os.kill(os.getpid(), signal.SIGKILL)
onepass.collect(_generator(), Toy(), STATISTICS, batch=32, path=sys.argv[1], progress=progress)
"""


def test_killed_and_resumed_is_bit_equal(tmp_path, monkeypatch):
    path = tmp_path / "partial.npz"
    command, env = [sys.executable, "-c", KILLED, str(path)], os.environ | {"JAX_PLATFORMS": "cpu"}
    killed = subprocess.run(command, env=env, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    held = Tally.load(path).count
    assert 0 < held < COUNT
    monkeypatch.setattr(onepass, "_FLUSH", 64)
    seen = []
    resumed = collect(
        _generator(), Toy(), STATISTICS, batch=32, path=path, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[:2] == [(held, COUNT), (held + 32, COUNT)]
    assert seen[-1] == (COUNT, COUNT)
    _same(resumed, collect(_generator(), Toy(), STATISTICS, batch=32))
    _same(resumed, collect(_generator(), Toy(), STATISTICS, batch=32, path=path))  # a finished one is read back
    assert [p.name for p in tmp_path.iterdir()] == ["partial.npz"]


def test_partial_files_of_other_jobs_are_refused(tmp_path):
    path = tmp_path / "partial.npz"
    collect(_generator(), Toy(), STATISTICS, path=path)
    for call, message in (
        (lambda: collect(_generator(start=1), Toy(), STATISTICS, path=path), "another evaluation"),
        (lambda: collect(_generator(), Toy(shift=1.0), STATISTICS, path=path), "another evaluation"),
        (lambda: collect(_generator(), Toy(), {"moments": Moments()}, path=path), "another evaluation"),
        (lambda: collect(_generator(), Toy(), STATISTICS, indices=range(1, 9), path=path), "another evaluation"),
        (lambda: collect(_generator(), Toy(), STATISTICS, indices=range(9), path=path), "already holds 333"),
    ):
        with pytest.raises(GenError, match=message):
            call()
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(GenError, match="no partial evaluation"):
        collect(_generator(), Toy(), STATISTICS, path=path)


def test_bad_samples_are_named_and_padding_is_not_looked_at():
    statistics = {"moments": Moments()}
    for index in (0, 41, 99):
        with pytest.raises(GenError, match=f"sample {index} has NaN"):
            collect(poisoned(100, index), Toy(), statistics, batch=32)
    collect(poisoned(100, 99), Toy(), statistics, batch=32, indices=range(99))
    with pytest.raises(GenError, match="sample 0 has NaN or infinite"):
        collect(from_arrays(images(10)), Toy(shift=np.inf), statistics)


def test_refuses_before_anything_runs():
    source = from_arrays(images(10))
    for indices in (range(11), range(0), range(0, 4, 2), range(-1, 3)):
        with pytest.raises(GenError, match="expected a range"):
            collect(source, Toy(), STATISTICS, indices=indices)
    with pytest.raises(GenError, match="images of shape \\(5, 6, 3\\) for the toy extractor"):
        collect(from_arrays(images(4).transpose(0, 2, 1, 3)), Toy(), STATISTICS)


DEVICES = """
import dataclasses
import jax
import numpy as np
from gen.errors import GenError
from gen.metrics.frechet import frechet_distance
from gen.metrics.onepass import collect
from gen.metrics.sources import from_arrays
from gen.metrics.statistics import Features, Moments
from gen.training.sharding import MeshConfig, make_mesh
from tests.metrics.test_onepass import STATISTICS, _distance, _generator, _same
from tests.metrics.toy import Toy, features, images
one = collect(_generator(), Toy(), STATISTICS, batch=64)
for sizes in ((8, 1, 1), (2, 2, 2)):
    mesh = make_mesh(MeshConfig(*sizes))
    many = collect(_generator(), Toy(), STATISTICS, batch=64, mesh=mesh)
    _same(many, one, rtol=1e-6)
    _same(many, collect(_generator(), Toy(), STATISTICS, batch=64, mesh=mesh))
stored = from_arrays(images(333))
whole = {}
for devices in (1, 2, 4, 8):  # eight images on each: equal features, and distances but for the order of sums
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(devices, 1, 1), ("data", "fsdp", "tensor"))
    for name, source in (("made", _generator()), ("stored", stored)):
        statistics = {"moments": Moments(), "features": Features(333)}
        tally = collect(source, Toy(), statistics, batch=8 * devices, mesh=mesh)
        rows = Features(333).finalise(tally.accumulators["features"])["features"]
        first, distance = whole.setdefault(name, (rows, _distance(tally)))
        np.testing.assert_array_equal(rows, first)
        np.testing.assert_allclose(_distance(tally), distance, rtol=1e-6)
try:
    collect(_generator(), Toy(), STATISTICS, batch=4, mesh=make_mesh(MeshConfig(8)))
except GenError as error:
    assert "batch 4 does not divide" in str(error), error
    print("ok", jax.device_count())
"""


def _distance(tally):
    """From the statistics of other images."""
    other, found = features(images(400, seed=9)), Moments().finalise(tally.accumulators["moments"])
    return frechet_distance(found["mean"], found["covariance"], other.mean(0), np.cov(other.T))


def test_any_number_of_devices_gives_the_same():
    command = [sys.executable, "-c", DEVICES]
    done = subprocess.run(command, env=os.environ | devices(8), capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["ok", "8"], done.stderr


PROCESSES = """
import sys
import jax
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
from gen.metrics.onepass import collect
from gen.metrics.sources import from_arrays
from gen.training.sharding import make_mesh
from tests.metrics.test_onepass import STATISTICS, _generator
from tests.metrics.toy import Toy, images
stored = {"moments": STATISTICS["moments"], "features": STATISTICS["features"]}
collect(from_arrays(images(333)), Toy(), stored, batch=64, mesh=make_mesh(), path=sys.argv[3] + ".stored")
tally = collect(_generator(), Toy(), STATISTICS, batch=64, mesh=make_mesh(), path=sys.argv[3])
assert (tally.count, jax.process_count(), jax.device_count()) == (333, 2, 4)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    command, env = [sys.executable, "-c", PROCESSES, free_port()], os.environ | devices(2)
    both = [subprocess.Popen([*command, str(i), str(tmp_path / "two.npz")], env=env) for i in range(2)]
    assert [status for status, _ in ended(*both)] == [0, 0]
    two, one = Tally.load(tmp_path / "two.npz"), collect(_generator(), Toy(), STATISTICS, batch=64)
    _same(two, one, rtol=1e-6)
    assert _distance(two) == pytest.approx(_distance(one), rel=1e-6)
    stored = {"moments": STATISTICS["moments"], "features": STATISTICS["features"]}
    two, one = Tally.load(tmp_path / "two.npz.stored"), collect(from_arrays(images(333)), Toy(), stored, batch=64)
    _same(two, one, rtol=1e-6)
