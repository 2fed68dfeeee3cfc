"""The command line: flags become options, errors become one line. Nothing heavy is imported before it is needed."""

from saccade.cli.commands import main, program

__all__ = ["main", "program"]
