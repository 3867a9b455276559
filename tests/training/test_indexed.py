import errno
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.training import indexed
from gen.training.indexed import ArrayWriter, run_indexed, sample_keys
from tests.processes import devices, ended, free_port
from tests.training import indexed_jobs as jobs


class Memory:
    """Keeps rows in a list."""

    def __init__(self, at: int = 0):
        self.next, self.rows, self.closed = at, [], 0

    def write(self, first, arrays):
        assert first == self.next
        self.rows.append(arrays)
        self.next += len(next(iter(arrays.values())))

    def close(self):
        self.closed += 1

    def joined(self):
        return {name: np.concatenate([rows[name] for rows in self.rows]) for name in self.rows[0]}


def launch(name: str, *args: object, count: int = 1) -> subprocess.Popen:
    env = os.environ | devices(count)
    command = [sys.executable, "-m", "tests.training.indexed_jobs", name, *map(str, args)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen, code: int = 0) -> None:
    found = ended(*processes)
    assert [status for status, _ in found] == [code] * len(processes), found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "rows.npz"
    jobs.run(str(out))
    return out


@pytest.fixture(scope="module")
def expected(undisturbed):
    with np.load(undisturbed) as file:
        return {name: file[name] for name in file.files}


def check(path: Path, expected) -> None:
    with np.load(path) as file:
        assert set(file.files) == set(expected)
        np.testing.assert_array_equal(file["index"], expected["index"])
        np.testing.assert_allclose(file["latent"], expected["latent"], rtol=1e-5, atol=1e-6)


def test_a_sample_is_its_seed_and_index(expected) -> None:
    np.testing.assert_array_equal(expected["index"], np.arange(jobs.START, jobs.START + jobs.COUNT, dtype=np.int32))
    for row in (0, 57, 100):
        key = jax.random.fold_in(jax.random.key(7), jobs.START + row)
        value = jnp.tanh(jax.random.normal(key, (4, 3)) * jobs.ARGUMENTS["scale"])
        np.testing.assert_allclose(expected["latent"][row], value, rtol=1e-5, atol=1e-6)
    assert len(np.unique(expected["latent"].round(5), axis=0)) == jobs.COUNT


@pytest.mark.parametrize("batch", [1, 7, 101, 4096])
def test_batch_size_does_not_matter(tmp_path, expected, batch) -> None:
    jobs.run(str(tmp_path / "rows.npz"), batch=batch)
    check(tmp_path / "rows.npz", expected)


def test_eight_devices_equal_one_and_refuse_a_batch_they_do_not_divide(tmp_path, expected) -> None:
    finish(launch("devices", tmp_path / "rows.npz", 4, 2, count=8))
    check(tmp_path / "rows.npz", expected)


def test_two_processes_equal_one(tmp_path, expected) -> None:
    port = free_port()
    running = [launch("two_processes", tmp_path / "rows.npz", port, i, count=2) for i in range(2)]
    finish(*running)
    check(tmp_path / "rows.npz", expected)
    assert os.listdir(tmp_path) == ["rows.npz"]


def test_killed_and_resumed_is_equal_byte_for_byte(tmp_path, undisturbed) -> None:
    out = tmp_path / "rows.npz"
    finish(launch("killed", out, 80), code=-9)
    assert not out.exists()
    safe = ArrayWriter(out, jobs.COUNT).next
    assert 0 < safe <= 80  # rows are made safe once a second, perhaps just before the kill
    done = []
    jobs.run(str(out), on_batch=lambda rows, count: done.append(rows))
    assert done[0] == safe + 16
    assert out.read_bytes() == undisturbed.read_bytes()
    assert os.listdir(tmp_path) == ["rows.npz"]


def test_a_job_killed_before_the_last_move_needs_no_work(tmp_path, undisturbed, monkeypatch) -> None:
    out = tmp_path / "rows.npz"
    with monkeypatch.context() as patch:
        patch.setattr(ArrayWriter, "_finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            jobs.run(str(out))
    assert not out.exists()
    jobs.run(str(out), on_batch=lambda rows, count: pytest.fail("nothing was left to do"))
    assert out.read_bytes() == undisturbed.read_bytes()


def test_tail_is_masked_compiled_once_and_never_written() -> None:
    traces, seen = [], []

    def function(arguments, indices, weight):
        traces.append(indices.shape)
        jax.debug.callback(lambda i, w: seen.append((i, w)), indices, weight)
        return {"double": 2 * indices, "weight": weight}

    memory = Memory()
    run_indexed(function, range(5, 15), batch=4, writer=memory)
    jax.effects_barrier()
    assert set(traces) == {(4,)}
    indices, weights = (np.stack(column) for column in zip(*sorted(seen, key=lambda pair: pair[0][0]), strict=True))
    np.testing.assert_array_equal(indices, [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 14, 14]])
    np.testing.assert_array_equal(weights, [[1] * 4, [1] * 4, [1, 1, 0, 0]])
    np.testing.assert_array_equal(memory.joined()["double"], 2 * np.arange(5, 15))
    np.testing.assert_array_equal(memory.joined()["weight"], 1)
    assert memory.closed == 1


def test_going_on_at_the_writers_row_and_reporting_progress(capsys) -> None:
    memory, calls = Memory(at=6), []
    options = {"writer": memory, "label": "squares", "on_batch": lambda done, count: calls.append((done, count))}
    run_indexed(lambda a, i, w: {"square": i * i}, range(10), batch=3, **options)
    np.testing.assert_array_equal(memory.joined()["square"], [36, 49, 64, 81])
    assert calls == [(9, 10), (10, 10)]
    text = capsys.readouterr().err
    assert "squares: going on at 6 of 10" in text
    assert "squares: 10 of 10" in text


