"""Writing samples: forms, resuming, and refusing what belongs to another job."""

import dataclasses
import json
import os
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gen.errors import GenError
from gen.sampling import generate as module
from gen.sampling.generate import generate, quantise
from gen.sampling.sample_files import contact_sheet, read_note
from gen.training.sharding import make_mesh
from tests.processes import devices

LABELS = np.arange(10, dtype=np.int32) % 3
PARAMS = {"net": {"gain": jnp.float32(0.4)}}


@dataclasses.dataclass(frozen=True)
class Painter:
    """A generator of noise images whose mean is set by the label."""

    channels: int = 1
    nfe: int = 1

    def __call__(self, params, keys, cond):
        noise = jax.vmap(lambda key: jax.random.normal(key, (4, 4, self.channels)))(keys)
        mean = cond["label"][:, None, None, None] / 4.0 if "label" in cond else 0.0
        return params["net"]["gain"] * noise + mean


def make(out, seeds=range(20, 30), *, labels=LABELS, batch=4, params=PARAMS, channels=1, mesh=None):
    generate(Painter(channels), params, seeds=seeds, labels=labels, out=out, batch=batch, mesh=mesh, label="")


def read_folder(path):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(path.glob("[0-9]*.png"))}


@pytest.fixture
def reference(tmp_path):
    make(tmp_path / "reference.npz")
    with np.load(tmp_path / "reference.npz") as file:
        return file["arr_0"], file["arr_1"]


def test_quantise_rounds_half_up_and_clips():
    x = jnp.array([-1.5, -1.0, 0.0, 1.0, 2.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1])
    np.testing.assert_array_equal(quantise(x), [0, 0, 128, 255, 255, 100, 101])
    levels = jnp.arange(256)
    np.testing.assert_array_equal(quantise(levels / 127.5 - 1.0), levels)


def test_npz(reference):
    images, labels = reference
    assert images.shape == (10, 4, 4, 1)
    assert images.dtype == np.uint8
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    np.testing.assert_array_equal(labels, LABELS)


@pytest.mark.parametrize("channels", [1, 3])
def test_folder(tmp_path, channels):
    make(tmp_path / "out", channels=channels)
    make(tmp_path / "same.npz", channels=channels)
    images = read_folder(tmp_path / "out")
    assert list(images) == [f"{seed:06d}.png" for seed in range(20, 30)]
    with np.load(tmp_path / "same.npz") as file:
        np.testing.assert_array_equal(np.stack(list(images.values())).reshape(10, 4, 4, channels), file["arr_0"])
    assert np.asarray(Image.open(tmp_path / "out" / "grid.png")).shape[:2] == (3 * 48, 4 * 48)
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["labels"] == LABELS.tolist()
    assert not list((tmp_path / "out").glob(".*"))


def test_zip_has_the_layout_of_edm_datasets(tmp_path, reference):
    make(tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        labels = dict(json.loads(archive.read("dataset.json"))["labels"])
        assert labels["00000/img00000004.png"] == LABELS[4]
        with archive.open("00000/img00000004.png") as file:
            np.testing.assert_array_equal(np.asarray(Image.open(file)), reference[0][4, :, :, 0])
        assert len(labels) == 10
    assert not (tmp_path / "out.zip.partial").exists()


def test_sheet(tmp_path):
    make(tmp_path / "grid.png")
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape == (144, 192)


def test_contact_sheet_keeps_large_images_as_they_are():
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 50, 3), dtype=np.uint8)
    sheet = contact_sheet(images)
    assert sheet.shape == (128, 150, 3)
    np.testing.assert_array_equal(sheet[64:, 50:100], images[4])
    assert not sheet[64:, 100:].any()


def test_images_depend_on_seed_and_label_alone(tmp_path, reference):
    make(tmp_path / "part.npz", range(23, 28), labels=LABELS[3:8], batch=3)
    make(tmp_path / "mesh.npz", batch=8, mesh=make_mesh())
    with np.load(tmp_path / "part.npz") as part, np.load(tmp_path / "mesh.npz") as mesh:
        np.testing.assert_array_equal(part["arr_0"], reference[0][3:8])
        np.testing.assert_array_equal(mesh["arr_0"], reference[0])


@pytest.mark.parametrize("name", ["out", "out.zip", "out.npz"])
def test_an_interrupted_job_goes_on_where_it_was(tmp_path, name, monkeypatch):
    class Killed(Exception):
        pass

    def dying(*args, **kwargs):
        def stop(done, count):
            if done >= 4:
                raise Killed

        return run_indexed(*args, **kwargs, on_batch=stop)

    run_indexed = module.run_indexed
    monkeypatch.setattr(module, "run_indexed", dying)
    with pytest.raises(Killed):
        make(tmp_path / name)
    if name != "out":
        assert not (tmp_path / name).exists()
    started = []

    def watched(*args, **kwargs):
        started.append(kwargs["writer"].next)
        return run_indexed(*args, **kwargs)

    monkeypatch.setattr(module, "run_indexed", watched)
    make(tmp_path / name)
    if name != "out.npz":  # arrays are synced once a second, pictures at once
        assert started == [4]
    make(tmp_path / f"whole{name}")
    if name == "out":
        one, two = read_folder(tmp_path / name), read_folder(tmp_path / f"whole{name}")
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[k], two[k]) for k in one)
    else:
        assert (tmp_path / name).read_bytes() == (tmp_path / f"whole{name}").read_bytes()
    make(tmp_path / name)
    assert started[-1] == 10


