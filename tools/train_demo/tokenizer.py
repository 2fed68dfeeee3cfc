"""A small tokenizer in Qwen2's form: the same cutting pattern and added tokens, a vocabulary of our own text.

Knows tokenizer.json and what the demo model will be asked; knows no pictures beyond drawing what is asked about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from saccade.checkpoints.stand_in import ADDED_TOKENS, NUM_SPECIAL_TOKENS, PIECES
from saccade.evals.tasks import TASKS, draw
from tools.train_demo.talk import chat

SPECIAL = tuple(ADDED_TOKENS[:NUM_SPECIAL_TOKENS])
NOT_SPECIAL = tuple(ADDED_TOKENS[NUM_SPECIAL_TOKENS:])  # added tokens that survive "skip special tokens"
NUM_ORDINARY = 1002
VOCAB_SIZE = NUM_ORDINARY + len(SPECIAL) + len(NOT_SPECIAL)  # 1024

ENGLISH = """
The quick brown fox jumps over the lazy dog. Please answer in one sentence, and keep it short. Which of these things can you see
here, and where are they? There is nothing else to be found in the background. Is it larger or smaller than the other one? What
would you say about this? Tell me more about what happens between the beginning and the end. I do not know how this could have
been done before, but it will work now. Yes, you can use it with any other model. No, that was not the question. Explain why the
left side looks different from the right side. Give me a list of all the objects with their positions and sizes. Thanks for your help.
"""


def corpus(seed: int, num_items: int) -> Iterator[str]:
    """Questions and answers of every task, with dashes for what is drawn, so that digits and capitals stay single tokens."""
    yield from ENGLISH.strip().split("\n") * 4
    yield from ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * num_items
    rng = np.random.default_rng((seed, 0xC0))
    for index in range(num_items):
        for task in TASKS:
            item = draw(task, "train", seed, index)
            yield from (re.sub(r"\b[A-Z]{3}\b", "-", text) for text in (item.question, item.answer))
        turn = chat(rng)
        yield from (turn.question, turn.answer)


def build(seed: int = 0, num_items: int = 200) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_ORDINARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(seed, num_items), trainer)
    added = [AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    added += [AddedToken(t, special=False, normalized=False) for t in NOT_SPECIAL]
    tokenizer.add_tokens(added)
    return tokenizer
