"""Weight files: what torch and safetensors write is read; what is damaged or hostile is refused in one line."""

import json
import random
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gen import arrays
from gen.errors import GenError
from gen.pretrained.readers import read_state, read_weights

DATA = Path(__file__).parent / "data"
EXPECTED = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "column": np.array([1, 5, 9], np.float32),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "bfloat16": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "float16": np.array([0.5], np.float16),
    "float64": np.array([0.1], np.float64),
    "int64": np.array(-7, np.int64),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "tied": np.arange(12, dtype=np.float32).reshape(3, 4),
}


# ---- pickles written by hand: torch is not needed, and hostile ones can be made ----


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def row(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def table(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def storage(key: str, numel: int, kind: str = "FloatStorage") -> bytes:
    return row(text("storage"), name("torch", kind), text(key), text("cpu"), number(numel)) + b"Q"


def tensor(store: bytes, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, offset: int = 0) -> bytes:
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape))) if strides is None else strides
    sizes = (row(*map(number, v)) for v in (shape, strides))
    rest = row(store, number(offset), *sizes, b"\x89", name("collections", "OrderedDict") + b")R")
    return name("torch._utils", "_rebuild_tensor_v2") + rest + b"R"


def torch_zip(path: Path, content: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(GenError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (*parts, path.name):
        assert part in message, message


# ---- sound files ----


@pytest.mark.parametrize("file", ["bare.pt", "legacy.pt"])
def test_reads_what_torch_wrote(file: str) -> None:
    weights, entry = read_state(DATA / file)
    assert entry == ""
    assert weights.keys() == EXPECTED.keys()
    for key, expected in EXPECTED.items():
        assert weights[key].dtype == expected.dtype, key
        np.testing.assert_array_equal(weights[key], expected, err_msg=key)


def test_picks_the_average_from_a_training_checkpoint() -> None:
    weights, entry = read_state(DATA / "train.pt")
    assert entry == "ema"
    np.testing.assert_array_equal(weights["weight"], np.full((2, 2), 2.0, np.float32))  # "module." is gone
    weights, entry = read_state(DATA / "train.pt", "model")
    assert entry == "model"
    np.testing.assert_array_equal(weights["bias"], np.ones(2, np.float32))
    with pytest.raises(GenError, match="no weights under 'emma'; it has ema, model"):
        read_state(DATA / "train.pt", "emma")


def test_safetensors_agree_with_the_library(tmp_path: Path) -> None:
    plain = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in EXPECTED.items() if k != "bfloat16"}
    save_file(plain, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    arrays.write(tmp_path / "ours.safetensors", EXPECTED)
    theirs, ours = read_weights(tmp_path / "theirs.safetensors"), read_weights(tmp_path / "ours.safetensors")
    assert theirs.keys() == plain.keys()
    assert ours.keys() == EXPECTED.keys()
    for key, expected in EXPECTED.items():
        for found in (ours, theirs) if key in theirs else (ours,):
            assert found[key].dtype == expected.dtype
            np.testing.assert_array_equal(found[key], expected)
    back = load_file(tmp_path / "ours.safetensors")
    assert all(np.array_equal(back[k], v) for k, v in plain.items())


def test_handmade_zip_reads_like_a_real_one(tmp_path: Path) -> None:
    data = np.arange(6, dtype=np.float32)
    store = storage("0", 6)
    content = table(a=tensor(store, (2, 3)), b=tensor(store, (2,), (3,), 1))
    weights = read_weights(torch_zip(tmp_path / "a.pt", content, {"0": data.tobytes()}))
    np.testing.assert_array_equal(weights["a"], data.reshape(2, 3))
    np.testing.assert_array_equal(weights["b"], [1.0, 4.0])


# ---- hostile files ----

CALL = b"(" + text("touch hostile") + b"tR"
HOSTILE = {
    "posix.system": name("posix", "system") + CALL,
    "os.system": b"\x80\x04" + text("os") + text("system") + b"\x93" + CALL,
    "builtins.eval": name("builtins", "eval") + CALL,
    "builtins.getattr": name("builtins", "getattr") + CALL,
    "torch.load": name("torch", "load") + CALL,
    "torch.storage._load_from_bytes": name("torch.storage", "_load_from_bytes") + CALL,
    "numpy.load": name("numpy", "load") + CALL,
    "INST": b"(" + text("x") + b"ios\nsystem\n",
    "OBJ": b"(" + name("collections", "OrderedDict") + b"o",
    "EXT1": b"\x82\x01",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickle_is_refused_by_name(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (HOSTILE[what], table(a=HOSTILE[what]), tensor(storage("0", 0), (0,)) + HOSTILE[what] + b"b"):
        refused(torch_zip(tmp_path / "x.pt", content, {"0": b""}), what, "refused")
    assert not (tmp_path / "hostile").exists()


def test_whole_modules_are_refused_with_their_name(tmp_path: Path) -> None:
    content = name("torch.nn.modules.linear", "Linear") + b")\x81"
    refused(torch_zip(tmp_path / "m.pt", content, {}), "torch.nn.modules.linear.Linear")


def test_claims_about_sizes_are_not_believed(tmp_path: Path) -> None:
    store, data = storage("0", 2), {"0": bytes(8)}
    cases = {
        "does not fit": tensor(store, (2**40,)),
        "2 elements": tensor(store, (2**20, 2**20), (0, 0)),
        "of 2 el": tensor(store, (2,), (1,), 1),
        "non-negative": tensor(store, (-1,), (1,)),
        "another length": tensor(storage("0", 2**40), (2,)),
        "missing": tensor(storage("1", 2), (2,)),
        "two ways": table(a=tensor(store, (2,)), b=tensor(storage("0", 1, "DoubleStorage"), (1,))),
    }
    for part, content in cases.items():
        content = content if part == "two ways" else table(a=content)
        refused(torch_zip(tmp_path / "s.pt", content, data), part)


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    content = table(a=tensor(storage("0", 2**20), (2**20,)))
    bomb = torch_zip(tmp_path / "bomb.pt", content, {"0": bytes(2**22)}, zipfile.ZIP_DEFLATED)
    refused(bomb, "compressed")


def test_unhashable_and_cyclic_content_does_no_harm(tmp_path: Path) -> None:
    cyclic = b"]q\x00h\x00a"  # a list that contains itself
    good = tensor(storage("0", 2), (2,))
    weights = read_weights(torch_zip(tmp_path / "c.pt", table(a=good, loop=cyclic), {"0": bytes(8)}))
    assert list(weights) == ["a"]
    refused(torch_zip(tmp_path / "k.pt", b"}" + b"]" + good + b"s", {"0": bytes(8)}), "key")
    refused(torch_zip(tmp_path / "k.pt", b"}" + row(row(), row()) + good + b"s", {"0": bytes(8)}), "key")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"]", "list"),
        (table(epoch=number(3)), "holds no weights"),
        (table(a=table(x=tensor(storage("0", 2), (2,))), b=table(y=tensor(storage("0", 2), (2,)))), "a, b; say which"),
    ],
)
def test_content_without_one_state_dict(content: bytes, part: str, tmp_path: Path) -> None:
    refused(torch_zip(tmp_path / "w.pt", content, {"0": bytes(8)}), part)


U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def safetensors_file(path: Path, header: str, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return path


@pytest.mark.parametrize(
    ("header", "data", "part"),
    [
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 4, "4 bytes of data"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 9, "9 bytes of data"),
        ('{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}', 8, "8 bytes for shape"),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', 8, "no sizes"),
        ('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', 4, "no sizes"),
        ('{"a":{"dtype":"Q4","shape":[2],"data_offsets":[0,8]}}', 8, "unknown type Q4"),
        (json.dumps({k: {**U8, "data_offsets": v} for k, v in (("a", [0, 4]), ("b", [2, 6]))}), 6, "overlaps"),
        ('{"a":' + json.dumps(U8) + ',"a":' + json.dumps(U8) + "}", 4, "twice"),
        ('{"a":' * 50000, 0, "unreadable header"),
        ("[1]", 0, "unreadable header"),
    ],
)
def test_damaged_safetensors(header: str, data: int, part: str, tmp_path: Path) -> None:
    refused(safetensors_file(tmp_path / "d.safetensors", header, bytes(data)), part)


def test_safetensors_header_length_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(path, "claims")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(GenError, match="no weights file"):
        read_weights(tmp_path / "none.pt")
    for what, content in (("text.pt", b"hello weights"), ("empty.pt", b""), ("html.pth", b"<html>" * 9)):
        (tmp_path / what).write_bytes(content)
        refused(tmp_path / what, "neither")
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "z.pt", "data.pkl")


@pytest.mark.parametrize("file", ["bare.pt", "legacy.pt", "train.pt", "s.safetensors"])
def test_every_truncation_and_many_damages_end_in_one_line(file: str, tmp_path: Path) -> None:
    arrays.write(tmp_path / "s.safetensors", {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.int64)})
    whole = (DATA / file if file.endswith(".pt") else tmp_path / file).read_bytes()
    path = tmp_path / f"damaged{Path(file).suffix}"
    rng = random.Random(0)
    flips = [bytearray(whole) for _ in range(150)]
    for damaged in flips:
        for _ in range(rng.choice([1, 1, 2, 8])):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
    cuts = [whole[:n] for n in range(0, len(whole), 11)]
    for content in cuts:
        path.write_bytes(content)
        refused(path)
    messages = []
    for content in flips:
        path.write_bytes(content)
        try:
            read_weights(path)
        except GenError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)
