from pathlib import Path

import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.data.images import Arrays, Images, Zipped
from gen.errors import GenError
from tests.data.files import edm_zip, folder, picture

NAMES = [f"00000/img{i:08d}.png" for i in range(6)]


@pytest.fixture
def archive(tmp_path: Path) -> str:
    return str(edm_zip(tmp_path / "a.zip", [[name, i] for i, name in enumerate(NAMES)]))


def test_processes_and_steps_make_one_stream(archive: str) -> None:
    data = Images(archive, size=8, crop="random", flip=True)

    def take(start: int, process: int = 0, processes: int = 1, steps: int = 4) -> list[dict[str, np.ndarray]]:
        stream = data.batches(batch=4, seed=1, start=start, process=process, processes=processes)
        return [next(stream) for _ in range(steps)]

    whole = take(0)
    assert whole[0]["image"].shape == (4, 8, 8, 3)
    assert whole[0]["image"].dtype == np.uint8
    parts = [take(0, process, 2) for process in range(2)]
    for step in range(4):
        for name in ("image", "label"):
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, whole[step][name])
    np.testing.assert_array_equal(take(2, steps=1)[0]["image"], whole[2]["image"])


def test_records_are_those_of_the_files(archive: str) -> None:
    source = Images(archive).source()
    batch = source.gather(np.array([4, 0]))
    np.testing.assert_array_equal(batch["image"], [picture(4), picture(0)])
    assert batch["label"].tolist() == [4, 0]
    assert Images(archive, channels=1, labels="none").source()[0].keys() == {"image"}
    assert Images(archive, size=6, crop="adm").source()[0]["image"].shape == (6, 6, 3)


def test_configurations_round_trip(archive: str) -> None:
    data = Zipped((Images(archive, size=8, crop="adm"), Arrays("x.npz", shapes={"text": (4,)})))
    assert from_json(to_json(data)) == data
    assert Images(archive).identity() != Images(archive, flip=True).identity()


def test_side_by_side(archive: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", text=np.arange(24, dtype=np.float32).reshape(6, 4))
    features = Arrays(str(tmp_path / "t.npz"), shapes={"text": (4,)})
    record = Zipped((Images(archive), features)).source()[5]
    assert record["text"].tolist() == [20, 21, 22, 23]
    assert record["label"] == 5
    batch = next(Zipped((Images(archive), features)).batches(batch=3, seed=0, start=0))
    np.testing.assert_array_equal(batch["text"][:, 0], batch["label"] * 4)
    np.save(tmp_path / "short.npy", np.zeros((5, 2)))
    with pytest.raises(GenError, match="share their length, got 6, 5"):
        Zipped((features, Arrays(str(tmp_path / "short.npy")))).source()
    with pytest.raises(GenError, match="'text' comes from two"):
        Zipped((features, features)).source()
    with pytest.raises(GenError, match="no flip"):
        Zipped((Images(archive, flip=True), features))
    with pytest.raises(GenError, match=r"'text' .* has rows of \(4,\); expected \(768,\)"):
        Arrays(str(tmp_path / "t.npz"), shapes={"text": (768,)}).source()


def test_bad_data_end_in_one_line(archive: str, tmp_path: Path) -> None:
    with pytest.raises(GenError, match="6 records, fewer than the batch of 8"):
        Images(archive).batches(batch=8, seed=0, start=0)
    with pytest.raises(GenError, match=r"img00000000.png is 16 x 12; expected 8 x 8"):
        _ = Images(archive, size=8).source()[0]
    with pytest.raises(GenError, match="has no text vectors"):
        Images(archive, labels="text").source()
    with pytest.raises(GenError, match="has no class labels"):
        Images(str(edm_zip(tmp_path / "b.zip", None))).source()
    vectors = str(edm_zip(tmp_path / "v.zip", [[name, [0.0, 1.0]] for name in NAMES]))
    with pytest.raises(GenError, match="vectors of 2 numbers; the model takes 768"):
        Images(vectors, labels="text", width=768).source()
    for options, message in (
        ({"crop": "midle"}, "crop is 'midle'; expected one of none, adm"),
        ({"size": 0}, "size is 0"),
        ({"crop": "adm"}, "needs a size"),
        ({"channels": 2}, "channels is 2"),
    ):
        with pytest.raises(GenError, match=message):
            Images(archive, **options)


def test_a_broken_image_is_named_by_the_stream(tmp_path: Path) -> None:
    place = folder(tmp_path / "a")
    (place / "c1" / "003.png").write_bytes(b"gone")
    stream = Images(str(place), size=8, crop="adm").batches(batch=6, seed=0, start=0)
    with pytest.raises(GenError, match=r"003\.png is not a readable image"):
        next(stream)
