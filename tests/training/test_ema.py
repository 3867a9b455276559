import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.training.ema import (
    Constant,
    HalfLife,
    PowerFunction,
    average,
    combine,
    exponent_to_std,
    posthoc_coefficients,
    power_function_beta,
    power_function_response,
    std_to_exponent,
)


def _averaged(decay: object, values: np.ndarray, batch: int = 1) -> np.ndarray:
    """The average after each of the parameter values, started at the first."""
    ema, out = {"w": jnp.asarray(values[0])}, []
    for n, value in enumerate(values, start=1):
        ema = average(ema, {"w": jnp.asarray(value)}, decay.weight(jnp.int32(n), batch))  # type: ignore[attr-defined]
        out.append(float(ema["w"]))
    return np.asarray(out)


def test_constant_is_the_textbook_recursion() -> None:
    values = np.random.default_rng(0).normal(size=20).astype(np.float32)
    expected = [float(values[0])]
    for value in values[1:]:
        expected.append(0.9 * expected[-1] + 0.1 * float(value))
    np.testing.assert_allclose(_averaged(Constant(0.9), values), expected, rtol=1e-5, atol=1e-6)


def test_warm_up_forgets_the_start_sooner() -> None:
    weights = [float(Constant(0.999, warmup=True).weight(jnp.int32(n), 1)) for n in (1, 10, 10**6)]
    np.testing.assert_allclose(weights, [9 / 11, 9 / 20, 0.001], rtol=1e-4)


@pytest.mark.parametrize("std", [0.05, 0.1])
def test_power_function_average_has_the_profile_it_promises(std: float) -> None:
    """Fed unit impulses one at a time, the recursion's response is its continuous profile, up to discretisation."""
    steps = 200
    gamma = float(std_to_exponent(std))
    edges = np.arange(steps + 1) / steps
    profile = np.diff(edges ** (gamma + 1))  # integral of (gamma + 1) t^gamma over each step
    response = [_averaged(PowerFunction(std), np.eye(steps, dtype=np.float32)[i])[-1] for i in (100, 150, 190, 199)]
    np.testing.assert_allclose(response, profile[[100, 150, 190, 199]], rtol=2e-4)


def test_power_function_weight_is_the_host_formula() -> None:
    n = np.asarray([1, 2, 10, 1000, 10**6])
    ours = np.asarray([float(PowerFunction(0.1).weight(jnp.int32(i), 32)) for i in n])
    np.testing.assert_allclose(ours, 1 - power_function_beta(0.1, n * 32.0, 32.0), rtol=2e-5)


def test_half_life() -> None:
    decay = HalfLife(images=1000, rampup=0.0)
    assert float(decay.weight(jnp.int32(5), 1000)) == pytest.approx(0.5)
    ramped = HalfLife(images=1000, rampup=0.05)
    assert float(ramped.weight(jnp.int32(1), 10)) == pytest.approx(1.0)
    assert float(ramped.weight(jnp.int32(11), 10)) == pytest.approx(1 - 0.5 ** (10 / (100 * 0.05)), rel=1e-5)


def test_exponent_round_trip() -> None:
    std = np.asarray([0.01, 0.05, 0.1, 0.2])
    np.testing.assert_allclose(exponent_to_std(std_to_exponent(std)), std, rtol=1e-9)


def test_reconstruction_gives_back_what_is_stored() -> None:
    times, stds = [10.0, 10.0, 20.0, 20.0], [0.05, 0.1, 0.05, 0.1]
    found = posthoc_coefficients(times, stds, [20.0], [0.1])
    np.testing.assert_allclose(found[:, 0], [0, 0, 0, 1], atol=1e-8)


def test_reconstruction_of_another_width() -> None:
    """Averages of a known signal combine to nearly the average of the wanted width."""
    steps = 512
    t = np.arange(1, steps + 1, dtype=np.float64)
    signal = np.sin(t / 60)
    snapshots, times, stds = [], [], []
    for end in range(64, steps + 1, 64):
        for std in (0.05, 0.1):
            response = power_function_response(t, [float(end)], [std])[:, 0]
            snapshots.append({"w": np.asarray(response @ signal)})
            times.append(float(end))
            stds.append(std)
    weights = posthoc_coefficients(times, stds, [float(steps)], [0.075])[:, 0]
    wanted = power_function_response(t, [float(steps)], [0.075])[:, 0] @ signal
    assert combine(snapshots, weights)["w"] == pytest.approx(wanted, abs=2e-3)
    nearest = float(snapshots[-1]["w"])
    assert abs(nearest - wanted) > 1e-2  # the combination is better than any stored one


def test_bad_values_are_refused() -> None:
    for make in (lambda: Constant(1.0), lambda: PowerFunction(0.5), lambda: HalfLife(0)):
        with pytest.raises(GenError, match="expected"):
            make()
    with pytest.raises(GenError, match="one weight each"):
        combine([{"w": jnp.ones(2)}], [0.5, 0.5])
    assert jax.tree.leaves(combine([{"w": np.ones(2, np.float32)}], [0.5]))[0].dtype == np.float32
