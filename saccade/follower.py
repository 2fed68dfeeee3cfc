"""A process that a leader started: opens its share of the model and computes what it is told. Not for people to call."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    from saccade.api import LLM
    from saccade.base.errors import SaccadeError

    try:
        LLM(**json.load(sys.stdin))  # returns only on rank 0
    except SaccadeError as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
