"""The float and the quantized model side by side, one block of each in memory: the error of every linear and every block.

The rows of both travel through the float model's own forward in one batch, the float model's in the first half, the quantized
one's in the second, so that nothing of the model is written twice; each block is replaced by one that gives each half to the
model it belongs to. Besides, the quantized block is run on the float half: what it then does wrong is its own doing.

Smoothing and rotation change tensors and not the function, so tensors are compared where the function pins them:
- the residual stream, up to one orthogonal map, which is found from the two embeddings;
- q, k, v and up, up to a positive factor of each channel, which the layer after undoes, and which is fitted;
- everything else as it is.
Letters: T rows, O outputs, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saccade.base.meter import progress
from saccade.checkpoints.formats import EMBEDDING, HEAD, Checkpoint
from saccade.kernels import reference
from saccade.kernels.record import Kernels, Segments
from saccade.kernels.reference import quantize_rows
from saccade.model.language import DecoderLayer, WholeSequences
from saccade.model.layers import Embedding, Filled, Filling, Linear, Norm, fill
from saccade.model.qwen2_5_vl import Qwen2_5_VL
from saccade.model.vision import Merger, VisionBlock
from saccade.quantize.report import KINDS, QUANTILES, BlockMeasure, InputRange, LayerMeasure, sqnr_db
from saccade.schemes.affine import quantize_rows_fp8
from saccade.schemes.scheme import Weight
from saccade.verify.basis import find_rotation, rows_of, turned, value_rotations
from saccade.verify.samples import Packed, Sample, pack

FREE_OUTPUTS = ("q_proj", "k_proj", "v_proj", "up_proj", "attn.qkv")  # up to a factor of each channel
NORMED_INPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # of the decoder: they read the stream
RESIDUAL_OUTPUTS = ("o_proj", "mlp.down_proj", "merger.mlp.2")  # of the language model: in the stream's basis
HEAD_VALUES_AT_ONCE = 1 << 25
ROWS_AT_ONCE = 512  # of a weight


@dataclass
class SideBySide:
    """What a run measured, and the logits [A, V] float32 of both models for the samples' answers."""

    layers: list[LayerMeasure] = field(default_factory=list)
    blocks: list[BlockMeasure] = field(default_factory=list)
    exact: Tensor = field(default_factory=lambda: torch.empty(0))
    quantized: Tensor = field(default_factory=lambda: torch.empty(0))
    is_rotated: bool = False


@torch.inference_mode()
def run_side_by_side(
    source: Checkpoint, quantized: Checkpoint, samples: Sequence[Sample], kernels: Kernels, device: torch.device
) -> SideBySide:
    """In float32, so that no rounding but the quantization's is measured. The checkpoints have equal configs."""
    packed = pack(samples, source.config)
    rotation = find_rotation(source, quantized)
    found = SideBySide(is_rotated=rotation is not None)
    exact, other = Qwen2_5_VL(source.config, kernels), Qwen2_5_VL(quantized.config, kernels)
    fillings = tuple(Filling(checkpoint, torch.float32, device) for checkpoint in (source, quantized))
    names = [name for name, _ in exact.blocks() if name not in ("model.embed_tokens", "lm_head")]
    blocks, others = dict(exact.blocks()), dict(other.blocks())
    with progress(len(names), "comparing") as advance:
        for name in names:
            pair = _Pair(name, blocks[name], others[name], fillings, packed, rotation, found, advance)
            blocks[name].forward = pair.forward
        tables = Tables((source, quantized), device)
        exact.language.embed_tokens.forward = tables.rows  # type: ignore[method-assign]
        exact.lm_head.forward = tables.logits  # type: ignore[method-assign,assignment]
        logits = _forward(exact, packed, kernels, device)
    found.exact, found.quantized = (half.float().cpu() for half in logits.chunk(2))
    return found


def _forward(model: Qwen2_5_VL, packed: Packed, kernels: Kernels, device: torch.device) -> Tensor:
    """Two halves of the same samples. Returns [2 A, V]."""
    num_tokens = len(packed.token_ids)
    ids = packed.token_ids.repeat(2).to(device)
    features = rows = None
    if packed.patches is not None:
        features = model.visual(packed.patches.repeat(2, 1).to(device), packed.grids * 2)
        rows = torch.cat([packed.media_rows, packed.media_rows + num_tokens]).to(device)
    # The model's own `embed` asks the embedding first, which is a pair here, then places the features.
    x = model.embed(ids, rows, features)
    attend = WholeSequences(kernels, packed.lengths * 2)
    hidden = model(x, packed.positions.repeat(1, 2).to(device), attend, rows)
    answers = torch.cat([packed.answer_rows, packed.answer_rows + num_tokens]).to(device)
    return model.head(hidden[answers])


