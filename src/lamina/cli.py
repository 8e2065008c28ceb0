"""The ``lamina`` command."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from . import demo
from ._core.errors import LaminaError
from ._version import __version__
from .io.commands import add_commands

__all__ = ["main"]

_INTERRUPTED = 130


class Command(NamedTuple):
    """A subcommand: its one-line help, its options, and what it does."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS: dict[str, Command] = {
    "demo": Command(demo.HELP, demo.add_arguments, demo.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the words after ``lamina`` (default: those of this process).

    Returns:
        The exit status: 0, 2 for what the user can mend, 130 after Ctrl-C. With ``LAMINA_DEBUG``
        set, errors are raised instead.

    Raises:
        SystemExit: as argparse does, for ``--help``, ``--version`` and wrong options.

    Example:
        >>> from lamina.cli import main
        >>> main([])  # doctest: +ELLIPSIS
        usage: lamina [-h] [--version] COMMAND ...
        2
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows ? for it
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("lamina: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (LaminaError, OSError) as error:
        if os.environ.get("LAMINA_DEBUG"):
            raise
        print(f"lamina {options.command}: {_worded(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lamina", description="PyTorch's module semantics on JAX's engine."
    )
    version = f"lamina {__version__} (JAX {jax.__version__}, Python {sys.version.split()[0]})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help.capitalize())
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    add_commands(commands)
    return parser


def _worded(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
