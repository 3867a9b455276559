# %% [markdown]
# # A flow from scratch, on one screen
#
# A network learns the velocity of straight paths between data and noise, x_t = (1 - t) x + t eps, and an integrator
# follows it from noise to data. Below, the loss, the update and the loop are written out; the network and the solver
# are the package's. Data are the handwritten digits that come with it.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import gen
from gen.data.sources import digits

data = digits("train").arrays
images, labels = jnp.asarray(data["image"] / 127.5 - 1.0), jnp.asarray(data["label"])
print(images.shape, float(images.min()), float(images.max()))

# %% [markdown]
# ## The model
#
# A `Denoiser` is a network, a process and what the network's output means. Its prediction has a `velocity`.

# %%
network = gen.DiTConfig(
    (8, 8), channels=1, patch=2, width=64, depth=2, heads=4, num_classes=10, remat="none", scan=False
)
flow = gen.Denoiser(network, gen.Linear(), gen.Predict("velocity", scale=10.0))
optimiser = optax.adam(2e-3)


def loss(params, x, label, key):
    t_key, eps_key, drop_key = jax.random.split(key, 3)
    t = jax.random.uniform(t_key, (len(x),))
    eps = jax.random.normal(eps_key, x.shape)
    x_t = x + t[:, None, None, None] * (eps - x)
    label = jnp.where(jax.random.uniform(drop_key, (len(x),)) < 0.1, 10, label)  # 10: no class, for guidance
    return jnp.square(flow(params, x_t, t, {"label": label}).velocity - (eps - x)).mean()


@jax.jit
def step(params, moments, average, key):
    row_key, loss_key = jax.random.split(key)
    rows = jax.random.randint(row_key, (64,), 0, len(images))
    value, gradient = jax.value_and_grad(loss)(params, images[rows], labels[rows], loss_key)
    updates, moments = optimiser.update(gradient, moments)
    params = optax.apply_updates(params, updates)
    average = optax.incremental_update(params, average, 0.01)
    return params, moments, average, value


# %% [markdown]
# ## Training
#
# Samples are made with a running average of the weights.

# %%
params = flow.net.init(jax.random.key(0))
average, moments, losses = params, optimiser.init(params), []
for i in range(700):
    params, moments, average, value = step(params, moments, average, jax.random.fold_in(jax.random.key(1), i))
    losses.append(float(value))
begin, end = sum(losses[:50]) / 50, sum(losses[-50:]) / 50
print(f"mean loss of the first and of the last 50 steps: {begin:.3f}, {end:.3f}")

# %% [markdown]
# ## Sampling
#
# One sampler is a solver, a grid of times and a guidance. Image i depends on its key and its class alone, so the two
# rows of pictures show the same noise.

# %%
keys, classes = jax.random.split(jax.random.key(2), 20), {"label": jnp.arange(20) % 10}
fig, axes = plt.subplots(2, 1, figsize=(8, 2.4))
for ax, steps in zip(axes, (2, 20), strict=True):
    sampler = gen.Sampler(gen.Heun(), gen.Uniform(), steps=steps, guidance=gen.ClassifierFree(1.5))
    generator = gen.DiffusionGenerator(flow, sampler)
    made = jax.jit(generator)({"net": average}, keys, classes)
    ax.imshow(jnp.concatenate(list(made[..., 0]), axis=1), cmap="gray", vmin=-1, vmax=1)
    ax.set_title(f"{generator.nfe} network calls", fontsize=9)
    ax.axis("off")

# %% [markdown]
# The same model as a run folder, resumable and with previews, is `gen train sit-smoke`; a file of your own is
# explained at [your own experiment file](../own-experiment.md).