# --- a block of each -------------------------------------------------------------------------------------------------


@dataclass
class _Pair:
    """Stands in for a block of the float model: fills one, then the other, runs them on their halves, measures."""

    name: str
    ours: nn.Module
    theirs: nn.Module
    fillings: tuple[Filling, ...]
    packed: Packed
    rotation: Tensor | None  # [H, H]: a row x of our stream is x @ rotation in theirs
    found: SideBySide
    advance: Callable[[int], None]

    def forward(self, *arguments: Any) -> Any:
        first, second = ([_half(argument, which) for argument in arguments] for which in (0, 1))
        is_block = isinstance(self.ours, VisionBlock | DecoderLayer | Merger)
        with _filled(self.ours, self.fillings[0]), _recorded(self.ours) as seen:
            exact = type(self.ours).forward(self.ours, *first)
        with _filled(self.theirs, self.fillings[1]):
            if is_block:
                with _recorded(self.theirs) as seen_there:
                    alone = type(self.theirs).forward(self.theirs, *self._to_their_basis(first))
            own = type(self.theirs).forward(self.theirs, *second)
        if is_block:
            self._measure_linears(seen, seen_there)
            self._measure_block(first, exact, alone, own)
        self.advance(1)
        if isinstance(exact, tuple):
            return tuple(torch.cat(halves) for halves in zip(exact, own, strict=True))
        return torch.cat([exact, own])

    @property
    def checkpoints(self) -> tuple[Checkpoint, Checkpoint]:
        ours, theirs = (filling.source for filling in self.fillings)
        assert isinstance(ours, Checkpoint), "both are filled from checkpoints"
        assert isinstance(theirs, Checkpoint), "both are filled from checkpoints"
        return ours, theirs

    @property
    def _queries_per_key(self) -> int:
        text = self.checkpoints[0].config.text
        return text.num_heads // text.num_kv_heads

    @property
    def _is_text(self) -> bool:
        return self.name.startswith("model.")

    def _masks(self) -> dict[str, Tensor]:
        """Rows by kind of token; in the tower all belong to pictures."""
        if not self._is_text:
            return {"picture": torch.ones((), dtype=torch.bool)}
        return {kind: mask for kind in KINDS if bool((mask := self.packed.mask(kind)).any())}

    def _to_their_basis(self, arguments: list[Any]) -> list[Any]:
        """A decoder layer's rows, (x, residual, ...), as the quantized model would have them."""
        if self.rotation is None or not self._is_text:
            return arguments
        rows = [None if rows is None else rows @ self.rotation for rows in arguments[:2]]
        return [*rows, *arguments[2:]]

    def _back(self, rows: Tensor, is_in_stream: bool) -> Tensor:
        return rows if self.rotation is None or not is_in_stream else rows @ self.rotation.T

    def _measure_linears(self, seen: dict[str, _Seen], seen_there: dict[str, _Seen]) -> None:
        masks = self._masks()
        usual = ~self.packed.mask("first") if self._is_text else masks["picture"]
        for module, ours in seen.items():
            theirs = seen_there[module]
            arrived = theirs.input
            if self.rotation is not None and self._is_text and module.endswith(NORMED_INPUTS):
                arrived = arrived @ self.rotation.T
            if self.rotation is not None and module.endswith("o_proj"):
                heads = value_rotations(*self.checkpoints, module.removesuffix(".o_proj"), self.rotation)
                arrived = turned(arrived, heads.repeat_interleave(self._queries_per_key, 0).transpose(1, 2))
            arrived = arrived * channel_factors(ours.input, arrived)
            is_in_stream = module.endswith(RESIDUAL_OUTPUTS) and (self._is_text or module.endswith("merger.mlp.2"))
            output = self._back(theirs.output, is_in_stream)
            if self.rotation is not None and module.endswith("self_attn.v_proj"):
                heads = value_rotations(*self.checkpoints, module.removesuffix(".v_proj"), self.rotation)
                output = turned(output, heads.transpose(1, 2))
            if module.endswith(FREE_OUTPUTS):
                output = output * channel_factors(ours.output, output)
            self.found.layers.append(
                LayerMeasure(
                    module,
                    theirs.scheme,
                    {kind: _sqnr(ours.output, output, mask) for kind, mask in masks.items()},
                    rounding_db=None if theirs.rounded is None else _sqnr(theirs.input, theirs.rounded, usual),
                    input_db=_sqnr(ours.input, arrived, usual),
                    ranges=InputRange(_quantiles(ours.input), _quantiles(theirs.input)),
                    clipped=theirs.clipped,
                    kurtosis=ours.kurtosis,
                    size_bytes=theirs.size_bytes,
                )
            )

    def _measure_block(self, arguments: list[Any], exact: Any, alone: Any, own: Any) -> None:
        is_in_stream = self._is_text or isinstance(self.ours, Merger)
        before = 0 if isinstance(self.ours, Merger) else _stream(arguments[0], arguments[1])
        after, theirs = _stream(*_pair(exact)), self._back(_stream(*_pair(alone)), is_in_stream)
        carried = self._back(_stream(*_pair(own)), is_in_stream)
        delta, their_delta = after - before, theirs - before
        masks = self._masks()
        self.found.blocks.append(
            BlockMeasure(
                self.name,
                {kind: _sqnr(delta, their_delta, mask) for kind, mask in masks.items()},
                {kind: _cosine(delta, their_delta, mask) for kind, mask in masks.items()},
                {kind: _sqnr(after, carried, mask) for kind, mask in masks.items()},
            )
        )


