import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from gen.data import vanished
from gen.data.loader import batches, epoch_order, expect, gathered, stacked
from gen.data.sources import ArraySource
from gen.errors import GenError

SIZE = 37


def source(size: int = SIZE) -> ArraySource:
    return ArraySource(id=np.arange(size), x=np.arange(size, dtype=np.float32)[:, None] * np.ones(3, np.float32))


def take(count, **options):
    return list(itertools.islice(batches(source(), **{"batch": 8, "seed": 5, **options}), count))


def jitter(stream, record):
    return record | {"x": record["x"] + stream.normal(size=3)}


def assert_equal(first, second) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_every_epoch_is_complete_and_has_an_order_of_its_own() -> None:
    ids = np.concatenate([batch["id"] for batch in take(3 * SIZE)])[: 8 * 3 * SIZE // SIZE * SIZE]
    epochs = ids.reshape(-1, SIZE)
    assert len(epochs) == 24
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(SIZE), (24, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 24


def test_arrays_of_a_record_stay_together() -> None:
    for batch in take(6):
        np.testing.assert_array_equal(batch["x"][:, 0], batch["id"])


@pytest.mark.parametrize("transform", [None, jitter])
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_global_batch_does_not_depend_on_the_number_of_processes(processes, transform) -> None:
    whole = take(12, transform=transform)
    parts = [take(12, process=p, processes=processes, transform=transform) for p in range(processes)]
    joined = [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert_equal(joined, whole)


@pytest.mark.parametrize("start", [1, 4, 5, 1000])
@pytest.mark.parametrize("transform", [None, jitter])
def test_starting_later_is_resuming(start, transform) -> None:
    if start == 1000:
        assert_equal(take(1, start=1000, transform=transform), take(3, start=998, transform=transform)[2:])
    else:
        assert_equal(take(4, start=start, transform=transform), take(start + 4, transform=transform)[start:])


def test_workers_and_prefetch_do_not_change_batches() -> None:
    reference = take(20, threads=0, prefetch=0, transform=jitter)
    assert_equal(take(20, threads=1, prefetch=1, transform=jitter), reference)
    assert_equal(take(20, threads=8, prefetch=32, transform=jitter), reference)


def test_seed_changes_order_and_every_position_has_its_own_stream() -> None:
    assert any((a["id"] != b["id"]).any() for a, b in zip(take(3), take(3, seed=6), strict=True))
    noise = np.concatenate([b["x"] - b["id"][:, None] for b in take(10, transform=jitter)])
    assert len(np.unique(noise)) == noise.size


def test_batch_larger_than_the_data() -> None:
    ids = np.concatenate([b["id"] for b in take(2, batch=3 * SIZE + 2)])
    counts = np.bincount(ids)
    assert set(counts) <= {6, 7}


def test_order_is_fixed_for_ever() -> None:
    """Raw Philox output is defined by its paper: a changed order would silently change resumed runs."""
    np.testing.assert_array_equal(epoch_order(10, 0, 0), EXPECTED)
    assert epoch_order(10, -1, 0).shape == (10,)


EXPECTED = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_dropping_the_iterator_ends_its_workers() -> None:
    iterator = batches(source(), batch=8, seed=0)
    next(iterator)
    iterator.close()
    with pytest.raises(StopIteration):
        next(iterator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 6, "processes": 4}, "batch 6 is not divisible by 4 processes; choose a multiple of 4"),
        ({"batch": 0}, "batch 0 is not divisible"),
        ({"process": 2, "processes": 2}, "process 2 does not exist; expected 0 to 1"),
        ({"start": -1}, "cannot start at step -1"),
    ],
)
def test_bad_options_are_refused_at_once(options, message) -> None:
    with pytest.raises(GenError, match=message):
        batches(source(), **{"batch": 8, "seed": 0, **options})


class Stuck(ArraySource):
    """Its record 20 never comes; as on a network folder that does not answer."""

    def __init__(self):
        super().__init__(id=np.arange(SIZE))
        self.answer = threading.Event()

    def __getitem__(self, index):
        if index == 20:
            self.answer.wait()
        return super().__getitem__(index)


def test_a_stalled_source_is_named(monkeypatch) -> None:
    monkeypatch.setattr(vanished, "STALL", 1.0)
    data = Stuck()
    stream = batches(data, batch=SIZE, seed=0, transform=lambda stream, record: record)
    with pytest.raises(vanished.Stalled, match="no data for 1 s, while reading record 20 of arrays in memory"):
        next(stream)
    data.answer.set()  # lets the threads end


def test_slow_data_are_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(vanished, "STALL", 1.0)

    def slow(stream, record):
        time.sleep(0.1)
        return record

    assert len(next(batches(source(), batch=14, seed=0, transform=slow, threads=1))["id"]) == 14


def test_the_command_line_leaves_a_stalled_disk(tmp_path) -> None:
    """Threads that hang in a read would keep Python from ending."""
    script = (
        "import sys, threading\nimport gen.cli\nfrom gen.data import loader, sources, vanished\n"
        "vanished.STALL = 1.0\n"
        "class Hung(sources.ArraySource):\n"
        "    def gather(self, indices):\n        threading.Event().wait()\n"
        "import numpy as np\n"
        "gen.cli.parse = lambda *args: lambda: next(loader.batches(Hung(id=np.arange(9)), batch=2, seed=0))\n"
        "sys.argv = ['gen', 'train']\nsys.exit(gen.cli.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: no data for 1 s, while reading record ")


def test_records_are_gathered_by_threads_in_their_order(monkeypatch) -> None:
    rows = np.random.default_rng(0).integers(0, SIZE, 100)
    for name, values in gathered(source(), rows).items():
        np.testing.assert_array_equal(values, source().gather(rows)[name])
    data = Stuck()
    data.gather = lambda indices: stacked((data[index] for index in indices), len(indices))
    monkeypatch.setattr(vanished, "STALL", 1.0)
    try:
        with pytest.raises(vanished.Stalled, match="while reading record 13 of arrays in memory and those after it"):
            gathered(data, np.arange(SIZE))
    finally:
        data.answer.set()  # lets the thread end


def test_records_that_do_not_fit_are_refused() -> None:
    batch = stacked(({"a": np.full((2, 3), i), "b": np.int32(i)} for i in range(4)), 4)
    assert (batch["a"].shape, batch["b"].tolist(), batch["b"].dtype) == ((4, 2, 3), [0, 1, 2, 3], np.int32)
    with pytest.raises(ValueError, match=r"'a' has the shape \(1, 3\) after \(2, 3\)"):
        stacked(({"a": np.zeros((2 - i, 3))} for i in range(2)), 2)
    data = ArraySource(**batch)
    expect("there", data, a=(2, 3), b=())
    with pytest.raises(GenError, match="there has no 'c' among a, b; encode or make data that have it"):
        expect("there", data, c=())
    with pytest.raises(GenError, match=r"'a' of there has the shape \(2, 3\); the model takes \(3, 2\), give it data"):
        expect("there", data, a=(3, 2))


def test_empty_data_are_refused() -> None:
    with pytest.raises(GenError, match="the data are empty"):
        batches(source(0), batch=1, seed=0)
