"""`gen.arrays`: paths of a tree, digests, and the safetensors codec."""

import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen import arrays
from gen.errors import GenError
from gen.tokenizers.encode import tokenizer_identity
from gen.tokenizers.kl_vae import KLVAEConfig


def test_paths_lead_to_leaves_and_back() -> None:
    tree = {"b": {"y": 1, "x": 2}, "a": 0}
    assert list(arrays.flatten(tree).items()) == [("a", 0), ("b/x", 2), ("b/y", 1)]
    assert arrays.unflatten(arrays.flatten(tree)) == tree
    assert arrays.map_paths(lambda path, leaf: f"{path}={leaf}", tree)["b"] == {"y": "b/y=1", "x": "b/x=2"}
    assert arrays.flatten({"layers": [3, 4]}) == {"layers/0": 3, "layers/1": 4}
    for clash in ({"a": 0, "a/b": 1}, {"a/b": 1, "a": 0}):
        with pytest.raises(GenError, match="both for an array and for a group"):
            arrays.unflatten(clash)


def test_digests_are_those_that_runs_and_caches_have_stored() -> None:
    tree = {"enc": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, "scale": np.float32(2.5)}
    assert arrays.digest(arrays.flatten(tree)) == "dd31bac69abbe361"
    assert tokenizer_identity(KLVAEConfig(), tree).split()[1] == "28d3cb3bd444bf57"


def test_arrays_round_trip(tmp_path: Path) -> None:
    tree = {
        "enc": {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "ids": np.arange(3, dtype=np.int64)},
        "scale": np.float32(2.5),
        "mask": np.asarray([True, False]),
        "none": np.zeros((0, 3), np.float16),
    }
    path = tmp_path / "a.safetensors"
    arrays.save(path, tree, {"from": "test"})
    back = arrays.load(path)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    back["enc"]["w"][0] = 0  # writable


def test_arrays_are_read_by_the_format_s_own_package(tmp_path: Path) -> None:
    from safetensors import safe_open

    arrays.save(tmp_path / "a.safetensors", {"a": {"b": np.arange(6.0).reshape(2, 3)}}, {"k": "v"})
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("a/b"), np.arange(6.0).reshape(2, 3))
        assert file.metadata() == {"k": "v"}


def test_bad_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(GenError, match="without '/'"):
        arrays.save(path, {"a/b": np.ones(2)})
    arrays.save(path, {"a": np.ones(100)})
    whole = path.read_bytes()
    for broken in (whole[:-8], whole[:20], b"", b"x" * 64, whole.replace(b'"F64"', b'"F32"')):
        path.write_bytes(broken)
        with pytest.raises(GenError, match="not a whole safetensors file"):
            arrays.load(path)
    path.write_bytes(struct.pack("<Q", 2) + b"[]")
    with pytest.raises(GenError, match="no table of arrays"):
        arrays.metadata(path)
    with pytest.raises(GenError, match="cannot read"):
        arrays.load(tmp_path / "none.safetensors")


def test_identity_sees_content_names_types_and_shapes_but_not_the_reading() -> None:
    a = np.arange(12, dtype=np.int32)
    same = arrays.digest({"a": a})
    assert arrays.digest({"a": a.copy()}, rows=5) == same
    others = [{"b": a}, {"a": a.astype(np.int64)}, {"a": a.reshape(6, 2)}, {"a": a[::-1]}, {"a": a, "b": a}]
    assert len({same, *map(arrays.digest, others)}) == len(others) + 1


def test_written_header_is_aligned_and_sorted(tmp_path: Path) -> None:
    arrays.write(tmp_path / "w.safetensors", {"b": np.zeros(1, np.uint8), "a": np.ones(3, np.float32)})
    raw = (tmp_path / "w.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert length % 8 == 0
    assert list(json.loads(raw[8 : 8 + length])) == ["a", "b"]
    with pytest.raises(GenError, match="'c' is complex64"):
        arrays.write(tmp_path / "c.safetensors", {"c": np.zeros(1, np.complex64)})
