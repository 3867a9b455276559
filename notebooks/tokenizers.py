# %% [markdown]
# # Tokenizers compared
#
# The same small transformer gives an image as continuous latents, as tokens of a learned codebook, as tokens of a fixed
# grid, and as bits. What differs is the bottleneck; data are handwritten digits of 8 x 8.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np

import gen
from gen.data.sources import Digits, digits
from gen.metrics.image import psnr
from gen.tokenizers.quantizers.fsq import FSQ
from gen.tokenizers.quantizers.lfq import BSQ
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.titok import TiTokConfig, Tower
from gen.tokenizers.train import TokenizerTask
from gen.training.ema import Constant
from gen.training.optim import OptimConfig

tower = Tower(width=64, depth=1, heads=4)
shape = {"image": (8, 8, 1), "patch": 4, "tokens": 8, "encoder": tower, "decoder": tower, "scan": False}
learned, bits = {"commitment": 0.05, "codebook": 0.2}, {"commitment": 0.0, "entropy": 0.01}  # losses of quantizers
tokenizers = {  # name: configuration, bits of an image, weights of the quantizer's losses
    "8 latents of 4": (TiTokConfig(channels=4, **shape), 8 * 4 * 32, {}),
    "8 of 64 codes": (
        TiTokConfig(channels=None, quantizer=VQ(64, 8, restart="random"), **shape),
        8 * math.log2(64),
        learned,
    ),
    "8 of a grid of 64": (TiTokConfig(channels=None, quantizer=FSQ((4, 4, 4)), **shape), 8 * math.log2(64), {}),
    "8 vectors of 6 bits": (TiTokConfig(channels=None, quantizer=BSQ(6), **shape), 8 * 6, bits),
}

# %% [markdown]
# ## Training
#
# Each is trained for the same number of steps on squared errors, and the quantizers' own losses.

# %%
trained = {}
for name, (config, _, losses) in tokenizers.items():
    task = TokenizerTask(
        config,
        optim=OptimConfig(3e-3, betas=(0.9, 0.99), schedule="cosine", warmup=50, clip=1.0),
        emas=(Constant(0.99, warmup=True),),
        kl=1e-5,
        quantizer=losses,
    )
    stage = gen.Stage("tokenizer", task, steps=400, batch=64, data=Digits("train"))
    folder = name.replace(" ", "-")
    gen.train(gen.RunConfig(folder, (stage,), engine=gen.EngineConfig(quiet=True)), folder)
    trained[name] = gen.load(folder)

# %% [markdown]
# ## Held-out digits, given back

# %%
images = digits("test").arrays["image"]
fig, axes = plt.subplots(len(trained) + 1, 1, figsize=(8, 4.4))
rows = {"originals": images}
print(f"{'':<20}{'bits per image':>15}{'PSNR, dB':>10}")
for name, loaded in trained.items():
    rows[name] = loaded.decode(loaded.encode(images))
    found = float(np.mean(psnr(rows[name].astype(np.float32), images.astype(np.float32), peak=255.0)))
    print(f"{name:<20}{tokenizers[name][1]:>15.0f}{found:>10.1f}")
for ax, (name, row) in zip(axes, rows.items(), strict=True):
    ax.imshow(np.concatenate(list(row[:20, ..., 0]), axis=1), cmap="gray", vmin=0, vmax=255)
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.tight_layout()

# %% [markdown]
# Continuous latents give images back best, at twenty times the bits. Of the three that spend 48 bits the signs on a
# sphere (BSQ) keep most after these 400 steps, the fixed grid least. What a generator makes of each is another
# question, which `python -m gen.experiments.compare_tokenizers` asks. The methods: [tokenizers](../tokenizers.md).
