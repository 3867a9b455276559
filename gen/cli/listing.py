"""``gen list``."""

from pathlib import Path
from typing import Annotated

import tyro

from gen.cli.flags import flag

__all__ = ["listing"]


def listing(what: Annotated[str, tyro.conf.Positional, flag("WHAT")] = "all", /) -> None:
    """Lists presets, building blocks by family, or the presets and kinds of your own file; imports none of them.

    Examples:
      gen list
      gen list presets
      gen list solver
      gen list protocols
      gen list ./myexp.py

    Args:
      what: presets, a family of building blocks, protocols or measures of gen evaluate, a file, or all.
    """
    from gen.cli.tables import print_table
    from gen.config import members, suggest
    from gen.errors import GenError
    from gen.experiments import file_kinds, file_presets, is_file, presets
    from gen.kinds import KINDS

    tables = ("presets", "protocols", "measures")
    own = is_file(what)
    if not own and what not in ("all", *tables, *KINDS):
        raise GenError(f"nothing is called '{what}'; {suggest(what, ['all', *tables, *KINDS])}")
    found = file_kinds(Path(what)) if own else []
    if own or what in ("all", "presets"):
        own_presets = file_presets(Path(what), required=not found) if own else {}
        table = {f"{what}:{name}": p for name, p in own_presets.items()} if own else presets()
        rows = [[name, " ".join(f"--{n}" for n in p.required), p.line] for name, p in table.items()]
        if rows:
            print_table(["preset", "needs", "what"], rows, names=2)
    if found:
        print_table(["family", "kind", "class"], [list(row) for row in found], names=2)
    if what == "all":
        print()
    if what == "protocols":
        print_table(["protocol", "extractor", "N", "what"], _protocols(), names=3)
    elif what == "measures":
        print_table(["measure", "when", "what"], _measures(), names=2)
    elif what != "presets" and not own:
        rows = [
            [family if i == 0 else "", kind, target.replace(":", ".")]
            for family in (KINDS if what == "all" else [what])
            for i, (kind, target) in enumerate(members(family).items())
        ]
        print_table(["family", "kind", "class"], rows, names=2)


def _protocols() -> list[list[str]]:
    from gen.metrics.protocol import PRESETS

    return [[name, p.extractor, str(p.fields.get("count", "-")), p.line] for name, p in PRESETS.items()]


def _measures() -> list[list[str]]:
    from gen.metrics.measures import MEASURES

    rows = [[name, "asked for" if m.asked else "always", m.line] for name, m in MEASURES.items()]
    return [*rows, ["likelihood", "alone", "bits per image of a token model, on held-out tokens (--heldout CACHE)"]]
