"""A back end is a record of functions: each op with its meaning and shapes.

`reference.py` defines every op in plain torch; other back ends return the reference with some fields replaced.
Letters: T tokens or patches of all sequences, packed without padding; N query heads, K key heads (N a multiple of K), D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from saccade.schemes.scheme import Weight

KV_SCALE_BYTES = 4  # of a token and head in an int8 cache, behind its values
NOT_FINITE = -1  # in place of a token whose logits were no numbers


@dataclass(frozen=True)
class Segments:
    """Consecutive runs of rows that attend among themselves: windows, time slices or whole sequences. No run is empty."""

    lengths: tuple[int, ...]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        starts, total = [], 0
        for length in self.lengths:
            starts.append(total)
            total += length
        return tuple(starts)

    @cached_property
    def by_length(self) -> dict[int, Tensor]:
        """Length -> rows [number of segments of this length, length] int64: segments of one length are computed as one batch."""
        groups: dict[int, list[int]] = {}
        for start, length in zip(self.starts, self.lengths, strict=True):
            groups.setdefault(length, []).append(start)
        return {length: torch.tensor(starts)[:, None] + torch.arange(length) for length, starts in groups.items()}


@dataclass(frozen=True)
class PagedLayout:
    """Where this step's queries are and where their keys lie.

    query_lengths[s] queries of sequence s are the last of its context_lengths[s] tokens, whose keys and values fill the
    blocks block_tables[s, :] in order. slots[t] = block * block_size + offset is where token t of this step is stored.
    """

    query_lengths: tuple[int, ...]
    context_lengths: tuple[int, ...]
    block_tables: Tensor  # [S, blocks] int64, unused entries 0
    slots: Tensor  # [T] int64
    derived: dict[int, Tensor] = field(
        default_factory=dict, init=False, compare=False
    )  # what a back end keeps for all layers

    @cached_property
    def contexts(self) -> Tensor:
        """[S] int32: context_lengths where the block tables are."""
        return torch.tensor(self.context_lengths, dtype=torch.int32, device=self.block_tables.device)


class Linear(Protocol):
    def __call__(self, x: Tensor, weight: Weight) -> Tensor:
        """x: [T, H]. Returns x W^T + bias, [T, O] in x.dtype.

        Activations not quantized (dense, w8a16, w4a16): W is what the weight stands for, each number rounded to x.dtype at most;
        sums in float32 or wider, scales in float32.
        Quantized, the weight's scale one for each row (w8a8, w8a8-dynamic, w4a8): the product is exact in whole numbers; all else
        is float32, round is half to even. q: the weight's whole numbers, group scales multiplied in (`integer_values`).
        static: x_q = clamp(round(x / s + z), -128, 127); y = (x_q q^T + quant_bias) * deq_scale, without the bias.
        dynamic: s_t = max |x[t]| / 127 (tiny if 0), x_q = round(x / s_t); y = (x_q q^T * s_t) * scale + bias.
        Quantized, a scale for each group (w4a8-float): x_q and s_t as in dynamic; y = s_t * sum_g (x_q,g q_g^T) * scale_g + bias,
        the product of a group exact in whole numbers, the sum over groups float32 in any order.
        fp8: s_t = max |x[t]| / 448 (tiny if 0), x_q = e4m3(x / s_t), half to even; y = (x_q q^T * s_t) * scale + bias, the products
        (exact in float32) summed in float32 in any order.
        """


class AlikeRows(Protocol):
    def __call__(self, weight: Weight, dtype: torch.dtype) -> int:
        """Up to how many rows of x of `dtype` `linear` takes at once so that each has the bits it has alone; 1 if that is unknown."""


class RmsNorm(Protocol):
    def __call__(self, x: Tensor, gain: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual: [T, H]; gain: [H]. Returns (norm(x + residual), x + residual), both in x.dtype.

        The mean square is taken in float32; the normalised row is cast to x.dtype, then multiplied by the gain.
        """


