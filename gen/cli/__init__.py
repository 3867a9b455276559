"""The ``gen`` command: finds the command, parses its flags, runs it, and turns what goes wrong into one line.

Commands are plain functions with typed parameters, one module per theme beside this one; each is imported
only when it is called, and imports jax only when it runs. `COMMANDS` is the whole table.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import io
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from gen import own
from gen.cli import together
from gen.config import suggest
from gen.errors import GenError

__all__ = ["COMMANDS", "main"]

_INTERRUPTED = 130  # 128 + SIGINT
_asked: list[int] = []  # the signals that asked this program to stop

# command -> ("module:function", one line for the overview)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("gen.cli.train:demo", "train, distil, sample and score handwritten digits; writes a report page"),
    "train": ("gen.cli.train:train", "train a preset, or go on where it stopped"),
    "distill": ("gen.cli.train:distill", "train a few-step student from a teacher run"),
    "sample": ("gen.cli.sample:sample", "make images with a run: PNG folder, grid, npz or zip"),
    "evaluate": ("gen.cli.evaluate:evaluate", "score a run, a folder of images or an npz"),
    "compare": ("gen.cli.compare:compare", "scores of several evaluations side by side, under one protocol"),
    "features": ("gen.cli.features:features", "what a model's features know: probes over blocks and noise levels"),
    "sweep": ("gen.cli.sweep:sweep", "guidance, averages, steps and solvers of a run: the product under one protocol"),
    "ema": ("gen.cli.sweep:ema", "averaged weights of any width after training, and the best one"),
    "search": ("gen.cli.search:search", "better time steps, layers or skip scales for a trained model"),
    "explain": ("gen.cli.explain:explain", "two scores of the same images taken apart, one step at a time"),
    "ratios": ("gen.cli.ratios:ratios", "distances over those of held-out images, in several feature spaces"),
    "reference": ("gen.cli.reference:reference", "statistics of real images, or published ones, for evaluate"),
    "reconstruct": ("gen.cli.tokenizers:reconstruct", "images through a tokenizer and back, with PSNR"),
    "encode": ("gen.cli.tokenizers:encode", "images to a cache of latents for training"),
    "data convert": ("gen.cli.data:convert", "images to an EDM zip, tar shards or ArrayRecord; crop and size"),
    "data inspect": ("gen.cli.data:inspect", "counts, classes, sizes, duplicate and broken images, a preview"),
    "data split": ("gen.cli.data:split", "hold out a share of every class"),
    "convert": ("gen.cli.convert:convert", "published weights to ours and back"),
    "export": ("gen.cli.export:export", "a run as one program with its weights, which needs jax alone"),
    "serve-demo": ("gen.cli.export:serve_demo", "a local page with sliders for seed and class, from an export"),
    "info": ("gen.cli.info:info", "parameters, memory and identities of a preset or run"),
    "compile": ("gen.cli.compile:compile_preset", "memory, traffic and time on a TPU or GPU that is not here"),
    "report": ("gen.cli.report:report", "rebuild the report page of a run folder"),
    "doctor": ("gen.cli.doctor:doctor", "devices, versions and what is missing for which feature"),
    "list": ("gen.cli.listing:listing", "presets and registered building blocks"),
}

EXAMPLES = """\
Examples:
  gen demo                                                     the whole path on a laptop, in minutes
  gen list                                                     what there is
  gen info dit-smoke                                           what a preset is, and all its settings
  gen train dit-smoke --outdir runs/t                          a preset; the same command again resumes
  gen train dit-smoke --outdir runs/t2 --stages.0.steps 500    any setting can be overridden by its path
  gen sample runs/demo/student --seeds 0-63 --out grid.png     images (also a folder/, .npz, .zip)
  gen evaluate runs/demo/student                               scores with the protocol they hold under

