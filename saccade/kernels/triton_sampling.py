"""Triton: the likeliest token of each row of logits, penalties and all, in two launches.

All arithmetic is float32 and rounds where `engine/device_sampling.py` rounds. Letters: B rows, V words of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.record import NOT_FINITE, Said
from saccade.kernels.triton_common import IS_INTERPRETED, ROUNDED_EACH, unbroken

PART = 16384 if IS_INTERPRETED else 1024  # words of a program; the interpreter pays for programs, not for numbers

_NOWHERE = tl.constexpr(2**31 - 1)  # beyond every word


@triton.jit
def _best_of_parts(
    logits_ptr, is_seen_ptr, counts_ptr, is_ender_ptr, penalty_ptr, presence_ptr, frequency_ptr, may_end_ptr,
    best_ptr, place_ptr, is_unfit_ptr, V, logits_stride, PART: tl.constexpr,
):  # fmt: skip
    """Of each part of each row: the best score, the first word that has it, and whether a logit is no number."""
    part, row = tl.program_id(0), tl.program_id(1)
    word = part * PART + tl.arange(0, PART)
    inside = word < V
    at = row.to(tl.int64) * V + word
    logits = tl.load(logits_ptr + row.to(tl.int64) * logits_stride + word, mask=inside, other=0.0).to(tl.float32)
    penalty = tl.load(penalty_ptr + row)
    repeated = tl.where(logits < 0, logits * penalty, tl.div_rn(logits, tl.zeros_like(logits) + penalty))
    scores = tl.where(tl.load(is_seen_ptr + at, mask=inside, other=0) != 0, repeated, logits)
    count = tl.load(counts_ptr + at, mask=inside, other=0.0)
    said = scores - (tl.load(presence_ptr + row) + tl.load(frequency_ptr + row) * count)
    scores = tl.where(count > 0, said, scores)
    is_early = (tl.load(is_ender_ptr + at, mask=inside, other=0) != 0) & (tl.load(may_end_ptr + row) == 0)
    scores = tl.where(is_early | (word >= V), float("-inf"), scores)
    scores = tl.where(scores == scores, scores, float("inf"))  # such a row has no token, but a place in the table
    best = tl.max(scores, axis=0)
    out = row * tl.num_programs(0) + part
    tl.store(best_ptr + out, best)
    tl.store(place_ptr + out, tl.min(tl.where(inside & (scores == best), word, _NOWHERE), axis=0))
    tl.store(is_unfit_ptr + out, tl.max(tl.where(tl.abs(logits) < float("inf"), 0, 1), axis=0))


@triton.jit
def _choose(
    best_ptr, place_ptr, is_unfit_ptr, is_seen_ptr, counts_ptr, token_ids_ptr, told_ptr, V, num_parts,
    NOT_FINITE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The first of the best; it counts as said."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    at, is_part = row * num_parts + part, part < num_parts
    best = tl.load(best_ptr + at, mask=is_part, other=float("-inf"))
    place = tl.load(place_ptr + at, mask=is_part, other=_NOWHERE)
    is_unfit = tl.max(tl.load(is_unfit_ptr + at, mask=is_part, other=0), axis=0)
    token_id = tl.min(tl.where(best == tl.max(best, axis=0), place, _NOWHERE), axis=0).to(tl.int64)
    tl.store(token_ids_ptr + row, token_id)
    tl.store(told_ptr + row, tl.where(is_unfit > 0, NOT_FINITE, token_id))
    tl.store(is_seen_ptr + row * V + token_id, 1)
    tl.store(counts_ptr + row * V + token_id, tl.load(counts_ptr + row * V + token_id) + 1.0)


def likeliest(logits: Tensor, said: Said, may_end: Tensor) -> tuple[Tensor, Tensor]:
    logits = unbroken(logits)
    num_rows, num_words = logits.shape
    num_parts = triton.cdiv(num_words, PART)
    best = torch.empty(num_rows, num_parts, dtype=torch.float32, device=logits.device)
    place, is_unfit = (torch.empty_like(best, dtype=torch.int32) for _ in range(2))
    token_ids, told = (torch.empty(num_rows, dtype=torch.int64, device=logits.device) for _ in range(2))
    is_seen = said.is_seen.view(torch.int8)
    _best_of_parts[(num_parts, num_rows)](
        logits, is_seen, said.counts, said.is_ender.view(torch.int8), said.penalty, said.presence, said.frequency,
        may_end.view(torch.int8), best, place, is_unfit, num_words, logits.stride(0), PART=PART, num_warps=4, **ROUNDED_EACH,
    )  # fmt: skip
    _choose[(num_rows,)](
        best, place, is_unfit, is_seen, said.counts, token_ids, told, num_words, num_parts,
        NOT_FINITE=NOT_FINITE, PARTS=triton.next_power_of_2(num_parts), num_warps=4, **ROUNDED_EACH,
    )  # fmt: skip
    return token_ids, told
