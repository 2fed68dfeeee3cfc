"""The basis in which a quantized checkpoint keeps the source's function: what smoothing and rotation did to its tensors.

Norms give up factors of their channels to the linears behind them: the ratio of the gains says which. The residual stream may be
turned by one orthogonal matrix, found from the two embeddings, and the values of each key head by one of their own, found
from the rows of v. Reads tensors by name; judges nothing. Letters: H width, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.checkpoints.formats import EMBEDDING, HEAD, Checkpoint
from saccade.schemes.affine import dequantize

Rows = Callable[[slice], Tensor]  # some rows of a matrix, [rows, H] float32

# By the last part of a linear's name below its block: the norm it follows.
NORM_BEFORE = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
TOWER_NORM_BEFORE = {"attn.qkv": "norm1", "mlp.gate_proj": "norm2", "mlp.up_proj": "norm2"}
ROTATED_ROWS = ("o_proj", "mlp.down_proj")  # of the decoder: they write to the residual stream
SAME_BASIS = 1e-3  # relative distance of two tensors up to which they are taken to be in one basis
DAMAGE = 0.1  # relative distance beyond which no orthogonal map explains what was found
FITTED_ROWS = 4  # per width, of the embedding, that a rotation is found from


def find_rotation(source: Checkpoint, quantized: Checkpoint) -> Tensor | None:
    """[H, H] orthogonal R with E_quantized = E_source R; None where the embeddings are alike as they are.

    The orthogonal map that brings one embedding nearest to the other (Schönemann 1966), from some of its rows.
    """
    num_rows, width = source.info(EMBEDDING).shape
    rows = slice(0, min(num_rows, FITTED_ROWS * width))
    tables = []
    for checkpoint in (source, quantized):
        table = torch.empty(rows.stop, width)
        checkpoint.read_into(EMBEDDING, table, rows)
        tables.append(table)
    ours, theirs = tables
    if float((ours - theirs).norm()) <= SAME_BASIS * float(ours.norm()):
        return None
    rotation = _nearest_rotation(ours, theirs)
    # What no orthogonal map explains is damage, for other checks to name; then the basis is taken to be ours.
    return rotation if float((ours @ rotation - theirs).norm()) < DAMAGE * float(ours.norm()) else None


def _nearest_rotation(ours: Tensor, theirs: Tensor) -> Tensor:
    """The orthogonal R that brings ours R nearest to theirs; over the last two dimensions, [..., rows, D]."""
    left, _, right = torch.linalg.svd(ours.transpose(-1, -2) @ theirs)
    nearest: Tensor = left @ right
    return nearest


def value_rotations(source: Checkpoint, quantized: Checkpoint, attention: str, rotation: Tensor) -> Tensor:
    """[K, D, D]: the values of each key head of `attention` ("model.layers.0.self_attn") are turned by it."""
    text = source.config.text
    module = f"{attention}.v_proj"
    expected = _in_stream_basis(source, quantized, module, rotation)(slice(None))
    weight = quantized.weight(module)
    found = rows_of(quantized, f"{module}.weight")(slice(None)) if weight is None else dequantize(weight)
    heads = (rows.view(text.num_kv_heads, text.head_dim, -1).transpose(1, 2) for rows in (expected, found))
    return _nearest_rotation(*heads)


def turned(rows: Tensor, heads: Tensor) -> Tensor:
    """rows: [T, N D] float32; heads: [N, D, D]. Each head's part of a row times its matrix."""
    return torch.einsum("tnd,nde->tne", rows.view(len(rows), *heads.shape[:2]), heads).flatten(1)


def expected_rows(source: Checkpoint, quantized: Checkpoint, module: str, rotation: Tensor | None) -> tuple[Rows, bool]:
    """The source's weight in the quantized checkpoint's basis as norms and rotation give it, and whether that changes it.

    Of a weight W behind a norm of gain g, where the other checkpoint has g': W diag(g) R diag(1 / g').
    """
    own = rows_of(source, f"{module}.weight")
    columns, is_smoothed = norm_ratio(source, quantized, module)
    if rotation is None or not (module.startswith("model.") or module in ("lm_head", "visual.merger.mlp.2")):
        return (own if columns is None else lambda rows: own(rows) * columns), is_smoothed
    if module == EMBEDDING.removesuffix(".weight"):
        return lambda rows: own(rows) @ rotation, True
    if module.endswith("v_proj"):
        whole = _in_stream_basis(source, quantized, module, rotation)(slice(None))
        heads = value_rotations(source, quantized, module.removesuffix(".v_proj"), rotation)
        whole = turned(whole.T, heads).T
        return lambda rows: whole[rows], True
    if module.endswith("o_proj"):
        heads = value_rotations(source, quantized, module.removesuffix(".o_proj"), rotation)
        text = source.config.text
        whole = rotation.T @ turned(own(slice(None)), heads.repeat_interleave(text.num_heads // text.num_kv_heads, 0))
        return lambda rows: whole[rows], True
    if module.endswith((*ROTATED_ROWS, "merger.mlp.2")):
        return lambda rows: rotation[:, rows].T @ own(slice(None)), True
    return (own, False) if columns is None else (_in_stream_basis(source, quantized, module, rotation), True)


def _in_stream_basis(source: Checkpoint, quantized: Checkpoint, module: str, rotation: Tensor) -> Rows:
    """The weight of a linear behind a norm of the decoder: the source's gain, the rotation, then what the other gain takes."""
    own = rows_of(source, f"{module}.weight")
    before, after = (_gain(checkpoint, module) for checkpoint in (source, quantized))
    return lambda rows: (own(rows) * before) @ rotation / after


def norm_ratio(source: Checkpoint, quantized: Checkpoint, module: str) -> tuple[Tensor | None, bool]:
    """[H] float32: the factor of each input channel that the norm before gave up, None where no norm is; whether any is not 1."""
    if norm_before(module) is None:
        return None, False
    before, after = (_gain(checkpoint, module) for checkpoint in (source, quantized))
    ratio = torch.where(after == 0, 1.0, before / after)
    return ratio, not torch.equal(before, after)


def norm_before(module: str) -> str | None:
    """The norm whose output is the linear's input."""
    if module == "lm_head":
        return "model.norm"
    if module == "visual.merger.mlp.0":
        return "visual.merger.ln_q"
    block, name = ".".join(module.split(".")[:3]), ".".join(module.split(".")[3:])
    norm = (TOWER_NORM_BEFORE if module.startswith("visual.") else NORM_BEFORE).get(name)
    return norm and f"{block}.{norm}"


def _gain(checkpoint: Checkpoint, module: str) -> Tensor:
    """[H] of the norm before `module`; the merger's is repeated for the patches of a unit."""
    norm = norm_before(module)
    gain = checkpoint.tensor(f"{norm}.weight").float()
    return gain.repeat(checkpoint.config.vision.merge_unit) if norm == "visual.merger.ln_q" else gain


def rows_of(checkpoint: Checkpoint, name: str) -> Rows:
    """A tensor by rows; a tied head is the embedding."""
    if name == HEAD and HEAD not in checkpoint:
        name = EMBEDDING
    shape = checkpoint.info(name).shape

    def read(rows: slice) -> Tensor:
        first, last, _ = rows.indices(shape[0])
        out = torch.empty(last - first, *shape[1:])
        checkpoint.read_into(name, out, slice(first, last))
        return out.flatten(1)

    return read