gen COMMAND --help explains one command. Every command takes --module FILE: a Python file of your own kinds (backbones,
solvers ...), taken as it is now for runs that were made with an older version of it."""


_MODULE = "a Python file of your own kinds."


def overview(group: Sequence[str] = ()) -> str:
    """Gives the text of ``gen --help``, or of a group's, such as ``gen data --help``."""
    rows = "\n".join(f"  {name:<13} {COMMANDS[name][1]}" for name in group or COMMANDS)
    if group:
        name = group[0].split()[0]
        return f"usage: gen {name} COMMAND [OPTIONS]\n\nCommands:\n{rows}\n\ngen {group[0]} --help explains one."
    return (
        "usage: gen COMMAND [OPTIONS]\n\nImage generation: tokenizers, diffusion models, distillation, evaluation."
        f"\n\nCommands:\n{rows}\n\n{EXAMPLES}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    0: done; 2: bad input, explained in one line on stderr; 130 and 143: stopped by Ctrl-C or SIGTERM, work saved.
    As a program (`argv` None) it ends the process itself where it does not succeed: work that still runs on a device
    or in a thread would crash the interpreter's own farewell, or be waited for.
    """
    program = argv is None
    if program:
        sys.unraisablehook = _lost_interrupt
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(args)
    except KeyboardInterrupt:  # Ctrl-C once more, while the first one was dealt with
        status = _INTERRUPTED
    if program and status:
        _leave(status)
    return status


def _run(args: list[str]) -> int:
    """Runs the command; prints what went wrong, here and on the other processes of the job."""
    try:
        return _command(args)
    except GenError as error:
        if error.signal is not None:  # all processes of the job saved their work and leave
            print(" ".join(str(error).split()), file=sys.stderr, flush=True)
            together.farewell()
            return 128 + error.signal
        return _interruption() if _asked else _failed(2, f"error: {' '.join(str(error).split())}", args)
    except KeyboardInterrupt:
        return _interruption()
    except BrokenPipeError:  # the reader (head, less) has gone: nobody is left to tell
        sys.stderr.close()
        return 141
    except Exception as error:
        if _asked:  # what Ctrl-C became on its way through a library: an ImportError, say
            return _interruption()
        if place := own.where(error):
            return _failed(2, f"error: {place}", args)
        if together.joined():
            found = together.line_of_another()
            if found is None:
                traceback.print_exc()
            together.fail(*(found or (1, f"error: {type(error).__name__}: {error}")), shown=found is None)
        raise
    finally:
        together.part()


def _interruption() -> int:
    return _failed(_INTERRUPTED, "interrupted; the same command again goes on where it stopped")


def _failed(status: int, line: str, args: Sequence[str] = ()) -> int:
    """Prints `line` and gives `status`; where this process is one of several, all of them end so."""
    if together.joined():
        together.fail(status, line)
    print(line, file=sys.stderr, flush=True)
    if args:
        from gen.cli.start import join_late

        if join_late(args):
            together.fail(status, line, shown=True)
    return status


def _command(args: list[str]) -> int:
    """Finds the command, parses its flags and runs it; returns the exit status."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if args else 2
    if args[0] == "--version":
        from gen import __version__

        print(__version__)
        return 0
    if " ".join(args[:2]) in COMMANDS:  # data convert ...
        args[:2] = [" ".join(args[:2])]
    elif group := [command for command in COMMANDS if command.startswith(f"{args[0]} ")]:
        if args[1:] and args[1] not in ("-h", "--help", "help"):
            raise GenError(f"unknown command '{args[0]} {args[1]}'; {suggest(f'{args[0]} {args[1]}', group)}")
        print(overview(group))
        return 0 if args[1:] else 2
    if args[0] not in COMMANDS:
        raise GenError(f"unknown command '{args[0]}'; {suggest(args[0], COMMANDS)} (gen --help shows all)")
    rest, files = _split_modules(args[1:])
    run = parse(args[0], rest)
    if run is not None:
        for file in files:
            own.accept(file)
        run()
    return 0


def _split_modules(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates ``--module FILE``, which every command takes, from the other arguments."""
    rest: list[str] = []
    files: list[str] = []
    queue = list(args)
    while queue:
        flag, equals, value = (arg := queue.pop(0)).partition("=")
        if flag != "--module":
            rest.append(arg)
            continue
        if not equals and not queue:
            raise GenError("--module lacks its value; write --module FILE, a Python file of your own kinds")
        files.append(value if equals else queue.pop(0))
    return rest, files


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C, as Python deals with it, and a note that it came."""
    _asked.append(number)
    raise KeyboardInterrupt


def _lost_interrupt(lost: Any) -> None:
    """Ctrl-C that arrived inside a destructor, which Python would drop."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        _leave(_interruption())
    sys.__unraisablehook__(lost)


def _leave(status: int) -> NoReturn:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def parse(command: str, args: Sequence[str]) -> Callable[[], None] | None:
    """Gives the command's function with its parsed arguments bound; None when its help was printed.

    Flags with a dot in their name (``--stages.0.steps 500``) are overrides of a configuration; they reach the
    function's parameter ``overrides`` as (path, text) pairs. Raises GenError for anything that does not parse.
    """
    import tyro

    module, _, name = COMMANDS[command][0].partition(":")
    function = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(function).parameters
    if "preset" in parameters and "--preset" in args:  # the name alone and --preset NAME are the same
        args = [arg for arg in args if arg != "--preset"]
    takes_overrides = "overrides" in parameters
    plain, overrides = split_overrides(args) if takes_overrides else (list(args), ())
    outer = io.StringIO()
    try:
        with contextlib.redirect_stderr(outer):
            bound, unknown = tyro.cli(
                _binder(function),
                prog=f"gen {command}",
                args=plain,
                return_unknown_args=True,
                description=_help(function),
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        _refuse_positional_flags(command, parameters, plain)
        raise GenError(f"{_one_line(outer.getvalue())}; see gen {command} --help") from None
    if unknown:
        hint = _unknown(unknown[0], function, _settings(bound) if takes_overrides else ())
        raise GenError(f"gen {command}: {hint}; see gen {command} --help")
    return functools.partial(bound, overrides=overrides) if takes_overrides else bound


def _refuse_positional_flags(command: str, parameters: Mapping[str, inspect.Parameter], args: Sequence[str]) -> None:
    """Raises GenError where an argument that has no flag is given as if it had one."""
    plain = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_ONLY]
    for name in plain:
        if any(arg.partition("=")[0] == f"--{name}" for arg in args):
            usage = " ".join(word.upper() for word in plain)
            raise GenError(f"{name.upper()} is given without a flag: gen {command} {usage}; leave out --{name}")


def split_overrides(args: Sequence[str]) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """Separates ``--a.b value`` and ``--a.b=value`` from the other arguments, as ("a.b", "value") pairs.

    Raises GenError for a flag without its value.
    """
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    queue = list(args)
    while queue:
        arg = queue.pop(0)
        flag, equals, value = arg.partition("=")
        if not (flag.startswith("--") and "." in flag):
            rest.append(arg)
            continue
        if not equals:
            if not queue:
                raise GenError(f"{flag} lacks its value; write {flag} VALUE")
            value = queue.pop(0)
        overrides.append((flag[2:], value))
    return rest, tuple(overrides)


def _binder(function: Callable[..., None]) -> Callable[..., Callable[..., None]]:
    """A function with the same parameters that only binds them: nothing may run before all flags are known good."""

    from gen.cli.flags import flag

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[..., None]:
        kwargs.pop("module")  # only its line in the help: `_split_modules` has taken its value
        return functools.partial(function, *args, **kwargs)

    del bind.__wrapped__  # the parser reads what stands here, and not the function behind it
    module = inspect.Parameter("module", inspect.Parameter.KEYWORD_ONLY, default=None)
    signature = inspect.signature(function)
    bind.__signature__ = signature.replace(parameters=[*signature.parameters.values(), module])  # type: ignore[attr-defined]
    bind.__annotations__ = function.__annotations__ | {"module": typing.Annotated[Path | None, flag("FILE")]}
    text, _, flags = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    rows = re.sub(r"\n {4,}", " ", flags)  # it would break lines where the source does
    bind.__doc__ = f"{text}\nArgs:\n{rows}\n  module: {_MODULE}"
    return bind


def _help(function: Callable[..., None]) -> str:
    """The docstring up to its ``Args`` section, which the parser shows flag by flag."""
    return re.split(r"\n\s*Args:\n", inspect.getdoc(function) or "")[0].strip()


def _one_line(box: str) -> str:
    """The parser's error box as one line, without its borders and the help that follows the message."""
    lines = [line.strip("╭╮╰╯│─| +-") for line in box.splitlines() if not set(line.strip()) <= set("│─ |+-")]
    body = [line.strip() for line in lines if line.strip()][1:]
    end = next(
        (i for i, line in enumerate(body) if line.startswith(("Got errors", "Argument helptext", "For full"))), None
    )
    text = " ".join(body[:end])
    text = re.sub(r"no type matching \{None\}\|(\S+) could be instantiated from \['(.*?)'\]", r"'\2' is not \1", text)
    return text[:1].lower() + text[1:].rstrip(".") if text else "the arguments do not parse"


def _flags(function: Callable[..., None]) -> dict[str, str]:
    """All flags of a command, as they are typed, by parameter; a group of flags is a dataclass."""
    hints = typing.get_type_hints(function, include_extras=True)
    flags: dict[str, str] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        group = (typing.get_args(hints[name]) or (hints[name],))[0]
        if dataclasses.is_dataclass(group):
            within = typing.get_type_hints(group, include_extras=True)
            flags |= {field.name: _spelling(field.name, within[field.name]) for field in dataclasses.fields(group)}
        elif parameter.kind is not parameter.POSITIONAL_ONLY and name != "overrides":
            flags[name] = _spelling(name, hints[name])
    return flags | {"module": "--module", "help": "--help"}


def _spelling(name: str, hint: Any) -> str:
    """How a parameter is typed as a flag: by the name its annotation gives it, else by its own."""
    extras = getattr(hint, "__metadata__", ())
    named = next((extra.name for extra in extras if getattr(extra, "name", None)), name)
    return "--" + named.replace("_", "-")


def _settings(bound: Any) -> list[str]:
    """The paths of all settings that a bound command could override; [] where its preset or run cannot be opened."""
    from gen.cli.info import leaves
    from gen.cli.opening import prepare
    from gen.runs import read_config

    what = str(bound.args[0])
    try:
        if Path(what).is_dir():
            paths = [path for path, _ in leaves(read_config(what))]
            return [path for path in paths if path.startswith("sampler.")]
        given = {name: bound.keywords.get(name) for name in ("data", "teacher", "tokenizer")}
        inputs = {name: value if name == "data" or value is None else Path(value) for name, value in given.items()}
        return [path for path, _ in leaves(prepare(what, inputs).config)]
    except GenError:
        return []


def _unknown(argument: str, function: Callable[..., None], settings: Sequence[str]) -> str:
    """What is said of an argument that the parser does not know; `settings` are the paths that could be overridden."""
    flag = argument.partition("=")[0]
    if not flag.startswith("-"):
        return f"unexpected argument '{argument}'"
    name = flag.lstrip("-").replace("_", "-")
    paths = [path for path in settings if path.rpartition(".")[2].replace("_", "-") == name]
    if paths:
        return f"unknown flag '{flag}'; a setting is called by its path: {' or '.join(f'--{path}' for path in paths)}"
    flags = _flags(function)
    if meant := flags.get(name.replace("-", "_")):  # by its name in Python
        return f"unknown flag '{flag}'; it is called {meant}"
    close = difflib.get_close_matches(name, [known[2:] for known in flags.values()], n=1)
    if not close and "overrides" in inspect.signature(function).parameters:
        return f"unknown flag '{flag}'; a setting is called by its path, such as --stages.0.steps; gen info shows them"
    return f"unknown flag '{flag}'; {suggest(f'--{close[0]}' if close else flag, list(flags.values()))}"
