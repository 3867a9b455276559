"""``gen evaluate``, ``gen reference`` and ``gen compare`` on stored images and bad input; runs are in test_runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen.cli import main
from gen.data.sources import digits
from gen.metrics.protocol import PRESETS, NamedProtocol, Result
from gen.metrics.reference import Reference
from tests.cli.test_runs import fails, write_run

PIXELS, CLASSES = (digits("test").arrays[name][:120] for name in ("image", "label"))
BATCH = ("--batch", "128")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("references") / "train.npz"
    assert main(["reference", "digits:train", "--extractor", "digits-extractor", "--out", str(path), *BATCH]) == 0
    return str(path)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "held.npz"
    np.savez(path, PIXELS, CLASSES)
    return path


def evaluate(*args: object) -> Result:
    """Runs the command, which must succeed; gives what it wrote."""
    assert main(["evaluate", *map(str, args), *BATCH]) == 0
    return Result.load(args[args.index("--out") + 1])


def test_table_json_and_page(reference: str, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    result = evaluate(samples, "--reference", reference, "--out", out, "--measures", "kid", "--count", "100")
    said = capsys.readouterr()
    assert "100 of 100" in said.err
    assert "kid" in said.out
    assert "is partial: the first 100 of 120 samples" in said.out
    assert (result.protocol.count, result.protocol.split) == (100, "train")
    assert result.seconds > 0
    page = out.with_suffix(".html").read_text()
    for text in ("Samples", "Scores", "reference fingerprint", "number of samples", "By class", "Closest real images"):
        assert text in page
    assert "Partial: the first 100 of 120 samples" in page
    assert page.count("data:image/png;base64") == 3  # the grid, and the closest pairs: the reference's images are found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.html", "scores.json"]


def test_a_folder_of_files_scores_as_the_array_does(reference: str, samples: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i, image in enumerate(PIXELS):
        Image.fromarray(image[..., 0]).save(tmp_path / "images" / f"{i:03d}.png")
    held = evaluate(samples, "--reference", reference, "--out", tmp_path / "a.json").values
    found = evaluate(tmp_path / "images", "--reference", reference, "--out", tmp_path / "b.json").values
    assert set(found) == set(held) - {"accuracy"}  # no labels there
    assert found == pytest.approx({name: held[name] for name in found}, rel=1e-6)


def test_parts_of_several_jobs(
    reference: str, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = evaluate(samples, "--reference", reference, "--out", tmp_path / "whole.json")
    out = tmp_path / "parts.json"
    command = ["evaluate", str(samples), "--reference", reference, "--out", str(out), *BATCH]
    for part in ("2/3", "1/3"):
        assert main([*command, "--part", part]) == 0
        assert "the other jobs go on" in capsys.readouterr().out
        assert not out.exists()
    assert main([*command, "--part", "3/3"]) == 0
    merged = Result.load(out)
    assert merged.protocol == whole.protocol
    for name, value in whole.values.items():
        assert merged.values[name] == pytest.approx(value, rel=1e-6), name
    assert not list(tmp_path.glob("*.npz"))
    for part, message in (("4/3", "part 4 of 3 of 120 samples"), ("one", "--part one is not K/M")):
        assert message in fails(capsys, *command, "--part", part)


def test_sample_sets_bring_what_is_known_of_them(
    reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny").mkdir()
    run = write_run(tmp_path / "tiny")
    for name in ("set", "set.zip", "set.npz"):
        assert main(["sample", str(run), "--seeds", "5-44", "--out", str(tmp_path / name)]) == 0
        protocol = evaluate(tmp_path / name, "--reference", reference, "--out", tmp_path / f"{name}.json").protocol
        known = (protocol.quantiser, protocol.labels, protocol.seeds, protocol.count)
        assert known == ("round", "seed mod classes", "5-44", 40)
    assert main(["compare", *(str(tmp_path / f"{name}.json") for name in ("set", "set.zip", "set.npz"))]) == 0
    again = [tmp_path / "set", "--reference", reference]
    assert "was made with quantiser 'round'" in fails(capsys, "evaluate", *again, "--quantiser", "truncate")
    (tmp_path / "set" / "000007.png").unlink()
    assert "holds 39 of the 40 samples" in fails(capsys, "evaluate", *again)


def test_compare(reference: str, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, fewer = (tmp_path / f"{name}.json" for name in "abc")
    evaluate(samples, "--reference", reference, "--out", a)
    evaluate("digits:test", "--reference", reference, "--out", b, "--count", 120)
    evaluate(samples, "--reference", reference, "--out", fewer, "--count", 60)
    capsys.readouterr()
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.count("0.") > 8
    assert "neighbour rule" in (tmp_path / "page.html").read_text()
    assert "count is 120 and 60" in fails(capsys, "compare", a, b, fewer)
    assert main(["compare", str(a), str(b), str(fewer), "--force"]) == 0
    assert re.search(r"^count +120 +120 +60$", capsys.readouterr().out, re.M)
    assert "nothing to be compared" in fails(capsys, "compare", a)
    assert "given twice" in fails(capsys, "compare", a, a)
    assert "run gen evaluate" in fails(capsys, "compare", tmp_path, a)


def test_protocols_of_the_field(
    reference: str, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", samples, "--reference", reference, "--protocol", "digits"]
    said = fails(capsys, *command)
    assert "1797 samples asked of a source with 120; no score is given for a partial set" in said
    assert "has count 1797, this evaluation 120" in fails(capsys, *command, "--count", 120)
    assert "has labels 'seed mod classes', this evaluation 'given' (unknown)" in fails(
        capsys, "evaluate", "digits:all", *command[2:]
    )
    forced = evaluate(*command[1:], "--count", 120, "--force", "--out", tmp_path / "forced.json")
    assert forced.protocol.name == "digits, but for count, labels"
    assert "did you mean 'edm-cifar10'" in fails(capsys, *command[:4], "--protocol", "edm-cifar")
    assert main(["list", "protocols"]) == 0
    assert main(["list", "measures"]) == 0
    said = capsys.readouterr().out
    assert "adm-imagenet256" in said
    assert "class_frechet" in said


def test_a_run_is_sampled_as_its_protocol_wants_it(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    run = write_run(tmp_path / "tiny")
    fields = {"extractor": "digits", "count": 50, "labels": "random", "quantiser": "truncate", "split": "train"}
    monkeypatch.setitem(PRESETS, "toy", NamedProtocol("a toy", "digits-extractor", fields))
    found = evaluate(run, "--reference", reference, "--protocol", "toy", "--out", tmp_path / "a.json")
    assert {name: getattr(found.protocol, name) for name in fields} == fields
    assert (found.protocol.name, found.protocol.seeds) == ("toy", "0-49")
    assert json.loads(found.subject["sampler"])["steps"] == 2
    assert ", steps 2, " in (tmp_path / "a.html").read_text()  # the sampler in words


def _images(path: Path, *, damage: str) -> Path:
    """A folder of 20 good images and one that is cut off, or none at all."""
    path.mkdir()
    for i, image in enumerate(PIXELS[:20]):
        Image.fromarray(image[..., 0]).save(path / f"{i:03d}.png")
    whole = (path / "003.png").read_bytes()
    content = {"cut": whole[: len(whole) // 2], "text": b"no image", "large": b""}[damage]
    if damage == "large":
        Image.fromarray(np.zeros((9, 8), np.uint8)).save(path / "003.png")
    else:
        (path / "003.png").write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "003.png is not a readable image"),
        ("text", "003.png is not a readable image"),
        ("large", "003.png is (9, 8, 1), others are (8, 8, 1)"),
    ],
)
def test_damaged_images(
    damage: str, message: str, reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _images(tmp_path / "images", damage=damage)
    assert message in fails(capsys, "evaluate", folder, "--reference", reference, "--out", tmp_path / "s.json")
    assert not (tmp_path / "s.json").exists()
    assert message in fails(capsys, "reference", folder, "--extractor", "digits-extractor", "--out", tmp_path / "r.npz")
    assert not (tmp_path / "r.npz").exists()


def test_bad_arrays_and_references(
    reference: str, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.npz"

    def said(*args: object) -> str:
        return fails(capsys, "evaluate", bad, "--reference", reference, *args)

    np.savez(bad, PIXELS.astype(np.float32))
    assert "holds float32 (120, 8, 8, 1); expected uint8" in said()
    np.savez(bad, PIXELS[:0])
    assert "no images in" in said()
    np.savez(bad, PIXELS, CLASSES[:100])
    assert "for 120 images" in said()
    np.savez(bad, other=PIXELS)
    assert "has no image, images or arr_0" in said()
    bad.write_bytes(samples.read_bytes()[:2000])
    assert "cannot be read" in said()
    bare = tmp_path / "bare.npz"
    np.savez(bare, mu=np.zeros(64), sigma=np.eye(64))
    assert "expected statistics with the protocol" in fails(capsys, "evaluate", samples, "--reference", bare)
    assert "121 samples asked of a source with 120" in fails(
        capsys, "evaluate", samples, "--reference", reference, "--count", 121
    )
    assert "no images at" in fails(capsys, "evaluate", tmp_path / "absent", "--reference", reference)
    few = tmp_path / "few.npz"
    np.savez(few, PIXELS[CLASSES != 3], CLASSES[CLASSES != 3])
    command = ["evaluate", few, "--reference", reference, "--measures", "class_frechet", "--out", tmp_path / "f.json"]
    assert main([*map(str, command)]) == 2
    assert "error: class 3 has 0 samples" in capsys.readouterr().err
    assert not (tmp_path / "f.json").exists()


def test_references_say_where_their_images_lay(reference: str, samples: Path, tmp_path: Path) -> None:
    held = Reference.load(reference)
    assert held.data[0] == "digits:train"
    assert held.data[1] == held.identity
    assert json.loads(str(np.load(reference)["protocol"]))["split"] == "train"
    path = tmp_path / "moved.npz"
    assert main(["reference", str(samples), "--out", str(path), *BATCH]) == 0
    assert Reference.load(path).protocol.extractor == "digits"  # the first that takes such images
    samples.rename(tmp_path / "elsewhere.npz")
    try:
        out = tmp_path / "s.json"
        evaluate(tmp_path / "elsewhere.npz", "--reference", path, "--out", out)
        assert "not at hand" in out.with_suffix(".html").read_text()
    finally:
        (tmp_path / "elsewhere.npz").rename(samples)


@pytest.mark.slow
def test_a_monitored_training_run_and_its_page(reference: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    smaller = ("--steps", "4", "--stages.0.batch", "16", "--engine.checkpoint_every", "1000")
    options = ("--monitor", reference, "--monitor-every", "2", "--monitor-count", "64")
    assert main(["train", "dit-smoke", "--outdir", str(run), *smaller, *options]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "frechet_distance" in record] == [2, 4]
    assert json.loads((run / "monitor.json").read_text())["count"] == 64
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Fréchet distance while training" in page
    assert "its checkpoint is kept" in page
    assert "<dt>reference fingerprint</dt>" in page
