"""``gen convert``."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.flags import flag
from gen.cli.opening import Overrides
from gen.errors import GenError

__all__ = ["convert"]


def convert(
    source: Annotated[Path, tyro.conf.Positional, flag("FILE|DIR|RUN|NETWORK")],
    file: Annotated[Path | None, tyro.conf.Positional, flag("[FILE]")] = None,
    /,
    *,
    out: Annotated[Path | None, flag("RUN|FILE|DIR")] = None,
    system: Annotated[str | None, flag("NAME")] = None,
    key: Annotated[str | None, flag("NAME")] = None,
    vae: Annotated[Path | None, flag("FILE|DIR|RUN")] = None,
    encoder: Annotated[Path | None, flag("FILE")] = None,
    normalizer: Annotated[str | None, flag("X")] = None,
    overrides: Overrides = (),
) -> None:
    """Turns published weights into a run folder that gen sample takes, or a run back into published names.

    With the name of a feature network before the file, its weights are kept in a per-user folder for gen evaluate.
    A model of latents or tokens makes images once it is joined with its autoencoder (--vae); a diffusers pipeline
    brings its own, and its scheduler is obeyed.

    Files are read without torch and nothing in them is executed. Averaged weights are taken where there are some, and
    the entry is printed. Whatever does not match, or would make another model than the file says, is refused by name.

    Examples:
      gen convert DiT-XL-2-256x256.pt --out runs/dit-xl --vae sd-vae-ft-mse.safetensors
      gen convert SiT-XL-2-256x256.pt --out runs/sit-xl --system sit --vae runs/vae
      gen convert lightningdit-xl.pt --out runs/light --vae vavae.pt --normalizer latents_stats.pt
      gen convert c2i_L_256.pt --out runs/llamagen-l --vae vq_ds16_c2i.pt
      gen convert DiT-XL-2-256/ --out runs/dit-xl
      gen convert rae-decoder.pt --encoder dinov2-with-registers.safetensors --out runs/rae
      gen convert small.safetensors --out runs/small --system dit --network.heads 6
      gen convert runs/dit-xl --out back.safetensors
      gen convert runs/mine --out pipeline/ --system dit-diffusers
      gen convert inception pt_inception-2015-12-05-6726825d.pth

    Args:
      source: a .safetensors, .pt, .pth or .pkl file, the .index.json of weights cut into several, a diffusers folder, a
        run folder to export, or a feature network (inception, lite, dinov2, mae, clip, clip-vocabulary, lpips,
        convnext, resnet).
      file: the published file of that feature network.
      out: the run folder to make, the .safetensors file to export to, or a folder to export to in the layout of
        diffusers (systems dit-diffusers and sd-vae); needed unless SOURCE is a feature network.
      system: the published system (dit, ...); known by the names in the file by default. Of a run, what to export to.
      key: which entry of a training checkpoint (ema, model, ...), model for raw weights; the averaged ones by default.
      vae: the autoencoder of a model of latents or tokens: its file, diffusers folder or run folder.
      encoder: of a released RAE decoder: the file of its frozen encoder (dinov2-with-registers-base of the transformers
        library).
      normalizer: of its latents, where the published one is not meant: the factor that scaled them (0.18215), a file
        with their mean and std, or a latent cache.
    """
    if file is not None:
        from gen.pretrained.features import convert_network
        from gen.pretrained.systems import SYSTEMS

        if str(source) in SYSTEMS:
            raise GenError(f"'{source}' is no feature network; write gen convert {file} --system {source} --out RUN")
        print(convert_network(str(source), file, out))
        return
    if out is None:
        raise GenError("say where the result goes with --out (a run folder, or a .safetensors file for an export)")
    from gen.pretrained import diffusers

    if source.is_dir() and not diffusers.is_folder(source):
        _export(source, out, system)
    else:
        inside = source / "vae"
        vae = inside if vae is None and inside.is_dir() else vae
        _import(source, out, system, key, vae, encoder, normalizer, overrides)


def _import(
    source: Path,
    out: Path,
    system: str | None,
    key: str | None,
    vae: Path | None,
    encoder: Path | None,
    normalizer: str | None,
    overrides: Any,
) -> None:
    from gen import arrays
    from gen.config import fingerprint, to_json
    from gen.files import write_json
    from gen.nn.network import count
    from gen.pretrained import diffusers
    from gen.pretrained.exports import described, sampled_as
    from gen.pretrained.rae import with_encoder
    from gen.pretrained.readers import read_state, read_weights
    from gen.pretrained.schedulers import obeyed
    from gen.pretrained.systems import locate
    from gen.training.run import RunConfig
    from gen.training.task import Model

    if (out / "config.json").exists():
        raise GenError(f"{out} already holds a run; give another --out")
    options = _options(overrides)
    scheduler, file = None, source
    if source.is_dir():
        component = diffusers.component(source, key)
        weights, entry, scheduler, file = component.weights, component.entry, component.scheduler, component.file
        options = component.options | options
    else:
        weights, entry = read_state(source, key)
    if encoder is not None:
        weights = with_encoder(weights, read_weights(encoder))
    held = described(file)
    found = locate(held.system if system is None else system, weights)
    importer = found.importer
    known = held.network if importer.name == held.system and not overrides else importer.infer(found.weights, **options)
    network, params, report = importer.load(found.weights, known)
    print(f"{importer.name}{f', entry {entry!r}' if entry else ''}: {report}")
    if found.outside:
        print(f"taken from under {found.prefix!r}; {found.outside} arrays outside of it are left aside")
    if system is None and held.system is None and importer.alike:
        print(
            f"taken for {importer.name}; {' and '.join(importer.alike)} files have the same names and shapes:", end=" "
        )
        print(f"if it is one, convert again with --system {importer.alike[0]}")
    origin = f"{importer.name} weights {source.name}"
    generator = None if importer.generator is None else sampled_as(importer.generator(network), held)
    if scheduler is not None and generator is not None:
        generator = obeyed(generator, scheduler)
        print(f"sampled as its {scheduler['_class_name']} says")
    origins: dict[str, str] = {}
    made: dict[str, tuple[Any, str]] = {importer.role: (params, origin)}
    if vae is not None or normalizer is not None:
        generator, decoding = _joined(importer, generator, vae, normalizer, held.normalizer)
        made |= decoding
        origins = {role: where for role, (_, where) in decoding.items()}
    models: dict[str, Model] = {importer.role: Model(network if generator is None else generator.subject)}
    sampling = {} if generator is None else {"sampler": generator.sampler, "tokenizer": generator.tokenizer}
    config = RunConfig(origin, frozen=origins, models=models, **sampling)
    for role, (tree, where) in made.items():
        arrays.save(out / "artifacts" / f"{role}.safetensors", tree, {"origin": where})
    write_json(out / "config.json", to_json(config))
    print(f"{count(params):,} parameters, network {fingerprint(network)}; written to {out}")


def _joined(
    importer: Any, generator: Any, vae: Path | None, normalizer: str | None, trained: dict[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """The generator with an autoencoder behind it, and role -> (arrays, where they came from).

    `trained` is the normaliser that stands in the file, where it was exported from a run.
    """
    from gen.pretrained.decoder import join, join_tokens, read_decoder, read_normalizer

    if vae is None:
        raise GenError(f"--normalizer {normalizer} without an autoencoder; add --vae FILE")
    if generator is None:
        raise GenError(f"{importer.name} weights make no latents; leave out --vae")
    decoder = read_decoder(vae)
    if decoder.config.spec.kind != "continuous":
        if normalizer is not None:
            raise GenError(f"{decoder.config.spec.kind} have no normaliser; leave out --normalizer")
        generator = join_tokens(generator, decoder)
        print(f"joined with {decoder.origin}: tokens {generator.latent}, images {generator.shape}")
        return generator, {"tokenizer": (decoder.params, decoder.origin)}
    scale, where = decoder.normalizer, decoder.origin
    if importer.normalizer is not None and len(importer.normalizer.scale) == generator.latent[-1]:
        scale, where = dataclasses.asdict(importer.normalizer), f"published with {importer.name}"
    if trained is not None:
        scale, where = trained, "the run that was exported"
    if normalizer is not None:
        scale, where = read_normalizer(normalizer, generator.latent[-1]), Path(normalizer).name
    if scale is None:
        raise GenError(f"no normaliser of the latents of {importer.name} is known; add --normalizer X (see --help)")
    generator, arrays = join(generator, decoder, scale)
    print(f"joined with {decoder.origin}: latents {generator.latent}, images {generator.shape}")
    return generator, {"tokenizer": (arrays["tokenizer"], decoder.origin), "normalizer": (arrays["normalizer"], where)}


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
    from gen.pretrained.exports import export_file, export_folder, system_of
    from gen.runs import load

    if out.suffix not in ("", ".safetensors"):
        raise GenError(f"cannot export to {out}; give a name that ends in .safetensors, or a folder for diffusers")
    loaded = load(run)
    importer = system_of(loaded, system)
    count = (export_folder if out.suffix == "" else export_file)(loaded, importer, out)
    print(f"{count} arrays under the names of {importer.name}, {loaded.weights} weights; written to {out}")