class Rope(Protocol):
    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q: [T, N, D]; k: [T, K, D]; cos, sin: [T, D/2] float32. Rotates element j with j + D/2, in float32, cast back."""


class SiluMul(Protocol):
    def __call__(self, gate_up: Tensor) -> Tensor:
        """gate_up: [T, 2I], gate first. Returns silu(gate) * up, [T, I]."""


class AttentionVarlen(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, causal: bool = False
    ) -> Tensor:
        """q: [T, N, D]; k, v: [T, K, D]. Softmax attention within each segment, softmax in float32. Returns [T, N, D]."""


class StoreKv(Protocol):
    def __call__(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, layout: PagedLayout) -> None:
        """k, v: [T, K, D] into caches [blocks, block_size, K, D] at layout.slots.

        An int8 cache is [blocks, block_size, K, D + 4]: the D values of a token and head, and the four bytes of their float32
        scale s = max |x| / 127 (tiny if 0). A value is round(x / s), half to even, in float32.
        """


class AttentionPaged(Protocol):
    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, layout: PagedLayout, scale: float) -> Tensor:
        """q: [T, N, D]; caches [blocks, block_size, K, D]. Causal attention over each sequence's cache. Returns [T, N, D].

        Of an int8 cache (see StoreKv), value times scale is meant, rounded to q.dtype at most.
        """


@dataclass(frozen=True)
class DecoderLayerWeights:
    input_gain: Tensor
    qkv: Weight
    output: Weight
    post_gain: Tensor
    gate_up: Weight
    down: Weight


@dataclass(frozen=True)
class DecoderWeights:
    """All that is fixed of a decoder but its table and its head; `gain` is the last norm's."""

    layers: tuple[DecoderLayerWeights, ...]
    gain: Tensor
    eps: float
    num_heads: int


class DecoderStep(Protocol):
    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, layout: PagedLayout) -> Tensor:
        """x: [T, H] embedded tokens; cos, sin: [T, D/2] float32. Stores their keys and values in the planned cache.

        Returns the normed last hidden rows [T, H], to the bit what the ops give one by one.
        """


class PlanDecoder(Protocol):
    def __call__(self, weights: DecoderWeights, cache: Tensor) -> DecoderStep | None:
        """cache: [layers, 2, blocks, block_size, K, D], or int8 as StoreKv says. The step over these numbers, which stay
        where they are; None where the back end would rather be called op by op."""


@dataclass(frozen=True)
class Said:
    """What the choice of B answers' next tokens depends on beside logits; it grows with every token."""

    is_seen: Tensor  # [B, V] bool, in the prompt or the answer
    counts: Tensor  # [B, V] float32, in the answer
    is_ender: Tensor  # [B, V] bool, ends the answer
    penalty: Tensor  # [B, 1] float32 as are the others: of repetition
    presence: Tensor
    frequency: Tensor


class Likeliest(Protocol):
    def __call__(self, logits: Tensor, said: Said, may_end: Tensor) -> tuple[Tensor, Tensor]:
        """logits: [B, V] in any float type; may_end: [B] bool. The likeliest tokens after penalties, of equals the first, no ender
        where the answer may not end; they count as said.

        Returns them, [B] int64, within the vocabulary whatever the logits; and the same with NOT_FINITE where a logit is no number.
        """


@dataclass(frozen=True)
class Kernels:
    """Every op of the model; `sources` says which back end each comes from.

    `plan_decoder`: where a back end has all ops of the decoder, a step of it as one call; without Python between the ops. A
    row's bits depend on no other row of the step there, as far as `alike_rows` of its weights says.
    `likeliest`: the choice of greedy answers' tokens, where a back end has it whole; to the bit what operations on tensors give.
    """

    linear: Linear
    rms_norm: RmsNorm
    rope: Rope
    silu_mul: SiluMul
    attention_varlen: AttentionVarlen
    store_kv: StoreKv
    attention_paged: AttentionPaged
    sources: Mapping[str, str] = field(default_factory=dict)
    plan_decoder: PlanDecoder | None = None
    alike_rows: AlikeRows | None = None
    likeliest: Likeliest | None = None


OPS = tuple(f.name for f in fields(Kernels) if f.name not in ("sources", "plan_decoder", "alike_rows", "likeliest"))
