"""``gen convert``."""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.train import Overrides
from gen.errors import GenError

__all__ = ["convert"]


def convert(
    source: Annotated[Path, tyro.conf.Positional],
    file: Annotated[Path | None, tyro.conf.Positional] = None,
    /,
    *,
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None,
    system: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    key: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    overrides: Overrides = (),
) -> None:
    """Turns published weights into a run folder that gen sample takes, or a run back into published names.

    With the name of a feature network before the file, its weights are kept in a per-user folder for gen evaluate.

    Files are read without torch and nothing in them is executed. Whatever does not match is listed and refused.

    Examples:
      gen convert DiT-XL-2-256x256.pt --out runs/dit-xl
      gen convert small.safetensors --out runs/small --system dit --network.heads 6
      gen convert runs/dit-xl --out back.safetensors
      gen convert inception pt_inception-2015-12-05-6726825d.pth

    Args:
      source: a .safetensors, .pt, .pth or .pkl file, a run folder to export, or a feature network (inception).
      file: the published file of that feature network.
      out: the run folder to make, or the .safetensors file to export to; needed unless SOURCE is a feature network.
      system: the published system (dit, ...); found by the names in the file by default.
      key: which entry of a training checkpoint (ema, model, ...); the averaged weights by default.
    """
    if file is not None:
        from gen.pretrained.features import convert_network

        print(convert_network(str(source), file, out))
        return
    if out is None:
        raise GenError("say where the result goes with --out (a run folder, or a .safetensors file for an export)")
    if source.is_dir():
        _export(source, out, system)
    else:
        _import(source, out, system, key, overrides)


def _import(source: Path, out: Path, system: str | None, key: str | None, overrides: Any) -> None:
    from gen.config import fingerprint, to_json
    from gen.nn.network import count
    from gen.pretrained import rules
    from gen.pretrained.readers import read_state
    from gen.training.checkpoints import save_arrays
    from gen.training.engine import RunConfig
    from gen.training.files import write_json

    if (out / "config.json").exists():
        raise GenError(f"{out} already holds a run; give another --out")
    weights, entry = read_state(source, key)
    importer = rules.system(system, weights)
    network, params, report = importer.load(weights, importer.infer(weights, **_options(overrides)))
    print(f"{importer.name}{f', entry {entry!r}' if entry else ''}: {report}")
    origin = f"{importer.name} weights {source.name}"
    generator = None if importer.generator is None else importer.generator(network)
    tokenizer = network if importer.role == "tokenizer" else None
    config = RunConfig(origin, stages=(), generator=generator, tokenizer=tokenizer)
    save_arrays(out / "artifacts" / f"{importer.role}.safetensors", params, {"origin": origin})
    write_json(out / "config.json", to_json(config))
    print(f"{count(params):,} parameters, network {fingerprint(network)}; written to {out}")


def _options(overrides: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """``--network.NAME VALUE`` flags: what shapes alone do not tell."""
    options = {}
    for path, text in overrides:
        head, _, name = path.partition(".")
        if head != "network" or "." in name:
            raise GenError(f"unknown flag '--{path}'; write --network.NAME VALUE for what the file does not tell")
        try:
            options[name] = json.loads(text.lower() if text in ("True", "False", "None") else text)
        except json.JSONDecodeError:
            options[name] = text
    return options


def _export(run: Path, out: Path, system: str | None) -> None:
    from gen.pretrained import rules
    from gen.pretrained.load import load
    from gen.pretrained.readers import write_weights

    if out.suffix != ".safetensors":
        raise GenError(f"cannot export to {out}; give a name that ends in .safetensors")
    loaded = load(run)
    if system is None:
        system = loaded.config.name.partition(" ")[0]
    importer = rules.system(system, {})
    network = loaded.tokenizer if importer.role == "tokenizer" else loaded.denoiser.network
    weights = importer.save(network, loaded.params[importer.role])
    write_weights(out, weights)
    print(f"{len(weights)} arrays under the names of {system}, {loaded.weights} weights; written to {out}")
