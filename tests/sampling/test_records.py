"""Teacher records: what is in them, going on, and whose they are."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.sampling import records as module
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.records import SEED, Records, Solved, make_records
from gen.sampling.solvers import Euler
from gen.training.indexed import sample_keys

LABELS = np.arange(10, dtype=np.int32) % 3


@dataclasses.dataclass(frozen=True)
class Toy:
    """Tokens and a sample, without a network."""

    identity: str = "toy"
    name: str = "tokens"

    def __call__(self, params, keys, cond):
        ids = jax.vmap(lambda key: jax.random.randint(key, (4,), 0, 16))(keys) + cond["label"][:, None]
        return {self.name: ids, "sample": params["net"]["gain"] * ids.astype(jnp.float32)}


PARAMS = {"net": {"gain": jnp.float32(0.5)}}


def toy(path, make=Toy(), *, maker="teacher step 3", count=10, labels=LABELS, batch=4, params=PARAMS):
    cond = {"label": labels}
    return make_records(make, params, path, count=count, maker=maker, cond=cond, batch=batch, label="")


def test_rows_come_by_name_and_the_sample_as_latent(tmp_path):
    records = toy(tmp_path / "r")
    rows = records.source().gather(np.arange(10))
    assert {name: (row.dtype, row.shape) for name, row in rows.items()} == {
        "tokens": (np.int32, (10, 4)),
        "latent": (np.float32, (10, 4)),
        "label": (np.int32, (10,)),
    }
    np.testing.assert_array_equal(rows["label"], LABELS)
    np.testing.assert_array_equal(rows["latent"], 0.5 * rows["tokens"])
    assert from_json(to_json(records), Records) == records
    batch = next(iter(records.batches(batch=5, seed=0, start=0)))
    assert batch["tokens"].shape == (5, 4)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        "label.npy", "records.json", "rows.json", "sample.npy", "tokens.npy"
    ]  # fmt: skip


def test_done_does_nothing_and_an_interrupted_job_goes_on(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def dying(*args, **kwargs):
        def stop(done, count):
            if done >= 8:
                raise Killed

        return run_indexed(*args, **kwargs, on_batch=stop)

    run_indexed = module.run_indexed
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_indexed", dying)
        with pytest.raises(Killed):
            toy(tmp_path / "r")
    with pytest.raises(GenError, match="no records at"):
        Records(str(tmp_path / "r"), "teacher step 3").source()
    records, whole = toy(tmp_path / "r"), toy(tmp_path / "whole")
    assert records.identity() == whole.identity()
    monkeypatch.setattr(module, "run_indexed", lambda *_, **__: pytest.fail("nothing was left to do"))
    assert toy(tmp_path / "r") == records


def test_records_of_another_teacher_are_refused(tmp_path):
    records = toy(tmp_path / "r")
    with pytest.raises(GenError, match="holds records of teacher step 3; this student's teacher is teacher step 4"):
        dataclasses.replace(records, maker="teacher step 4").source()
    changes = [{"maker": "teacher step 4"}, {"make": Toy("other")}, {"labels": (LABELS + 1) % 3}]
    for change in [*changes, {"count": 9, "labels": LABELS[:9]}]:
        with pytest.raises(GenError, match="holds records of another teacher, number or settings"):
            toy(tmp_path / "r", **change)


def test_stored_pairs_of_earlier_versions_say_what_to_do(tmp_path):
    old = tmp_path / "pairs"
    old.mkdir()
    (old / "cache.json").write_text("{}")
    with pytest.raises(GenError, match=r"stored pairs of an earlier version, .*gen distill PRESET --teacher RUN"):
        Records(str(old), "teacher").source()
    with pytest.raises(GenError, match="stored pairs of an earlier version; choose another folder"):
        toy(old)


def test_altered_records_are_refused(tmp_path):
    records = toy(tmp_path / "r")
    np.save(tmp_path / "r" / "tokens.npy", np.zeros((9, 4), np.int32))
    with pytest.raises(GenError, match=r"tokens.npy holds <i4 \(9, 4\); expected <i4 \(10, 4\)"):
        records.source()
    head = json.loads((tmp_path / "r" / "records.json").read_text())
    (tmp_path / "r" / "records.json").write_text(json.dumps(head | {"maker": 3}))
    with pytest.raises(GenError, match="was altered; delete the folder"):
        records.source()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": LABELS[:4]}, "4 values of 'label' for 10 records"),
        ({"make": Toy(name="codes")}, "records of codes, sample; expected some of noise, sample, path, tokens"),
        ({"params": {"net": {"gain": jnp.float32("nan")}}}, "sample 0 has a NaN or infinite 'sample'"),
    ],
)
def test_what_cannot_be_recorded(tmp_path, change, message):
    with pytest.raises(GenError, match=message):
        toy(tmp_path / "r", **change)


NETWORK = DiTConfig(size=(4,), channels=2, patch=1, width=8, depth=1, heads=1, num_classes=3)
TEACHER = DiffusionGenerator(Denoiser(NETWORK, Linear(), Predict("velocity")), Sampler(Euler(), steps=4))


def test_a_solved_path_goes_from_the_noise_to_the_sample(tmp_path):
    params = {"net": jax.tree.map(lambda a: a + 0.1, TEACHER.denoiser.net.init(jax.random.key(0)))}
    make = Solved(TEACHER, points=(0, 2, 4))
    records = make_records(make, params, tmp_path / "r", count=3, maker="t", cond={"label": LABELS[:3]}, label="")
    rows = records.source().gather(np.arange(3))
    assert rows["path"].shape == (3, 3, 4, 2)
    np.testing.assert_array_equal(rows["path"][:, 0], rows["noise"])
    np.testing.assert_array_equal(rows["path"][:, 2], rows["latent"])
    alone = TEACHER.latents(params, sample_keys(SEED, jnp.arange(3)), {"label": jnp.asarray(LABELS[:3])})
    np.testing.assert_allclose(rows["latent"], alone, rtol=1e-5, atol=1e-6)
    assert np.abs(rows["path"][:, 1] - rows["path"][:, 0]).max() > 1e-3


@pytest.mark.parametrize("points", [(2, 1), (0, 5), (1, 1)])
def test_points_outside_the_solver_are_refused(points):
    with pytest.raises(GenError, match="expected ascending numbers of solver steps from 0 to 4"):
        Solved(TEACHER, points)
