import pickle
import struct
import zipfile

import numpy as np
import pytest

from gen.errors import GenError
from gen.pretrained.readers import read_weights


def _text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _module(name, attributes):
    """The opcodes with which torch.jit.save writes a module: a class of the archive, and its attributes."""
    entries = b"".join(_text(key) + value for key, value in attributes.items())
    return f"c__torch__\n{name}\n".encode() + b")\x81}(" + entries + b"ub"


def _tensor(key, shape):
    size = int(np.prod(shape))
    storage = (
        b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu") + b"K" + bytes([size]) + b"tQ"
    )
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    ints = [b"(" + b"".join(b"K" + bytes([n]) for n in values) + b"t" for values in (shape, strides)]
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x00"
        + b"".join(ints)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def _archive(path, pickled, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", pickled)
        archive.writestr("net/code/__torch__/net.py", "raise SystemExit\n" * 200, zipfile.ZIP_DEFLATED)
        for key, array in storages.items():
            archive.writestr(f"net/data/{key}", array.astype("<f4").tobytes())


def test_archives_are_read_as_state_dicts(tmp_path):
    kernel, mean = np.arange(6.0).reshape(2, 3), np.arange(3.0)
    inner = _module("Conv", {"weight": _tensor("0", (2, 3)), "mean": _tensor("1", (3,)), "training": b"\x89"})
    sizes = b"ctorch.jit._pickle\nbuild_intlist\n(](K\x02K\x03etR"
    outer = _module("Net", {"layers": _module("Layers", {"conv": inner}), "sizes": sizes, "training": b"\x89"})
    _archive(tmp_path / "net.pt", b"\x80\x02" + outer + b".", {"0": kernel, "1": mean})
    found = read_weights(tmp_path / "net.pt")
    assert set(found) == {"layers.conv.weight", "layers.conv.mean"}
    np.testing.assert_array_equal(found["layers.conv.weight"], kernel)
    np.testing.assert_array_equal(found["layers.conv.mean"], mean)


def test_other_names_stay_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return print, ("run",)

    _archive(tmp_path / "bad.pt", pickle.dumps(Bad(), 2), {})
    with pytest.raises(GenError, match="nothing was run"):
        read_weights(tmp_path / "bad.pt")
    _archive(tmp_path / "odd.pt", b"\x80\x02ctorch.jit._pickle\nsystem\n.", {})
    with pytest.raises(GenError, match="nothing was run"):
        read_weights(tmp_path / "odd.pt")


def test_a_module_inside_itself_is_refused(tmp_path):
    loop = b"\x80\x02c__torch__\nNet\n)\x81q\x00}(" + _text("self") + b"h\x00ub."
    _archive(tmp_path / "loop.pt", loop, {})
    with pytest.raises(GenError, match="contains itself"):
        read_weights(tmp_path / "loop.pt")