@pytest.mark.parametrize("name", ["out", "out.zip", "out.npz"])
def test_samples_of_another_job_are_refused(tmp_path, name):
    make(tmp_path / name)
    changes = [
        {"params": {"net": {"gain": jnp.float32(0.41)}}},
        {"labels": (LABELS + 1) % 3},
        {"channels": 3},
    ]
    for change in [*changes, *([] if name == "out" else [{"seeds": range(21, 31)}])]:  # a folder takes more seeds
        with pytest.raises(GenError, match="choose another output"):
            make(tmp_path / name, **change)


def test_seeds_in_any_order(tmp_path, reference):
    make(tmp_path / "some.npz", [29, 20, 25], labels=LABELS[[9, 0, 5]], batch=2)
    make(tmp_path / "some", [29, 20, 25], labels=LABELS[[9, 0, 5]], batch=2)
    with np.load(tmp_path / "some.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], reference[0][[9, 0, 5]])
        np.testing.assert_array_equal(file["arr_1"], LABELS[[9, 0, 5]])
    assert list(read_folder(tmp_path / "some")) == ["000020.png", "000025.png", "000029.png"]
    assert read_note(tmp_path / "some")["seeds"] == "20,25,29"
    assert read_note(tmp_path / "some.npz")["seeds"] == "29,20,25"


def test_further_seeds_add_to_a_folder(tmp_path, reference):
    out, made = tmp_path / "out", []

    class Counting(Painter):
        def __call__(self, params, keys, cond):
            jax.debug.callback(lambda k: made.append(len(k)), keys)
            return super().__call__(params, keys, cond)

    def more(seeds):
        rows = np.asarray(seeds) - 20
        generate(Counting(), PARAMS, seeds=seeds, labels=LABELS[rows], out=out, batch=1, label="")
        jax.effects_barrier()

    more([22, 27])
    sheet = (out / "grid.png").read_bytes()
    more(range(20, 30))
    assert sum(made) == 10
    assert (out / "grid.png").read_bytes() != sheet
    note = json.loads((out / "samples.json").read_text())
    assert (note["seeds"], note["labels"]) == ("20-29", LABELS.tolist())
    np.testing.assert_array_equal(np.stack(list(read_folder(out).values())), reference[0][..., 0])
    more([23])  # fewer than there are: nothing to do, and nothing forgotten
    assert sum(made) == 10
    assert read_note(out)["seeds"] == "20-29"
    with pytest.raises(GenError, match="holds seed 25 as class 2, not 1"):
        generate(Counting(), PARAMS, seeds=[24, 25], labels=np.asarray([1, 1], np.int32), out=out, batch=1, label="")


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "x.gif", "x.npy", "x.tar"])
def test_endings_of_other_files_make_no_folder(tmp_path, name):
    with pytest.raises(GenError, match=r"samples are not written as \.\w+ .*write \.png for one contact sheet"):
        make(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "000020.png").write_bytes(b"mine")
    with pytest.raises(GenError, match="holds no samples of this program"):
        make(tmp_path / "photos")
    assert (tmp_path / "photos" / "000020.png").read_bytes() == b"mine"
    (tmp_path / "a.zip").write_bytes(b"not a zip")
    with pytest.raises(GenError, match="choose another output file"):
        make(tmp_path / "a.zip")


def test_nan_is_named_and_never_written(tmp_path):
    with pytest.raises(GenError, match="sample 20 has a NaN"):
        make(tmp_path / "out", params={"net": {"gain": jnp.float32("nan")}})
    assert not read_folder(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1, 2, 1]}, "seeds 1-2,1; expected different seeds"),
        ({"seeds": range(0)}, "seeds none; expected different seeds"),
        ({"seeds": [3, -1]}, "expected different seeds"),
        ({"seeds": range(3)}, "10 values of 'label' for 3 seeds"),
    ],
)
def test_bad_requests_are_refused(tmp_path, options, message):
    with pytest.raises(GenError, match=message):
        make(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


MANY_DEVICES = """
import sys, jax
from gen.training.sharding import MeshConfig, make_mesh
from tests.sampling.test_generate import make
assert jax.device_count() == 8
make(sys.argv[1], batch=8, mesh=make_mesh(MeshConfig(data=4, fsdp=2)))
"""


def test_eight_devices_make_the_same_images(tmp_path, reference):
    path = tmp_path / "eight.npz"
    command = [sys.executable, "-c", MANY_DEVICES, str(path)]
    subprocess.run(command, check=True, env=os.environ | devices(8), timeout=300)
    with np.load(path) as file:
        np.testing.assert_allclose(file["arr_0"].astype(int), reference[0].astype(int), atol=1)
        np.testing.assert_array_equal(file["arr_1"], reference[1])


def test_unconditional_samples_have_no_labels(tmp_path):
    make(tmp_path / "out.npz", labels=None)
    with np.load(tmp_path / "out.npz") as file:
        assert file.files == ["arr_0"]
