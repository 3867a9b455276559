"""Training checkpoints as libraries write them: the average where there is one, raw when asked, no guess otherwise."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gen import arrays
from gen.errors import GenError
from gen.pretrained import dit
from gen.pretrained.containers import choose
from gen.pretrained.pickles import Storage, Tensor
from gen.pretrained.readers import read_state
from gen.pretrained.systems import locate
from tests.pretrained.test_decoder import DIT, VAE, official

RAW = {"a.weight": np.ones((2, 2), np.float32), "b.bias": np.ones(3, np.float32)}
EMA = {name: 2 * array for name, array in RAW.items()}
TENSOR = Tensor(Storage("0", np.dtype("f4"), 1), 0, (1,), (1,), np.dtype("f4"))
OPT = {"state": {0: {"exp_avg": np.zeros(3)}}, "param_groups": []}


def under(prefix: str, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in state.items()}


def squashed(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """LitEma of latent diffusion: names without dots, and counters."""
    inside = {name.replace(".", ""): array for name, array in state.items()}
    return under("model_ema.", inside | {"decay": np.float32(0.999), "num_updates": np.int32(7)})


@pytest.mark.parametrize(
    ("content", "entry", "raw"),
    [
        ({"model": RAW, "ema": EMA, "opt": OPT}, "ema", "model"),
        ({"model": RAW, "model_ema": EMA, "optimizer": OPT}, "model_ema", "model"),
        ({"state_dict": RAW, "ema_state_dict": EMA}, "ema_state_dict", "state_dict"),
        ({"state_dict": RAW, "state_dict_ema": EMA}, "state_dict_ema", "state_dict"),
        ({"net": RAW, "net_ema": EMA}, "net_ema", "net"),
        ({"params": RAW, "params_ema": EMA}, "params_ema", "params"),
        ({"generator": RAW, "g_ema": EMA}, "g_ema", "generator"),
        ({"model": RAW, "modelEMA": EMA}, "modelEMA", "model"),
        ({"model": RAW, "ema": {"decay": 0.99, "shadow": EMA}}, "ema.shadow", "model"),
        ({"state": {"model": RAW, "ema": EMA}}, "state.ema", "state.model"),
        ({"model": under("module.", RAW), "swa": under("module.", EMA) | {"n_averaged": np.int64(5)}}, "swa", "model"),
        (under("model.", RAW) | under("ema_model.", EMA) | {"initted": np.bool_(True)}, "ema_model", "model"),
        (under("online_model.", RAW) | under("ema_model.", EMA), "ema_model", "online_model"),
        ({"state_dict": under("model.", RAW) | squashed(EMA), "epoch": 3}, "model_ema", "model"),
        ({"state_dict": RAW | squashed(EMA)}, "model_ema", None),
    ],
)
def test_the_average_is_taken_and_the_raw_weights_when_asked_for(content: Any, entry: str, raw: str | None) -> None:
    found, said = choose(content, None, Path("x.pt"))
    assert said == entry
    assert {name.rpartition("model.")[2]: array[0].max() for name, array in found.items()} == dict.fromkeys(RAW, 2.0)
    if raw is not None:
        found, said = choose(content, raw, Path("x.pt"))
        assert said == raw
        assert {array[0].max() for array in found.values()} == {1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ema_0.999": EMA, "ema_0.9999": EMA, "model": RAW}, "averages under ema_0.999, ema_0.9999; say which"),
        ({"encoder": RAW, "decoder": RAW}, "weights under decoder, encoder; say which"),
        ({"model": RAW, "net": RAW}, "weights under model, net; say which"),
        (under("ema_a.", EMA) | under("ema_b.", EMA), "averages under ema_a, ema_b; say which"),
        (RAW | under("ema.", {"other": np.ones(3)}), "averages under 'ema' .other. that do not match"),
        ({"module.a.weight": np.ones(2), "a.weight": np.ones(2)}, "has 'a.weight' twice"),
        ({"model": RAW, "ema": {"shadow_params": [TENSOR]}}, "averages under 'ema' as a list without names"),
        ({"epoch": 3}, "holds no weights"),
    ],
)
def test_two_readings_are_refused_by_name(content: Any, message: str) -> None:
    with pytest.raises(GenError, match=f"x.pt .*{message}"):
        choose(content, None, Path("x.pt"))


class Late:
    """An array that is read when asked for."""

    def __init__(self, value: np.ndarray) -> None:
        self.value, self.shape = value, value.shape

    def array(self) -> np.ndarray:
        return self.value


def test_an_average_without_names_is_laid_over_the_parameters_in_order() -> None:
    """As torch_ema stores it (SlimFlow's files): buffers have no average, and what fits twice is refused."""
    listed = {"decay": 0.999, "num_updates": 7, "shadow_params": [Late(array) for array in EMA.values()]}
    found, said = choose({"model": {"module.sigmas": np.zeros(5), **RAW}, "ema": listed}, None, Path("x.pt"))
    assert (said, list(found)) == ("ema", ["sigmas", *RAW])
    assert all((found[name] == EMA[name]).all() for name in RAW)
    raw, _ = choose({"model": RAW, "ema": listed}, "model", Path("x.pt"))
    assert all((raw[name] == RAW[name]).all() for name in RAW)
    with pytest.raises(GenError, match="as a list without names"):
        choose({"model": {**RAW, "c.bias": np.zeros(3)}, "ema": listed}, None, Path("x.pt"))


def test_an_unknown_key_names_those_that_are_there() -> None:
    with pytest.raises(GenError, match="no weights under 'emma'; it has ema_model, model"):
        choose(under("model.", RAW) | under("ema_model.", EMA), "emma", Path("x.pt"))


def test_wrappers_leave_the_names_wherever_they_stand() -> None:
    wrapped = {
        "module._orig_mod.a.weight": RAW["a.weight"],
        "b._orig_mod.bias": RAW["b.bias"],
        "n_averaged": np.int64(3),
    }
    found, _ = choose(wrapped, None, Path("x.pt"))
    assert found.keys() == RAW.keys()


def test_an_autoencoder_in_a_larger_checkpoint(tmp_path: Path) -> None:
    weights = official("kl-vae", VAE)
    larger = under("first_stage_model.", weights) | {"model.diffusion_model.x.weight": np.ones(3, np.float32)}
    found = locate(None, larger)
    assert (found.importer.name, found.prefix, found.outside) == ("kl-vae", "first_stage_model.", 1)
    assert found.weights.keys() == weights.keys()
    two = larger | under("net.", official("dit", DIT))
    with pytest.raises(GenError, match=r"fit dit under net\., kl-vae under first_stage_model\."):
        locate(None, two)
    assert locate("sit", two).prefix == "net."
    assert locate(None, two, "tokenizer").prefix == "first_stage_model."


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_position_tables_in_half_precision(dtype: Any) -> None:
    weights = {name: array.astype(dtype) for name, array in official("dit", DIT).items()}
    config, params, _ = dit.IMPORTER.load(weights, DIT)
    assert config == DIT
    assert params["patch"]["kernel"].dtype == np.float32
    wrong = weights | {"pos_embed": (weights["pos_embed"].astype(np.float32) * 1.01).astype(dtype)}
    with pytest.raises(GenError, match="pos_embed with other values"):
        dit.IMPORTER.load(wrong, DIT)


def test_weights_cut_into_several_files(tmp_path: Path) -> None:
    arrays.write(tmp_path / "w-00001-of-00002.safetensors", {"a.weight": RAW["a.weight"]})
    arrays.write(tmp_path / "w-00002-of-00002.safetensors", {"b.bias": RAW["b.bias"]})
    index = tmp_path / "w.safetensors.index.json"
    places = {"a.weight": "w-00001-of-00002.safetensors", "b.bias": "w-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    found, _ = read_state(index)
    assert {name: array.shape for name, array in found.items()} == {name: array.shape for name, array in RAW.items()}
    with pytest.raises(GenError, match=r"is one of 2 files; give the \.index\.json"):
        read_state(tmp_path / "w-00001-of-00002.safetensors")
    for change, message in (
        ({"a.weight": "w-00002-of-00002.safetensors"}, "lacks 'a.weight'"),
        ({"a.weight": "../w.safetensors"}, "outside of its folder"),
        ({"a.weight": "w-00003-of-00003.safetensors"}, "no weights file at"),
    ):
        index.write_text(json.dumps({"weight_map": places | change}))
        with pytest.raises(GenError, match=message):
            read_state(index)
    index.write_text("[]")
    with pytest.raises(GenError, match="no weight_map"):
        read_state(index)
