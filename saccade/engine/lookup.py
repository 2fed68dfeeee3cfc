"""Guesses of an answer's next tokens: what followed the last time its last few tokens were said (prompt-lookup decoding, Saxena 2023).

Answers copy: from the question, from the text they transcribe, from their own rows and keys. A guess costs nothing to make; the
model computes it beside the token that is due, and it is kept only if it is what would have been drawn anyway. Knows token ids as
numbers, and how its guesses fared; knows no model and no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saccade.engine.options import EngineOptions

FEW_ROWS = 8  # whose step is bound by reading the weights
PATIENCE = 4  # failures in a row after which guesses pause: one that fails 9 of 10 times does not pay
LONGEST_PAUSE = 64  # steps


@dataclass(frozen=True)
class Speculation:
    """How next tokens are guessed. `max_rows`: tokens of a step, guesses included, up to which there are any."""

    max_tokens: int = 7  # of a request and step
    longest_match: int = 3
    shortest_match: int = 1
    max_rows: int = FEW_ROWS


def speculation_for(options: EngineOptions, num_alike_rows: int) -> Speculation | None:
    """What the options ask for; None is no guessing.

    `num_alike_rows`: up to how many rows of a step have the bits each has alone, 1 if that is unknown. Unasked, nothing is guessed
    there: a token that two are equally likely for could turn out the other; asked, rows are as many as cost little.
    """
    if options.speculation == "off" or (options.speculation == "auto" and num_alike_rows == 1):
        return None
    return Speculation(
        max_tokens=options.num_speculative_tokens,
        longest_match=options.prompt_lookup_max,
        shortest_match=options.prompt_lookup_min,
        max_rows=num_alike_rows if num_alike_rows > 1 else FEW_ROWS,
    )


@dataclass
class Trust:
    """How matches of one length have fared in this answer: how many tokens to guess next, and for how long none.

    Doubles with success and halves with failure; after PATIENCE failures pauses double too, so that an answer that copies nothing
    loses next to nothing.
    """

    width: int = 1
    failures: int = 0  # in a row
    pause: int = 0

    def ask(self, most: int) -> int:
        """How many tokens to guess, at most `most`, at least 1; 0 during a pause, which this call shortens."""
        if self.pause:
            self.pause -= 1
            return 0
        return min(self.width, most)

    def learn(self, num_guessed: int, num_right: int) -> None:
        if num_right == num_guessed:
            self.width = max(self.width, 2 * num_right + 1)  # with the token that is due: two rows, four, eight
        elif num_right:
            self.width = num_right
        else:
            self.width = max(1, self.width // 2)
        self.failures = 0 if num_right else self.failures + 1
        if self.failures >= PATIENCE:
            self.pause = min(2 ** (self.failures - PATIENCE + 1), LONGEST_PAUSE)


class Lookup:
    """One answer's tokens, prompt first, and where each run of a few of them was last seen."""

    def __init__(self, token_ids: Sequence[int], speculation: Speculation) -> None:
        self.speculation = speculation
        self.token_ids = list(token_ids)
        lengths = range(speculation.longest_match, speculation.shortest_match - 1, -1)
        self._next: dict[int, dict[tuple[int, ...], int]] = {
            length: {} for length in lengths
        }  # run -> the place behind it
        self._trust = {length: Trust() for length in lengths}
        self._num_known = 0  # the runs that end before this place are in _next
        self._matched = 0  # length of the run the last guess followed

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)

    def guess(self, most: int) -> list[int]:
        """What followed the most recent earlier place of the longest run that ends the tokens: at most `most` tokens, perhaps none.

        Where that passage reaches the end it goes on with the guess itself, so that a pattern is continued in its period.
        """
        ids = self.token_ids
        self._take_in()
        for length, places in self._next.items():
            place = places.get(tuple(ids[-length:]))
            if place is not None:
                guess: list[int] = []
                for at in range(place, place + self._trust[length].ask(most)):
                    guess.append(ids[at] if at < len(ids) else guess[at - len(ids)])
                self._matched = length
                return guess
        return []

    def learn(self, num_guessed: int, num_right: int) -> None:
        """How the last guess fared, as far as it was computed."""
        if num_guessed:
            self._trust[self._matched].learn(num_guessed, num_right)

    def _take_in(self) -> None:
        """Notes the runs that have a token behind them."""
        ids = self.token_ids
        for length, places in self._next.items():
            for end in range(max(self._num_known, length), len(ids)):
                places[tuple(ids[end - length : end])] = end
        self._num_known = len(ids)
