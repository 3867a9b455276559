"""Tables on stdout in which nothing that one must type is ever cut off."""

from collections.abc import Sequence

__all__ = ["print_table"]


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> None:
    """Prints a table as wide as the terminal; wider where its names ask for it, and unbroken into a pipe or a file.

    Args:
      columns: the headings.
      rows: cells as text.
      names: how many of the first columns hold names: they stay on one line, whole. Further columns wrap.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i < names, overflow="fold")
    for row in rows:
        table.add_row(*row)
    needed = Measurement.get(console, console.options.update(width=10_000), table)
    if console.is_terminal:
        words = max((len(word) for row in [columns, *rows] for cell in row[names:] for word in cell.split()), default=0)
        keys = sum(max(len(row[i]) for row in [columns, *rows]) + 2 for i in range(min(names, len(columns))))
        console.width = max(console.width, keys + min(words, 32))
    else:
        console.width = max(needed.maximum, 1)
    with console.capture() as printed:
        console.print(table)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))
