"""Begins a run from an exported model: python -m tools.train_demo.reopen --model saccade/demo/model --run runs/nano

Knows the exported weights and the throw-away heads, which are not among them; knows nothing of the tasks. The heads are fitted to
the tower as it is, before they may move it. The optimisers begin anew.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tools.train_demo.batches import START_WEIGHTS, BatchSource, Packer
from tools.train_demo.train import SEED, SIZES, WEIGHTS, WORKING_DTYPE, Training, demo_config, see

NUM_BATCHES = 40  # that the heads are fitted to
ROUNDS = 25  # how often each is shown
HEAD_RATE = 5e-3


def fit_heads(training: Training, source: BatchSource) -> tuple[float, float]:
    """Fits the heads to the tower as it stands. Returns their mean loss in the first and in the last round."""
    with torch.no_grad():
        batches = [source(index) for index in range(NUM_BATCHES)]
        shown = [
            (units.to(WORKING_DTYPE), group.dense)
            for batch in batches
            for units, group in zip(see(training.network, batch), batch.groups, strict=True)
        ]
    optimiser = torch.optim.AdamW(training.head.parameters(), lr=HEAD_RATE)
    means = []
    for done in range(ROUNDS):
        optimiser.param_groups[0]["lr"] = HEAD_RATE * (1 - done / ROUNDS)
        total = 0.0
        for units, targets in shown:
            losses = training.head.losses(units, targets)
            loss = torch.stack([value * WEIGHTS[name] for name, value in losses.items()]).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item()
        means.append(total / len(shown))
    return means[0], means[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("saccade/demo/model"))
    parser.add_argument("--run", type=Path, default=Path("runs/nano"))
    parser.add_argument("--size", choices=SIZES, default="nano")
    arguments = parser.parse_args()
    arguments.run.mkdir(parents=True, exist_ok=True)
    shutil.copy(arguments.model / "tokenizer.json", arguments.run / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(arguments.run / "tokenizer.json"))
    training = Training(demo_config(tokenizer, arguments.size))
    weights = load_file(arguments.model / "model.safetensors")
    training.network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    packer = Packer(tokenizer, training.network.config.vision.tokens_per_second)
    before, after = fit_heads(training, BatchSource(packer, SEED + 1, lambda: START_WEIGHTS, test=False))
    training.save(arguments.run / "checkpoint.pt")
    print(f"{arguments.run / 'checkpoint.pt'}: the heads' loss went from {before:.2f} to {after:.2f}")


if __name__ == "__main__":
    main()
