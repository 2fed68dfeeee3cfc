"""Whether transformers answers alike: python -m benchmarks.eval_parity [--model demo] [--limit 200]

Asks both the same items, in float32, greedily, one after the other, and prints how many answers are equal token by token. Needs
the test extra (transformers).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from saccade.base.meter import progress
from saccade.checkpoints.hub import resolve
from saccade.engine.options import EngineOptions
from saccade.evals import tasks
from saccade.evals.run import Candidate, EvalOptions, answer
from tests.parity.oracle import Oracle, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int, default=200, help="items in all, spread over the tasks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = list(tasks.TASKS)
    items = [tasks.draw(names[n % len(names)], "test", options.seed, n // len(names)) for n in range(options.limit)]
    llm = Candidate(options.model, EngineOptions(dtype="float32")).open()
    eval_options = EvalOptions(seed=options.seed)
    ours = answer(llm, items, eval_options)
    oracle = Oracle(load(Path(resolve(options.model))))
    differing = []
    with progress(len(items), "asking transformers") as advance:
        for item, outcome in zip(items, ours, strict=True):
            prompt = llm.prepare(item.messages)
            eos = llm.config.generation.eos_token_ids
            theirs = oracle.greedy(prompt, llm.config, eval_options.max_tokens, stop=eos)
            if tuple(theirs) != outcome.token_ids:
                differing.append((item, outcome.text, llm.tokenizer.decode(theirs)))
            advance(1)
    print(f"{len(items) - len(differing)} of {len(items)} answers are equal token by token")
    for item, text, expected in differing:
        print(f"{item.id}: {text!r}, transformers {expected!r}")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
