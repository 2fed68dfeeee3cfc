"""A quantized checkpoint's weights against the source's, tensor by tensor, row by row.

Smoothing and rotation change weights and not the function. What they may do is known, and undone before comparing:
- a factor of each input channel, which the norm before carries: it is the ratio of the two norms' gains;
- an orthogonal map of the residual stream, and of each head's values (`basis.py`);
- a positive factor of each channel between v and o, up and down, and q and k: it stands nowhere and is fitted, where the
  weights do not fit as they are.
What fits in none of these ways is damaged, or was changed in a way unknown here. Reads some rows at a time.
Letters: O outputs, H inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from saccade.base.meter import progress
from saccade.checkpoints.formats import EMBEDDING, HEAD, Checkpoint, expected_tensors
from saccade.checkpoints.shards import TensorInfo
from saccade.quantize.report import EXACT_DB, sqnr_db
from saccade.schemes.affine import dequantize
from saccade.schemes.scheme import DENSE, Scheme, Weight
from saccade.verify.basis import Rows, expected_rows, rows_of, turned, value_rotations

Basis = Literal["source", "smoothed", "rescaled", "unknown"]
BiasState = Literal["same", "changed", "lost", "unknown"]

# Which channels of a linear may carry a factor that another linear undoes.
FREE_ROWS = ("q_proj", "k_proj", "v_proj", "up_proj", "attn.qkv")
FREE_COLUMNS = ("o_proj", "attn.proj", "down_proj")

# How far an honest row may lie from the source's, by bits: the factor between them, and its SQNR. Rounding to nearest moves the
# factor of an 8-bit row by less than 1 % and that of a 4-bit row, some of which is clipped, by less than 10 %. A row whose
# largest weight holds all its energy has 193,548 / H in power, 8.2 dB for the widest layer published (29,568 columns).
GAIN_TOLERANCE = {16: 0.02, 8: 0.03, 4: 0.2}
ROW_FLOOR_DB = {16: 25.0, 8: 8.0, 4: 1.5}
# Below, a tensor is poor. Gaussian rows have 41.6 dB in int8, 31.6 in e4m3, 19.1 in int4 by groups of 128; smoothing, which moves
# the activations' outliers into the weights, costs the difference.
TENSOR_FLOOR_DB = {16: 40.0, 8: 30.0, 4: 12.0}
RESCALED_DB = 15.0  # less for weights that took factors of whole columns: few of them then hold most of the energy
BIAS_TOLERANCE = 0.01  # of its norm: bfloat16 rounds by 0.4 %
MANY = 0.1  # share of bad rows beyond which the whole basis is in doubt, not the rows
VALUES_AT_ONCE = 1 << 18  # of a matrix, some rows of which are compared: what stays in a core's cache with its products


@dataclass(frozen=True)
class WeightMeasure:
    """One tensor. `nearest`: share of the integers that are those of rounding to nearest; None for other number formats."""

    module: str
    scheme: Scheme
    basis: Basis
    db: float
    nearest: float | None = None
    bad_rows: tuple[int, ...] = ()
    gain: float = 1.0  # of the worst row
    bias: BiasState = "unknown"

    @property
    def floor_db(self) -> float:
        floor = TENSOR_FLOOR_DB[self.scheme.weight_bits]
        return floor - RESCALED_DB if self.basis == "rescaled" else floor


def compare_weights(source: Checkpoint, quantized: Checkpoint, rotation: Tensor | None) -> Iterator[WeightMeasure]:
    """Every matrix of the quantized model, and the patch embedding."""
    names = [name for name, shape in expected_tensors(quantized.config).items() if len(shape) > 1]
    with progress(len(names), "comparing weights") as advance:
        for name in names:
            yield compare_weight(source, quantized, name.removesuffix(".weight"), rotation)
            advance(1)


def compare_weight(source: Checkpoint, quantized: Checkpoint, module: str, rotation: Tensor | None) -> WeightMeasure:
    measure = _compare_matrix(source, quantized, module, rotation)
    return replace(measure, bias=_compare_bias(source, quantized, module, rotation, measure.basis))


def _compare_bias(
    source: Checkpoint, quantized: Checkpoint, module: str, rotation: Tensor | None, basis: Basis
) -> BiasState:
    """Not where the rows of the weight have factors of their own."""
    name = f"{module}.bias"
    if name not in source:
        return "same"
    before = source.tensor(name).float()
    after = quantized.tensor(name).float() if name in quantized else torch.zeros_like(before)
    if bool(before.any()) and not bool(after.any()):
        return "lost"
    if basis in ("rescaled", "unknown"):
        return "unknown"
    if rotation is not None and module == "visual.merger.mlp.2":
        before = before @ rotation
    if rotation is not None and module.endswith("self_attn.v_proj"):
        heads = value_rotations(source, quantized, module.removesuffix(".v_proj"), rotation)
        before = turned(before[None], heads)[0]
    # A factor of a few rows may have passed as rounding of the weight; the bias has it too.
    tolerance = BIAS_TOLERANCE + (
        GAIN_TOLERANCE[quantized.scheme(module).weight_bits] if module.endswith(FREE_ROWS) else 0
    )
    return "same" if float((after - before).norm()) <= tolerance * float(before.norm()) else "changed"


def _compare_matrix(source: Checkpoint, quantized: Checkpoint, module: str, rotation: Tensor | None) -> WeightMeasure:
    weight = quantized.weight(module)
    fit = fit_basis(source, quantized, module, rotation)
    nearest = None
    if (
        weight is not None
        and not weight.scheme.is_float
        and fit.basis in ("source", "smoothed")
        and fit.rows is not None
    ):
        nearest = _nearest(fit.rows, weight, torch.finfo(_source_info(source, module).dtype).eps)
    return fit.sums.measure(module, DENSE if weight is None else weight.scheme, fit.basis, nearest)


def _source_info(source: Checkpoint, module: str) -> TensorInfo:
    """Of the module's weight; a tied head is the embedding."""
    name = f"{module}.weight"
    return source.info(EMBEDDING if name == HEAD and name not in source else name)