def _half(argument: Any, which: int) -> Any:
    """Half of the rows, and of what describes rows."""
    if isinstance(argument, Tensor):
        return argument.chunk(2)[which]
    if isinstance(argument, Segments):
        return Segments(argument.lengths[: len(argument.lengths) // 2])
    if isinstance(argument, WholeSequences):
        lengths = argument.segments.lengths
        return WholeSequences(argument.kernels, lengths[: len(lengths) // 2])
    assert argument is None, f"{type(argument)} has no halves"
    return None


@contextmanager
def _filled(block: nn.Module, filling: Filling) -> Iterator[None]:
    """Of the two blocks one at a time has its numbers: in float32 they are what takes most memory."""
    fill(block, filling)
    yield
    empty(block)


def empty(block: nn.Module) -> None:
    """Takes back what `fill` gave."""
    for layer in block.modules():
        if isinstance(layer, Linear | Embedding):
            del layer.weight
        elif isinstance(layer, Norm):
            del layer.gain


# --- embedding and head ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """Both models' embeddings and heads, which are never in memory whole: of a large vocabulary they outweigh every block."""

    checkpoints: tuple[Checkpoint, Checkpoint]
    device: torch.device

    def rows(self, token_ids: Tensor) -> Tensor:
        """token_ids: [2 T], a half for each model. Returns [2 T, H]."""
        halves = zip(self.checkpoints, token_ids.cpu().chunk(2), strict=True)
        return torch.cat([_embedded(checkpoint, ids) for checkpoint, ids in halves]).to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [2 A, H]. Returns [2 A, V]."""
        halves = zip(self.checkpoints, hidden.chunk(2), strict=True)
        return torch.cat([_logits(checkpoint, rows) for checkpoint, rows in halves])


def _embedded(checkpoint: Checkpoint, token_ids: Tensor) -> Tensor:
    different, places = torch.unique(token_ids, return_inverse=True)
    rows = torch.empty(len(different), checkpoint.config.text.hidden_size)
    for place, token in enumerate(different.tolist()):
        checkpoint.read_into(EMBEDDING, rows[place : place + 1], slice(token, token + 1))
    return rows[places]


def _logits(checkpoint: Checkpoint, hidden: Tensor) -> Tensor:
    if (weight := checkpoint.weight("lm_head")) is not None:
        return reference.linear(hidden, weight.to(hidden.device, hidden.dtype))
    text, rows = checkpoint.config.text, rows_of(checkpoint, HEAD)
    count = max(1, HEAD_VALUES_AT_ONCE // text.hidden_size)
    pieces = (slice(first, min(first + count, text.vocab_size)) for first in range(0, text.vocab_size, count))
    return torch.cat([hidden @ rows(piece).to(hidden.device).T for piece in pieces], dim=1)


# --- what a linear saw -----------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """One forward of one linear of the file: its part of the stacked product."""

    output: Tensor  # [T, O]
    input: Tensor  # [T, H]
    rounded: Tensor | None  # [T, H]: the input as the product sees it, where it is quantized
    scheme: str
    clipped: float | None
    kurtosis: float | None
    size_bytes: int


@contextmanager
def _recorded(block: nn.Module) -> Iterator[dict[str, _Seen]]:
    """Records every linear of `block` while the context lasts."""
    seen: dict[str, _Seen] = {}
    linears = [layer for layer in block.modules() if isinstance(layer, Linear)]
    for layer in linears:

        def forward(x: Tensor, is_visual: Tensor | None = None, layer: Linear = layer) -> Tensor:
            y, weight = Linear.forward(layer, x, is_visual), layer.weight
            rounded, clipped = _rounded(x, weight, is_visual)
            rows = list(layer.parts.values())
            weights = torch.split(weight.values, rows) if weight.scheme.is_dense else [None] * len(rows)
            for module, output, values in zip(layer.parts, torch.split(y, rows, dim=1), weights, strict=True):
                kurtosis = None if values is None else _kurtosis(values)
                size = weight.size_bytes * output.shape[1] // layer.out_features
                seen[module] = _Seen(output, x, rounded, weight.scheme.name, clipped, kurtosis, size)
            return y

        layer.forward = forward  # type: ignore[method-assign]
    yield seen
    for layer in linears:
        del layer.forward


def _kurtosis(values: Tensor) -> float:
    """values: [O, H]. Some rows at a time: a copy of all would be as large as the block's largest weight."""
    mean, second, fourth = values.float().mean(), 0.0, 0.0
    for rows in torch.split(values, ROWS_AT_ONCE):
        squares = (rows.float() - mean).square_()
        second += float(squares.sum())
        fourth += float(squares.square_().sum())
    return fourth * values.numel() / max(second**2, 1e-60)


def _rounded(x: Tensor, weight: Weight, is_visual: Tensor | None) -> tuple[Tensor | None, float | None]:
    """What the weight's scheme makes of its input, in x's own units, and the share of the values outside the static range."""
    if weight.static is not None:
        scale, zero = (
            getattr(weight.static, name)
            if is_visual is None or weight.visual_static is None
            else torch.where(is_visual[:, None], getattr(weight.visual_static, name), getattr(weight.static, name))
            for name in ("scale", "zero")
        )
        whole = (x / scale + zero).round()
        clipped = float(((whole < -128) | (whole > 127)).float().mean())
        return (whole.clamp_(-128, 127) - zero) * scale, clipped
    if weight.scheme.activation == "none":
        return None, None
    values, row_scale = (quantize_rows_fp8 if weight.scheme.is_float else quantize_rows)(x)
    return values.float() * row_scale[:, None], None


def _quantiles(x: Tensor) -> tuple[float, ...]:
    """Over the channels, of each one's largest magnitude."""
    return tuple(torch.quantile(x.abs().amax(0).float().cpu(), torch.tensor(QUANTILES)).tolist())


# --- distances -------------------------------------------------------------------------------------------------------


def channel_factors(exact: Tensor, other: Tensor) -> Tensor:
    """[O]: the positive factor of each channel that brings `other` [T, O] nearest to `exact`; 1 where none does."""
    factors = (exact * other).sum(0) / other.pow(2).sum(0).clamp_min(1e-30)
    return torch.where(factors > 0, factors, 1.0)


def _stream(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual


def _pair(result: Any) -> tuple[Tensor, Tensor | None]:
    return result if isinstance(result, tuple) else (result, None)


def _sqnr(exact: Tensor, other: Tensor, mask: Tensor) -> float:
    """In dB, over the rows in `mask`."""
    exact, other = _rows(exact, mask), _rows(other, mask)
    return sqnr_db(float(exact.double().pow(2).sum()), float((exact - other).double().pow(2).sum()))


def _cosine(exact: Tensor, other: Tensor, mask: Tensor) -> float:
    exact, other = _rows(exact, mask), _rows(other, mask)
    return float(torch.nn.functional.cosine_similarity(exact, other, dim=-1).mean())


def _rows(rows: Tensor, mask: Tensor) -> Tensor:
    return rows if mask.ndim == 0 else rows[mask.to(rows.device)]


assert Filled == (Linear, Norm, Embedding), "empty() knows every layer that fill() fills"
