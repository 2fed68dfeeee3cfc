"""`python -m saccade.cli`, where the `saccade` command is not installed."""

from saccade.cli.commands import main

main()