@dataclass(frozen=True)
class Fit:
    """A weight of the source in the quantized checkpoint's basis: its rows, None where that basis is not found."""

    sums: _Sums
    basis: Basis
    rows: Rows | None


def fit_basis(source: Checkpoint, quantized: Checkpoint, module: str, rotation: Tensor | None) -> Fit:
    """First as norms and rotation say, then with factors of rows or columns where the model leaves them free."""
    plain, expected, rows = _as_expected(source, quantized, module, rotation)
    is_smoothed = expected_rows(source, quantized, module, rotation)[1]
    if module.endswith(FREE_COLUMNS) and bool(plain.is_bad.any()):
        factors = plain.column_factors()
        scaled: Rows = lambda chosen: expected(chosen) * factors  # noqa: E731
        sums = _compare(scaled, rows, len(plain.ee), len(plain.column_ee), plain.scheme)
        if plain.share_bad <= min(MANY, sums.share_bad):  # damaged rows bend the factors of all columns
            return Fit(plain, "smoothed" if is_smoothed else "source", expected)
    elif module.endswith(FREE_ROWS) and bool(plain.is_bad.any()):
        factors = plain.row_factors()[:, None]
        scaled = lambda chosen: expected(chosen) / factors[chosen]  # noqa: E731
        sums = replace(plain.with_free_rows(), is_undone=_is_undone(source, quantized, module, rotation, plain))
    else:
        is_unknown = rotation is not None and plain.share_bad > MANY
        basis: Basis = "unknown" if is_unknown else "smoothed" if is_smoothed else "source"
        return Fit(plain, basis, None if is_unknown else expected)
    return Fit(sums, "rescaled", scaled) if sums.share_bad <= MANY else Fit(sums, "unknown", None)


def _as_expected(
    source: Checkpoint, quantized: Checkpoint, module: str, rotation: Tensor | None
) -> tuple[_Sums, Rows, Rows]:
    """How near the weight is with no factor fitted, the rows expected, and those found."""
    weight = quantized.weight(module)
    rows = rows_of(quantized, f"{module}.weight") if weight is None else _dequantized(weight)
    expected, _ = expected_rows(source, quantized, module, rotation)
    num_rows, *row = _source_info(source, module).shape
    scheme = DENSE if weight is None else weight.scheme
    return _compare(expected, rows, num_rows, math.prod(row), scheme), expected, rows


