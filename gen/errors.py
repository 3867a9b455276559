"""The one exception type whose message is meant for a person rather than a debugger."""

__all__ = ["GenError"]


class GenError(Exception):
    """Bad input. The message is one line: what was wrong, what was expected, what to do.

    Raised at the edges (configuration, files, command line) before anything is compiled. The command
    line prints it without a traceback and exits with status 2.

    Attributes:
      signal: number of the signal that ended the work, where it was saved first; the exit status is then 128 + it.
    """

    signal: int | None = None
