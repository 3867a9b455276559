"""``gen list``."""

from typing import Annotated

import tyro

__all__ = ["listing"]


def listing(what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WHAT")] = "all", /) -> None:
    """Lists presets and the registered building blocks by family; imports none of them.

    Examples:
      gen list
      gen list presets
      gen list solver
      gen list protocols

    Args:
      what: presets, a family of building blocks, protocols or measures of gen evaluate, or all.
    """
    from gen.cli.tables import print_table
    from gen.config import KINDS, suggest
    from gen.errors import GenError
    from gen.experiments import presets

    tables = ("presets", "protocols", "measures")
    if what not in ("all", *tables, *KINDS):
        raise GenError(f"nothing is called '{what}'; {suggest(what, ['all', *tables, *KINDS])}")
    if what in ("all", "presets"):
        rows = [[p.name, " ".join(f"--{name}" for name in p.required), p.line] for p in presets().values()]
        print_table(["preset", "needs", "what"], rows, names=2)
    if what == "all":
        print()
    if what == "protocols":
        print_table(["protocol", "extractor", "N", "what"], _protocols(), names=3)
    elif what == "measures":
        print_table(["measure", "when", "what"], _measures(), names=2)
    elif what != "presets":
        chosen = {family: members for family, members in KINDS.items() if what in ("all", family)}
        rows = [
            [family if i == 0 else "", kind, target.replace(":", ".")]
            for family, members in chosen.items()
            for i, (kind, target) in enumerate(members.items())
        ]
        print_table(["family", "kind", "class"], rows, names=2)


def _protocols() -> list[list[str]]:
    from gen.metrics.protocol import PRESETS

    return [[name, p.extractor, str(p.fields.get("count", "-")), p.line] for name, p in PRESETS.items()]


def _measures() -> list[list[str]]:
    from gen.metrics.measures import MEASURES

    return [[name, "asked for" if m.asked else "always", m.line] for name, m in MEASURES.items()]
