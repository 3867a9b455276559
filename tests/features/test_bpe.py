import gzip
import json

import numpy as np
import pytest

from gen.errors import GenError
from gen.features.bpe import Vocabulary

MERGES = [("l", "o"), ("lo", "w</w>"), ("e", "r</w>"), ("w", "er</w>"), ("lo", "wer</w>"), ("Ã", "©</w>")]


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "bpe.txt.gz"
    path.write_bytes(gzip.compress("\n".join(['"version"', *map(" ".join, MERGES), ""]).encode()))
    return path


def test_published_file(published, tmp_path):
    vocabulary = Vocabulary.read(published)
    ids = vocabulary.ids
    assert len(ids) == 512 + len(MERGES) + 2
    # the order of openai/CLIP: 188 printable bytes, the 68 others, the same at the ends of words, merges, start, end
    assert (ids["!"], ids["a"], ids["ÿ"], ids["Ā"], ids["!</w>"], ids["lo"]) == (0, 64, 187, 188, 256, 512)
    assert (ids["<|startoftext|>"], ids["<|endoftext|>"]) == (518, 519)
    assert vocabulary.encode("low lower") == [ids["low</w>"], ids["lower</w>"]]
    assert vocabulary.encode("slow") == [ids["s"], ids["low</w>"]]
    assert vocabulary.encode("lows") == [ids["lo"], ids["w"], ids["s</w>"]]
    vocabulary.save(tmp_path / "kept" / "v.json")
    again = Vocabulary.read(tmp_path / "kept" / "v.json")
    assert again.fingerprint() == vocabulary.fingerprint()
    assert again.encode("lower low") == vocabulary.encode("lower low")


def test_two_files_of_transformers_are_the_same(published, tmp_path):
    vocabulary = Vocabulary.read(published)
    (tmp_path / "vocab.json").write_text(json.dumps(dict(vocabulary.ids)))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]), "utf-8")
    for path in (tmp_path, tmp_path / "vocab.json"):
        assert Vocabulary.read(path).fingerprint() == vocabulary.fingerprint()


def test_texts_are_cleaned_and_cut_into_words(published):
    vocabulary = Vocabulary.read(published)
    back = {i: token for token, i in vocabulary.ids.items()}

    def split(text):
        joined = "".join(back[i] for i in vocabulary.encode(text))
        return joined.split("</w>")[:-1]

    assert split("A  DOG's\tball, 42!!") == ["a", "dog", "'s", "ball", ",", "4", "2", "!!"]
    assert split("fish &amp; chips") == ["fish", "&", "chips"]
    assert split("you'll don't 'tis") == ["you", "'ll", "don", "'t", "'t", "is"]
    assert split("x²y_z") == ["x", "Â²", "y", "_", "z"]  # not a letter, a number; an underscore is neither
    assert vocabulary.encode("É") == [vocabulary.ids["Ã©</w>"]]  # bytes, lowered


def test_rows_have_start_end_and_zeros(published):
    vocabulary = Vocabulary.read(published)
    start, low, end = (vocabulary.ids[t] for t in ("<|startoftext|>", "low</w>", "<|endoftext|>"))
    rows = vocabulary.tokens(["low", "", "low low low low"], length=5)
    assert rows.dtype == np.int32
    assert rows.tolist() == [[start, low, end, 0, 0], [start, end, 0, 0, 0], [start, low, low, low, end]]


def test_other_files_are_refused(tmp_path):
    for name, content, message in (
        ("a.txt", '"version"\na b c\n', "'a b c' is no pair"),
        ("b.txt", '"version"\n', "no merges"),
        ("c.json", "{}", "not a vocabulary"),
        ("d.txt.gz", "plain", "not a vocabulary"),
        ("e.json", json.dumps({"ids": {"a": 1}, "merges": [["a", "b"]]}), "it has no"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(GenError, match=message):
            Vocabulary.read(tmp_path / name)
    with pytest.raises(GenError, match=r"no vocabulary at .*absent\.txt\.gz; get bpe_simple_vocab"):
        Vocabulary.read(tmp_path / "absent.txt.gz")
