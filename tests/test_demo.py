"""The demo's pieces, and (slow) the whole path killed at random moments."""

import numpy as np
import pytest

import gen
from gen.cli import main
from gen.data.sources import digits
from gen.errors import GenError
from gen.experiments import build, demo, demo_tokens, presets
from gen.files import read_json, write_json


def test_presets_are_found_and_need_what_they_say():
    table = {name: preset for name, preset in presets().items() if name.startswith("demo-")}
    assert set(table) == {"demo-tokenizer", "demo-teacher", "demo-student"}
    assert build("demo-tokenizer", {}).config.stages[0].steps == demo.Budget().tokenizer
    with pytest.raises(GenError, match="needs a teacher"):
        build("demo-student", {"data": "nowhere"})


def test_baselines_have_the_labels_they_claim():
    sets = demo.baselines(200)
    images, labels = sets["class means"]
    train = digits("train").arrays
    for c in range(10):
        expected = np.rint(train["image"][train["label"] == c].astype(np.float64).mean(0))
        assert np.abs(images[labels == c].astype(int) - expected).max() <= 1
    for images, labels in sets.values():
        assert images.dtype == np.uint8
        assert images.shape == (len(labels), 8, 8, 1)


def test_another_demo_in_the_folder_is_refused(tmp_path):
    write_json(tmp_path / "plan.json", {"tokenizer": {"made of": {"its settings": "of another seed"}, "seconds": 1.0}})
    with pytest.raises(GenError, match=r"step 'tokenizer' in .* was made before its settings changed"):
        demo.run(tmp_path, smoke=True)


@pytest.mark.slow
def test_killed_five_times_equals_undisturbed(tmp_path):
    from scripts.kill_demo import check

    assert check(5, 0, tmp_path) == []


@pytest.mark.slow
def test_digits_by_tokens(tmp_path, capsys):
    out = tmp_path / "demo-tokens"
    demo_tokens.run(out, smoke=True)
    found = read_json(out / "scores" / "RAR-token-by-token.json")["values"]
    assert 0 < found["bits_per_image"] < 16 * np.log2(256) + 8
    assert found["unigram_bits_per_image"] < 16 * np.log2(256) + 1
    assert (out / "report.html").stat().st_size > 10_000
    capsys.readouterr()
    demo_tokens.run(out, smoke=True)
    assert capsys.readouterr().out.count("done before") == 6


@pytest.mark.slow
def test_a_student_is_distilled_by_one_command(tmp_path, capsys):
    demo.run(tmp_path / "demo", smoke=True)
    written = (tmp_path / "demo" / "report.html").stat().st_mtime_ns
    capsys.readouterr()
    demo.run(tmp_path / "demo", smoke=True)
    assert capsys.readouterr().out.count("done before") == 6
    assert (tmp_path / "demo" / "report.html").stat().st_mtime_ns == written
    (tmp_path / "demo").rename(tmp_path / "elsewhere")
    demo.run(tmp_path / "elsewhere", smoke=True)
    assert capsys.readouterr().out.count("done before") == 6
    (tmp_path / "elsewhere").rename(tmp_path / "demo")
    short = ["--stages.0.steps", "2", "--stages.1.steps", "4", "--batch", "16"]
    teacher = ["--teacher", str(tmp_path / "demo" / "teacher")]
    command = ["distill", "demo-student", *teacher, "--outdir", str(tmp_path / "student"), *short]
    assert main([*command, "--pairs", "0"]) == 2
    assert "give a positive number of pairs" in capsys.readouterr().err
    assert main([*command, "--pairs", "40"]) == 0
    pairs = np.load(tmp_path / "student" / "pairs" / "noise.npy")
    assert pairs.shape == (40, 4, 8)
    loaded = gen.load(tmp_path / "student")
    assert loaded.step == 6
    assert loaded.sample(range(3)).shape == (3, 8, 8, 1)
    written = (tmp_path / "student" / "pairs" / "noise.npy").stat().st_mtime_ns
    assert main([*command, "--pairs", "40"]) == 0  # all is there
    assert (tmp_path / "student" / "pairs" / "noise.npy").stat().st_mtime_ns == written
    elsewhere = ["--data", str(tmp_path / "demo" / "pairs"), "--outdir", str(tmp_path / "y")]  # another demo's teacher
    assert main(["distill", "demo-student", "--teacher", str(tmp_path / "student"), *elsewhere]) == 2
    assert "holds records of demo-teacher" in capsys.readouterr().err
    from_student = ["--teacher", str(tmp_path / "demo" / "student"), "--pairs", "8"]
    assert main(["distill", "demo-student", *from_student, "--outdir", str(tmp_path / "x")]) == 2
    assert "give a teacher that a solver samples" in capsys.readouterr().err
