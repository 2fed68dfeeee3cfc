"""Guesses from what was said before: which passage they follow, how long they are, and when there are none."""

from __future__ import annotations

import pytest

from saccade.base.errors import OptionError
from saccade.engine.lookup import LONGEST_PAUSE, PATIENCE, Lookup, Speculation, speculation_for
from saccade.engine.options import EngineOptions


def lookup_of(*token_ids: int, **options: int) -> Lookup:
    lookup = Lookup(token_ids, Speculation(**options))
    for trust in lookup._trust.values():
        trust.width = 7
    return lookup


def test_the_longest_run_decides_before_the_most_recent() -> None:
    assert lookup_of(1, 2, 3, 4, 5, 3, 9, 1, 2, 3).guess(2) == [4, 5]  # 3 was followed by 9 more recently


def test_of_equally_long_runs_the_most_recent_is_followed() -> None:
    assert lookup_of(7, 8, 1, 0, 7, 8, 2, 0, 7, 8).guess(1) == [2]


def test_nothing_is_guessed_after_what_was_never_said() -> None:
    assert lookup_of(1, 2, 3).guess(3) == []
    assert lookup_of().guess(3) == []


def test_shorter_runs_than_the_shortest_do_not_count() -> None:
    assert lookup_of(1, 5, 2, 1, shortest_match=2).guess(3) == []
    assert lookup_of(1, 5, 2, 1).guess(1) == [5]


def test_a_pattern_goes_on_in_its_period_beyond_what_was_said() -> None:
    assert lookup_of(4, 5, 6, 4, 5, 6).guess(7) == [4, 5, 6, 4, 5, 6, 4]
    assert lookup_of(9, 9).guess(4) == [9, 9, 9, 9]


def test_tokens_that_come_later_are_looked_up_too() -> None:
    lookup = lookup_of(1, 2)
    for token_id in (3, 1):
        lookup.append(token_id)
        lookup.guess(1)
    assert lookup.guess(2) == [2, 3]


def test_guesses_grow_with_success_and_shrink_with_failure() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1], Speculation())
    lengths = []
    for num_right in (1, 3, 7, 4, 0, 0, 0):
        guess = lookup.guess(7)
        lengths.append(len(guess))
        lookup.learn(len(guess), num_right)
    assert lengths == [1, 3, 7, 7, 4, 2, 1]


def test_guesses_that_never_hold_become_rare() -> None:
    lookup = Lookup([1, 2, 1], Speculation())
    computed = []
    for step in range(1000):
        guess = lookup.guess(7)
        computed += [step] * len(guess)
        lookup.learn(len(guess), 0)
    assert computed[: PATIENCE + 1] == [*range(PATIENCE), PATIENCE + 2]
    assert len(computed) < PATIENCE + 7 + 1000 / LONGEST_PAUSE
    lookup.learn(1, 1)  # one success, and they are tried again
    assert [len(lookup.guess(7)) for _ in range(LONGEST_PAUSE + 1)].count(0) < LONGEST_PAUSE + 1


def test_short_runs_that_fail_do_not_silence_long_ones() -> None:
    lookup = Lookup([1, 2, 3, 4, 9, 4], Speculation())
    for _ in range(PATIENCE):
        lookup.learn(len(lookup.guess(1)), 0)  # after 4 alone
    assert lookup.guess(1) == []
    for token_id in (1, 2, 3):
        lookup.append(token_id)
    assert lookup.guess(1) == [4]


def test_it_is_on_where_rows_are_known_to_be_alike_or_where_it_is_asked_for() -> None:
    assert speculation_for(EngineOptions(), 1) is None
    assert speculation_for(EngineOptions(speculation="off"), 8) is None
    known = speculation_for(EngineOptions(num_speculative_tokens=3, prompt_lookup_max=4, prompt_lookup_min=2), 4)
    assert known == Speculation(max_tokens=3, longest_match=4, shortest_match=2, max_rows=4)
    assert speculation_for(EngineOptions(speculation="lookup"), 1) == Speculation()


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(OptionError, match="prompt_lookup_min 4 is larger than prompt_lookup_max 3"):
        EngineOptions(prompt_lookup_min=4)
    with pytest.raises(OptionError, match="speculation is 'ngram'; use one of auto, lookup, off"):
        EngineOptions(speculation="ngram")  # type: ignore[arg-type]
