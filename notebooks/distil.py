# %% [markdown]
# # One teacher, five students of one network call
#
# A flow on handwritten digits needs many network calls. Five methods turn it into a generator of one call: regression
# on stored pairs, reflow, easy consistency tuning, MeanFlow, and distribution matching. Every step is the command that
# one would type in a shell; the budgets are seconds, so that the page is about the way and not about the last digit.

# %%
import matplotlib.pyplot as plt
import numpy as np

import gen
from gen.cli import main
from gen.data.sources import digits
from gen.features.digits import DigitsExtractor
from gen.metrics.evaluate import evaluate
from gen.metrics.reference import make_reference
from gen.metrics.sources import from_arrays


def command(line: str) -> None:
    print("$ gen", line)
    assert main([*line.split(), "--engine.quiet", "true"]) == 0


# %% [markdown]
# ## The teacher
#
# Patches of 4 x 4 pixels make four tokens of an image: coarse, and four times as quick as the preset's.

# %%
command("train sit-smoke --outdir teacher --steps 600 --stages.0.task.denoiser.network.patch 4")
teacher = gen.load("teacher").with_sampler(gen.Sampler(gen.Heun(), steps=10, guidance=gen.ClassifierFree(1.5)))

# %% [markdown]
# ## The students
#
# The first two learn from pairs of noise and sample that the teacher makes once; the others from data.

# %%
command("distill kd --teacher teacher --pairs 512 --outdir kd --steps 200")
command("distill reflow --teacher teacher --pairs 512 --outdir reflow --steps 200")
command("distill ect --teacher teacher --outdir ect --steps 200")
command("distill meanflow --teacher teacher --outdir meanflow --steps 200")
command("distill dmd2 --teacher teacher --outdir dmd2 --steps 200")

# %% [markdown]
# ## Side by side
#
# All start from the same noise: column by column the same seed. A Fréchet distance of few samples is a rough measure.

# %%
train = digits("train").arrays
extractor = DigitsExtractor()
reference = make_reference("digits", from_arrays(train["image"], train["label"]), extractor, split="train")
models = {"teacher": teacher} | {name: gen.load(name) for name in ("kd", "reflow", "ect", "meanflow", "dmd2")}
fig, axes = plt.subplots(len(models), 1, figsize=(8, 4.9))
for ax, (name, model) in zip(axes, models.items(), strict=True):
    images = model.sample(range(256), batch=256)
    scores = evaluate(from_arrays(images, np.arange(256) % 10), reference, extractor, batch=256).values
    distance, recall = scores["frechet_distance"], scores["recall"]
    print(f"{name:<9} calls {model.generator.nfe:>2}   distance {distance:6.2f}   recall {recall:.2f}")
    ax.imshow(np.concatenate(list(images[:20, ..., 0]), axis=1), cmap="gray")
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.tight_layout()

# %% [markdown]
# What each method does, and what it gives with the demo's budgets, stands at [distillers](../distillers.md);
# `python -m gen.experiments.compare_distillers` makes a page of all of them.