def test_rows_are_read_on_the_host_a_batch_at_a_time() -> None:
    stored, seen, writer = np.arange(40.0).reshape(20, 2), [], Memory(at=3)

    def read(indices):
        seen.append(indices.tolist())
        return {"x": stored[indices]}

    def function(arguments, indices, weight):
        scale, rows = arguments
        return {"y": scale * rows["x"] + indices[:, None] * weight[:, None]}

    run_indexed(function, range(5, 14), batch=4, writer=writer, arguments=jnp.float32(2.0), read=read)
    rows = np.arange(8, 14)
    np.testing.assert_array_equal(writer.joined()["y"], 2.0 * stored[rows] + rows[:, None])
    assert [5, 6, 7, 8] in seen  # the shapes, before it is known where the job goes on
    assert seen[1:] == [[8, 9, 10, 11], [12, 13, 13, 13]]


def test_nan_is_refused_by_index() -> None:
    def function(arguments, indices, weight):
        return {"latent": jnp.where(indices == 23, jnp.nan, 1.0)[:, None]}

    memory = Memory()
    with pytest.raises(GenError, match="sample 23 has a NaN or infinite 'latent'; expected finite numbers"):
        run_indexed(function, range(10, 30), batch=8, writer=memory)
    assert memory.next == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": range(0)}, "no samples; expected at least one"),
        ({"samples": range(2**31 - 2, 2**31 + 1)}, "indices 2147483646 to 2147483648; expected"),
        ({"samples": [3, -1]}, "expected at least one sample, with indices in 0 to 2147483647"),
        ({"samples": range(3), "batch": 0}, "batch 0 does not divide"),
    ],
)
def test_bad_ranges_are_refused(options, message) -> None:
    with pytest.raises(GenError, match=message):
        run_indexed(lambda a, i, w: {"i": i}, **{"batch": 2, "writer": Memory(), **options})


def test_rows_must_be_samples() -> None:
    with pytest.raises(GenError, match=r"'total' has shape \(\); expected 2 rows, one per sample"):
        run_indexed(lambda a, i, w: {"total": i.sum()}, range(4), batch=2, writer=Memory())


def test_sample_keys_do_not_depend_on_their_company() -> None:
    alone = jax.random.key_data(sample_keys(3, jnp.array([41])))[0]
    among = jax.random.key_data(jax.jit(sample_keys, static_argnums=0)(3, jnp.arange(40, 44)))[1]
    np.testing.assert_array_equal(alone, among)
    assert (alone != jax.random.key_data(sample_keys(4, jnp.array([41])))[0]).any()


def test_folder_of_arrays(tmp_path, expected) -> None:
    jobs.run(str(tmp_path / "rows"), identity="one")
    assert sorted(os.listdir(tmp_path / "rows")) == ["index.npy", "latent.npy", "rows.json"]
    for name, array in expected.items():
        np.testing.assert_array_equal(np.load(tmp_path / "rows" / f"{name}.npy"), array)
    assert ArrayWriter(tmp_path / "rows", jobs.COUNT, "one").next == jobs.COUNT
    assert os.listdir(tmp_path) == ["rows"]


@pytest.mark.parametrize("name", ["rows", "rows.npz"])
def test_rows_of_another_job_are_refused(tmp_path, name) -> None:
    out = tmp_path / name
    half = ArrayWriter(out, 4, "one")
    half.write(0, {"x": np.arange(2)})
    half.close()
    assert not out.exists()
    for count, identity in ((4, "two"), (5, "one")):
        with pytest.raises(GenError, match=r"\.partial exists and was not made by this job"):
            ArrayWriter(out, count, identity)
    rest = ArrayWriter(out, 4, "one")
    rest.write(2, {"x": np.arange(2, 4)})
    rest.close()
    rest.close()
    with pytest.raises(GenError, match=f"{name} exists and was not made by this job"):
        ArrayWriter(out, 4, "two")


def test_foreign_files_are_not_overwritten(tmp_path) -> None:
    np.savez(tmp_path / "mine.npz", x=np.arange(4))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "photo.png").write_bytes(b"")
    (tmp_path / "text.npz").write_text("hello")
    for name in ("mine.npz", "folder", "text.npz"):
        with pytest.raises(GenError, match="was not made by this job"):
            ArrayWriter(tmp_path / name, 4)


def test_rows_out_of_order_or_of_another_type_are_bugs(tmp_path) -> None:
    writer = ArrayWriter(tmp_path / "rows.npz", 4)
    writer.write(0, {"x": np.zeros((2, 3), np.float32)})
    for first, rows in ((0, np.zeros((2, 3), np.float32)), (2, np.zeros((3, 3), np.float32)), (2, np.zeros((2, 3)))):
        with pytest.raises(ValueError, match=r"rows .* do not follow|'x' is"):
            writer.write(first, {"x": rows})


def test_a_full_disk_is_one_line_and_the_job_goes_on_later(tmp_path, undisturbed, monkeypatch) -> None:
    out = tmp_path / "rows.npz"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(indexed.os, "fsync", full)
        with pytest.raises(GenError, match=r"cannot write .*: No space left on device; free space or choose another"):
            jobs.run(str(out))
    assert not out.exists()
    jobs.run(str(out))
    assert out.read_bytes() == undisturbed.read_bytes()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GenError, match=r"cannot write .*; free space or choose another output folder"):
        jobs.run(str(tmp_path / "file" / "rows.npz"))
