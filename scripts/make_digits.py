"""Makes gen/data/digits.npz from the copy of the UCI digits that scikit-learn ships.

    python scripts/make_digits.py [OUT]

The split is stratified 80/20: within each class the images are ranked by a keyed random number, and the
first fifth (rounded) is held out. It is made here once and stored, so that nothing at run time depends on
a library's idea of a split.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

SPLIT_SEED = 0
HELD_OUT = 0.2


def main(out: Path) -> None:
    data = load_digits()
    images = data.images.astype(np.uint8)  # (1797, 8, 8), whole numbers 0..16
    labels = data.target.astype(np.uint8)
    if not np.array_equal(images, data.images):
        raise SystemExit("expected whole numbers 0..16 in the images of load_digits")
    rank = np.random.Philox(key=SPLIT_SEED).random_raw(len(labels))
    test = np.zeros(len(labels), bool)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        test[members[np.argsort(rank[members])][: round(HELD_OUT * len(members))]] = True
    np.savez_compressed(out, images=images, labels=labels, test=test)
    print(f"{out}: {len(labels)} images, {int(test.sum())} held out, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "gen" / "data" / "digits.npz")