def _is_undone(source: Checkpoint, quantized: Checkpoint, module: str, rotation: Tensor | None, plain: _Sums) -> Tensor:
    """[O] bool: whether each row has no factor, or one that the linear that may undo it does undo, as well as can be measured."""
    text = source.config.text
    block, _, name = module.rpartition(".")
    heads = (text.num_kv_heads, text.num_heads // text.num_kv_heads, text.head_dim)

    def sums(other: str) -> _Sums:
        return _as_expected(source, quantized, f"{block}.{other}", rotation)[0]

    if name == "up_proj":
        other = sums("down_proj").column_factors().double()
    elif name == "v_proj":
        other = sums("o_proj").column_factors().double().view(heads).mean(1).flatten()
    elif name == "k_proj":
        other = sums("q_proj").gain.view(heads).mean(1).flatten()
    elif name == "q_proj":
        other = sums("k_proj").gain.view(heads[0], 1, heads[2]).expand(heads).flatten()
    else:  # the tower's q, k and v are one
        q, k, _ = plain.gain.chunk(3)
        other = torch.cat([k, q, sums("proj").column_factors().double()])
    tolerance = GAIN_TOLERANCE[plain.scheme.weight_bits]
    return ((plain.gain * other - 1).abs() <= 2 * tolerance) | ((plain.gain - 1).abs() <= tolerance)


def _dequantized(weight: Weight) -> Rows:
    return lambda rows: dequantize(weight, rows)


# --- how near it is --------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Sums over rows and columns of the expected weight e and the one found, d; float64, of sums of pieces in float32."""

    scheme: Scheme
    ee: Tensor  # [O]
    ed: Tensor  # [O]
    dd: Tensor  # [O]
    error: Tensor  # [O]
    column_ee: Tensor  # [H]
    column_ed: Tensor  # [H]
    is_undone: Tensor | None = None  # [O] bool: of rows with a factor of their own, whether another linear undoes it

    @property
    def gain(self) -> Tensor:
        """[O]: 1 for rows of zeros."""
        return torch.where(self.ee > 0, self.ed / self.ee.clamp_min(1e-300), (self.dd > 0).double() + 1)

    @property
    def is_bad(self) -> Tensor:
        bits = self.scheme.weight_bits
        limit = self.ee * 10 ** (-ROW_FLOOR_DB[bits] / 10)
        is_bad = ((self.gain - 1).abs() > GAIN_TOLERANCE[bits]) | (self.error > limit)
        return is_bad if self.is_undone is None else is_bad | ~self.is_undone

    @property
    def share_bad(self) -> float:
        return float(self.is_bad.double().mean())

    def with_free_rows(self) -> _Sums:
        """As if each row of d were first multiplied by the positive number that brings it nearest to e."""
        factor = self.row_factors().double()
        ed, dd = self.ed * factor, self.dd * factor**2
        # By rows only an error of direction is left, and what rounding adds to the length of d: the gain says nothing.
        error = (self.ee - 2 * ed + dd).clamp_min(0)
        return _Sums(
            self.scheme, self.ee, torch.where(self.ed > 0, self.ee, ed), dd, error, self.column_ee, self.column_ed
        )

    def row_factors(self) -> Tensor:
        """[O] float32: the positive factor of each row of d that brings it nearest to e."""
        return torch.where(self.ed > 0, self.ed / self.dd.clamp_min(1e-300), 1.0).float()

    def column_factors(self) -> Tensor:
        """[H] float32: the positive factor of each column of e that brings it nearest to d."""
        factors = self.column_ed / self.column_ee.clamp_min(1e-300)
        return torch.where(factors > 0, factors, 1.0).float()

    def measure(self, module: str, scheme: Scheme, basis: Basis, nearest: float | None) -> WeightMeasure:
        bad = self.is_bad.nonzero().flatten().tolist()
        worst = float(self.gain[(self.gain - 1).abs().argmax()])
        db = sqnr_db(float(self.ee.sum()), float(self.error.sum()))
        return WeightMeasure(module, scheme, basis, db, nearest, tuple(bad), worst)


def _compare(expected: Rows, found: Rows, num_rows: int, width: int, scheme: Scheme) -> _Sums:
    rows, columns = [], []
    for chosen in _pieces(num_rows, width):
        e, d = expected(chosen), found(chosen)
        difference = e - d
        products = [e * e, e * d, d * d, difference * difference]
        # In float32, by halves: summing floats in float64 takes several times as long.
        rows.append(torch.stack([product.sum(1) for product in products]))
        columns.append(torch.stack([product.sum(0) for product in products[:2]]))
    return _Sums(scheme, *torch.cat(rows, dim=1).double(), *torch.stack(columns).double().sum(0))


def _pieces(num_rows: int, width: int) -> Iterator[slice]:
    """All rows, some at a time."""
    count = max(1, VALUES_AT_ONCE // width)
    for first in range(0, num_rows, count):
        yield slice(first, min(first + count, num_rows))


def _nearest(expected: Rows, weight: Weight, eps: float) -> float:
    """Share of the integers that lie within half a step of the expected weight, or as much further as rounding moves that."""
    assert weight.scale is not None, "a quantized weight has scales"
    count = 0
    for rows in _pieces(weight.out_features, weight.in_features):
        step = weight.scale[rows].view(-1, weight.scale[rows].numel() // len(weight.scale[rows]), 1)
        if weight.group_scale is not None:
            step = step * weight.group_scale[rows][:, :, None]
        d = dequantize(weight, rows)
        d, e = (rows_of.view(len(d), step.shape[1], -1) / step for rows_of in (d, expected(rows)))
        count += int(((e - d).abs() <= 0.5 + eps * d.abs()).sum())
    return count / (weight.out_features * weight.in_features)


assert max(TENSOR_FLOOR_DB.values()) < EXACT_DB, "equal tensors pass"
