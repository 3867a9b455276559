"""NVIDIA's pickles of whole modules: read as state dicts, nothing in them run, damage and hostility refused."""

import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gen.diffusion.backbones.edm_unet import SongUNetConfig
from gen.errors import GenError
from gen.nn.network import Network
from gen.pretrained import edm
from gen.pretrained.readers import read_state
from gen.pretrained.systems import locate
from tests.pretrained.test_readers import name, number, row, table, tensor, text

DICT = name("collections", "OrderedDict") + b")R"
TINY = SongUNetConfig(8, width=8, mult=(1, 2), emb=2, blocks=1, attention=(4,), num_classes=3, augment=2)


def torch_bytes(array: np.ndarray) -> bytes:
    """A storage as torch.save wrote it before 1.6."""
    key = row(text("storage"), name("torch", "FloatStorage"), text("0"), text("cuda:0"), number(array.size), b"N")
    head = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
    system_info = b"}(" + text("little_endian") + b"\x88u"
    pickles = [head, b"M\xe9\x03", system_info, key + b"Q", b"](" + text("0") + b"e"]
    return b"".join(b"\x80\x02" + p + b"." for p in pickles) + struct.pack("<q", array.size) + array.tobytes()


def parameter(array: np.ndarray) -> bytes:
    data = torch_bytes(np.ascontiguousarray(array, np.float32))
    stored = name("torch.storage", "_load_from_bytes") + row(b"B" + struct.pack("<I", len(data)) + data) + b"R"
    return name("torch._utils", "_rebuild_parameter") + row(tensor(stored, array.shape), b"\x88", DICT) + b"R"


def ordered(items: dict[str, bytes]) -> bytes:
    return DICT + b"(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def attributes(tree: dict[str, Any], made: bytes = b"") -> bytes:
    """The __dict__ of a module: arrays are parameters (buffers where their name says so), dicts are modules."""
    arrays = {k: v for k, v in tree.items() if not isinstance(v, dict)}
    buffers = {k: parameter(v) for k, v in arrays.items() if k == "resample_filter"} | {"absent": b"N"}
    inner = {k: plain(v) for k, v in tree.items() if isinstance(v, dict)}
    return table(
        training=b"\x89",
        _parameters=ordered({k: parameter(v) for k, v in arrays.items() if k not in buffers}),
        _buffers=ordered(buffers),
        _non_persistent_buffers_set=b"\x8f(" + text("x") + b"\x90",
        _modules=ordered(inner),
        _init_kwargs=name("dnnlib.util", "EasyDict")
        + b")\x81"
        + b"("
        + text("img_resolution")
        + number(8)
        + made
        + b"u",
    )


def plain(tree: dict[str, Any]) -> bytes:
    return name("torch.nn.modules.container", "ModuleDict") + b")\x81" + attributes(tree) + b"b"


def persistent(kind: str, tree: dict[str, Any], source: str = "raise SystemExit", made: bytes = b"") -> bytes:
    state = attributes(tree, made)
    meta = table(type=text("class"), version=number(6), module_src=text(source), class_name=text(kind), state=state)
    return name("torch_utils.persistence", "_reconstruct_persistent_obj") + row(meta) + b"R"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(b"\x80\x04" + content + b".")
    return path


def nested(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for full, value in weights.items():
        # a layer's name inside ModuleDict has no dots
        *parents, leaf = full.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


@pytest.mark.parametrize(
    ("kind", "expected"), [("EDMPrecond", "edm"), ("VPPrecond", "edm-vp"), ("VEPrecond", "edm-ve")]
)
def test_network_and_wrapper_come_out(tmp_path: Path, kind: str, expected: str) -> None:
    params = Network(TINY).init(jax.random.key(0))
    weights = edm.IMPORTER.save(TINY, params)
    content = table(
        ema=persistent(kind, nested(weights)),
        loss_fn=persistent("EDMLoss", {}),
        augment_pipe=persistent("AugmentPipe", {"Hz": np.ones(3, np.float32)}),
        dataset_kwargs=name("dnnlib.util", "EasyDict") + b")\x81",
    )
    read, entry = read_state(write(tmp_path / "net.pkl", content))
    assert entry == "ema"
    assert set(read) == {*weights, f"class:{kind}"}
    importer = locate(None, read).importer
    assert importer.name == expected
    config, back, report = importer.load(read)
    assert (config, report.clean) == (TINY, True)
    jax.tree.map(np.testing.assert_array_equal, back, dict(params))
    other, entry = read_state(tmp_path / "net.pkl", "augment_pipe")
    assert set(other) == {"Hz", "class:AugmentPipe"}


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(GenError) as caught:
        read_state(path)
    assert "\n" not in str(caught.value)
    for part in (*parts, path.name):
        assert part in str(caught.value)


def test_other_settings_of_a_wrapper_are_refused_by_name(tmp_path: Path) -> None:
    array = {"weight": np.ones(4, np.float32)}
    for value, fits in ((0.5, True), (1.0, False)):
        made = text("sigma_data") + b"G" + struct.pack(">d", value)
        file = write(tmp_path / "net.pkl", table(ema=persistent("EDMPrecond", array, made=made)))
        if fits:
            assert "weight" in read_state(file)[0]
        else:
            with pytest.raises(GenError, match=r"EDMPrecond was made with sigma_data 1\.0, published ones with 0\.5"):
                read_state(file)


def test_hostile_and_damaged_files_are_refused(tmp_path: Path) -> None:
    array = {"weight": np.ones(4, np.float32)}
    file = tmp_path / "net.pkl"
    refused(write(file, name("os", "system") + row(text("true")) + b"R"), "os.system")
    refused(write(file, name("torch_utils.persistence", "persistent_class") + row(number(1)) + b"R"), "persistent")
    refused(write(file, table(ema=persistent("a.b", array))), "no name")
    refused(write(file, table(ema=persistent("Net", array)).replace(b"class_name", b"class_nam_")), "damaged")
    # bytes of a tensor that hold a call, and bytes that are cut off
    evil = b"\x80\x02" + name("os", "system") + row(text("true")) + b"R."
    for data in (evil, torch_bytes(np.ones(4, np.float32))[:-3]):
        nested_bytes = (
            name("torch.storage", "_load_from_bytes") + row(b"B" + struct.pack("<I", len(data)) + data) + b"R"
        )
        refused(write(file, tensor(nested_bytes, (4,))), "")
    # a module inside of itself
    loop = name("torch.nn.modules.container", "ModuleDict") + b")\x81" + b"q\x00"
    loop += table(_modules=ordered({"again": b"h\x00"})) + b"b"
    refused(write(file, table(ema=loop)), "contains itself")
    refused(write(file, table(ema=b"V1\nQ")), "outside of itself")


def test_truncations_and_flips_never_do_more_than_fail(tmp_path: Path) -> None:
    content = b"\x80\x04" + table(ema=persistent("Net", {"a": {"weight": np.ones((2, 3), np.float32)}})) + b"."
    file = tmp_path / "net.pkl"
    random = np.random.default_rng(0)
    messages = []
    for _ in range(300):
        data = bytearray(content)
        if random.random() < 0.3:
            del data[random.integers(len(data)) :]
        else:
            data[random.integers(2, len(data))] ^= 1 << random.integers(8)
        file.write_bytes(data)
        try:
            read_state(file)
        except GenError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)
