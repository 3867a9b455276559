"""``gen list``."""

from typing import Annotated

import tyro

__all__ = ["listing"]


def listing(what: Annotated[str, tyro.conf.Positional] = "all", /) -> None:
    """Lists presets and the registered building blocks by family; imports none of them.

    Examples:
      gen list
      gen list presets
      gen list solver

    Args:
      what: presets, a family of building blocks, or all.
    """
    from rich.console import Console
    from rich.table import Table

    from gen.config import KINDS, suggest
    from gen.errors import GenError
    from gen.experiments import presets

    if what not in ("all", "presets", *KINDS):
        raise GenError(f"nothing is called '{what}'; {suggest(what, ['all', 'presets', *KINDS])}")
    console = Console()
    if what in ("all", "presets"):
        table = Table("preset", "needs", "what", box=None, header_style="bold")
        for preset in presets().values():
            table.add_row(preset.name, " ".join(f"--{name}" for name in preset.required), preset.line)
        console.print(table)
    if what == "all":
        console.print()
    if what != "presets":
        table = Table("family", "kind", "class", box=None, header_style="bold")
        for family, members in KINDS.items():
            for i, (kind, target) in enumerate(members.items() if what in ("all", family) else ()):
                table.add_row(family if i == 0 else "", kind, target.replace(":", "."))
        console.print(table)
