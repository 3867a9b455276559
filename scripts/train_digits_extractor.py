"""Trains the digits extractor and writes gen/features/digits.safetensors.

    python scripts/train_digits_extractor.py [OUT]

Fixed recipe: the training split, small random affine maps, Adam with a cosine schedule. Prints the accuracy on
both splits and the SHA-256 that gen/features/digits.py must carry. The shipped file is frozen; running this
again on another machine gives other last digits.
"""

import hashlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gen import arrays
from gen.data import loader
from gen.data.augment import RandomAffine
from gen.data.sources import digits
from gen.features.digits import DigitsExtractor, init_digits

STEPS, BATCH, RATE, SEED = 1500, 128, 2e-3, 0
AUGMENT = RandomAffine(shift=0.5, rotate=8.0, scale=0.08, fill=0.0)


def main(out: Path) -> None:
    network, base = DigitsExtractor(), jax.random.key(SEED)
    train, test = digits("train"), digits("test")
    optimiser = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def loss(params, images, labels):
        logits = network(params, images)["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def update(params, opt, image, label, step):
        images = AUGMENT(jax.random.fold_in(base, step), image.astype(jnp.float32))
        value, grads = jax.value_and_grad(loss)(params, images, label)
        changes, opt = optimiser.update(grads, opt, params)
        return optax.apply_updates(params, changes), opt, value

    params = init_digits(jax.random.fold_in(base, 2**31))
    opt = optimiser.init(params)
    data = loader.batches(train, batch=BATCH, seed=SEED)
    for step in range(STEPS):
        params, opt, value = update(params, opt, *next(data).values(), step)
        if step % 500 == 499:
            print(f"step {step + 1}  loss {value:.4f}  " + accuracies(network, params, train, test), flush=True)

    features = np.asarray(network(params, jnp.asarray(train.arrays["image"]))["features"], np.float64)
    final = {name: np.asarray(array, np.float32) for name, array in params.items()}
    final["mean"], final["std"] = (v.astype(np.float32) for v in (features.mean(0), features.std(0)))
    arrays.save(out, final, {"data": train.identity(), "accuracy": accuracies(network, final, train, test)})
    data_bytes = out.read_bytes()
    print(f"parameters {sum(v.size for v in final.values())}  smallest std {final['std'].min():.4f}")
    print(f"{out}: {len(data_bytes)} bytes, sha256 {hashlib.sha256(data_bytes).hexdigest()}")


def accuracies(network, params, *sources) -> str:
    values = [
        float((network(params, jnp.asarray(s.arrays["image"]))["logits"].argmax(-1) == s.arrays["label"]).mean())
        for s in sources
    ]
    return f"train {values[0]:.4f} test {values[1]:.4f}"


if __name__ == "__main__":
    default = Path(__file__).parents[1] / "gen" / "features" / "digits.safetensors"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
