"""A small tokenizer in Qwen2's form: the same cutting pattern and added tokens, a vocabulary of our own text.

Knows tokenizer.json and what the demo model will be asked; knows no pictures' pixels beyond drawing scenes to ask about.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from saccade.checkpoints.stand_in import ADDED_TOKENS, NUM_SPECIAL_TOKENS, PIECES
from tools.train_demo.scenes import clip, picture
from tools.train_demo.tasks import CLIP_TASKS, PAIR_TASKS, PICTURE_TASKS, ask_about, chat

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


def corpus(seed: int, num_scenes: int) -> Iterator[str]:
    """Questions and answers about random scenes, each drawn text replaced by a dash so that letters stay single tokens."""
    rng = np.random.default_rng((seed, 0xC0))
    yield from ENGLISH.strip().split("\n") * 4
    yield from ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * num_scenes
    for _ in range(num_scenes):
        scenes = picture(rng, 112, 112), picture(rng, 112, 112)
        turns = [ask_about(rng, scenes[0], PICTURE_TASKS) for _ in range(5)]
        turns += [ask_about(rng, scenes, PAIR_TASKS), ask_about(rng, clip(rng, 56, 56, 6), CLIP_TASKS), chat(rng)]
        drawn = [item.text for scene in scenes for item in scene.items if item.text]
        for turn in turns:
            for text in (turn.question, turn.answer):
                for string in drawn:
                    text = text.replace(string, "-")
                yield text


def build(seed: int = 0, num_scenes: int = 1500) -> Tokenizer:
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
    tokenizer.train_from_iterator(corpus(seed, num_scenes), trainer)
    added = [AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    added += [AddedToken(t, special=False, normalized=False) for t in NOT_SPECIAL]
    tokenizer.add_tokens(added)
    return tokenizer
