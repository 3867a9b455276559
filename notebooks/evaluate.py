# %% [markdown]
# # Evaluating honestly
#
# Four sets of "samples" whose faults are known are scored against the training digits: what each number sees, and what
# it misses. Nothing is trained here. The feature network is the digits classifier that comes with the package.

# %%
import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import gaussian_filter

from gen.data.sources import digits
from gen.errors import GenError
from gen.features.digits import DigitsExtractor
from gen.metrics.evaluate import evaluate
from gen.metrics.frechet import frechet_by_size
from gen.metrics.memorisation import memorisation
from gen.metrics.protocol import require_comparable
from gen.metrics.reference import make_reference
from gen.metrics.sources import from_arrays

train, test = digits("train").arrays, digits("test").arrays
extractor = DigitsExtractor()
reference = make_reference("digits", from_arrays(train["image"], train["label"]), extractor, split="train")
print(len(train["image"]), "training images,", len(test["image"]), "held-out ones, of", train["image"].shape[1:])

# %% [markdown]
# ## Four generators with known faults

# %%
count = len(test["image"])
rng = np.random.default_rng(0)
few = np.flatnonzero(train["label"] < 3)
sets = {
    "held-out digits": (test["image"], test["label"]),
    "blurred": (gaussian_filter(test["image"], (0, 0.6, 0.6, 0)), test["label"]),
    "three classes": (train["image"][few][:count], train["label"][few][:count]),
    "copies": (train["image"][:count], train["label"][:count]),
}
fig, axes = plt.subplots(len(sets), 1, figsize=(8, 3.4))
for ax, (name, (images, _)) in zip(axes, sets.items(), strict=True):
    ax.imshow(np.concatenate(list(images[:20, ..., 0]), axis=1), cmap="gray")
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.tight_layout()

# %%
results = {name: evaluate(from_arrays(*pair), reference, extractor) for name, pair in sets.items()}
columns = ("frechet_distance", "precision", "recall", "coverage")
print(f"{'':<16}", *(f"{column:>17}" for column in columns))
for name, result in results.items():
    print(f"{name:<16}", *(f"{result.values[column]:17.3f}" for column in columns))

# %% [markdown]
# Blur costs everything at once. Three classes keep a precision of 1 and lose recall and coverage: with precision alone
# they would look perfect. The copies score like a very good model, since no distance to the training set punishes them.
# That takes a look at the closest training image:

# %%
for name in ("held-out digits", "copies"):
    found = memorisation(sets[name][0], train["image"], test["image"])
    print(f"{name:<16} share closer than half of what is usual for held-out images: {found.share:.2f}")

# %% [markdown]
# ## The number of samples
#
# The Fréchet distance falls as the number of samples grows, because the mean and the covariance of few samples scatter.
# The same held-out digits, by how many of them are used:

# %%
held = make_reference("held-out", from_arrays(test["image"], test["label"]), extractor, split="test")
sizes = [80, 120, 180, 270, count]
runs = np.array(
    [frechet_by_size(held.features, reference.mean, reference.covariance, sizes, seed=seed) for seed in range(5)]
)
plt.figure(figsize=(4.5, 2.8))
plt.errorbar(sizes, runs.mean(0), runs.std(0), marker="o", capsize=3)
plt.xlabel("samples")
plt.ylabel("Fréchet distance")
print("mean distance by number:", dict(zip(sizes, np.round(runs.mean(0), 2).tolist(), strict=True)))

# %% [markdown]
# Hence the number is part of the protocol, and scores of different numbers do not compare. Neither do scores against
# other real images; the code refuses:

# %%
other = evaluate(from_arrays(train["image"][:count], train["label"][:count]), held, extractor)
try:
    require_comparable({"against the training split": results["copies"], "against held-out digits": other})
except GenError as error:
    print(error)

# %% [markdown]
# What comes with every score, and what two scores have to share, is explained at
# [numbers you can trust](../trust.md).
