"""``gen list``."""

from typing import Annotated, Any

import tyro

__all__ = ["listing"]


def listing(what: Annotated[str, tyro.conf.Positional] = "all", /) -> None:
    """Lists presets and the registered building blocks by family; imports none of them.

    Examples:
      gen list
      gen list presets
      gen list solver
      gen list protocols

    Args:
      what: presets, a family of building blocks, protocols or measures of gen evaluate, or all.
    """
    from rich.console import Console
    from rich.table import Table

    from gen.config import KINDS, suggest
    from gen.errors import GenError
    from gen.experiments import presets

    tables = ("presets", "protocols", "measures")
    if what not in ("all", *tables, *KINDS):
        raise GenError(f"nothing is called '{what}'; {suggest(what, ['all', *tables, *KINDS])}")
    console = Console()
    if what in ("all", "presets"):
        table = Table("preset", "needs", "what", box=None, header_style="bold")
        for preset in presets().values():
            table.add_row(preset.name, " ".join(f"--{name}" for name in preset.required), preset.line)
        console.print(table)
    if what == "all":
        console.print()
    if what in ("protocols", "measures"):
        console.print(_evaluation(what))
    elif what != "presets":
        table = Table("family", "kind", "class", box=None, header_style="bold")
        for family, members in KINDS.items():
            for i, (kind, target) in enumerate(members.items() if what in ("all", family) else ()):
                table.add_row(family if i == 0 else "", kind, target.replace(":", "."))
        console.print(table)


def _evaluation(what: str) -> Any:
    """The table of protocols, or of the measures that are computed when asked for."""
    from rich.table import Table

    if what == "protocols":
        from gen.metrics.protocol import PRESETS

        table = Table("protocol", "extractor", "N", "what", box=None, header_style="bold")
        for name, preset in PRESETS.items():
            table.add_row(name, preset.extractor, str(preset.fields.get("count", "-")), preset.line)
        return table
    from gen.metrics.measures import MEASURES

    table = Table("measure", "when", "what", box=None, header_style="bold")
    for name, measure in MEASURES.items():
        table.add_row(name, "asked for" if measure.asked else "always", measure.line)
    return table
