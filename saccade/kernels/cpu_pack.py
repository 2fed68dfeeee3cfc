"""4-bit weights of files, and their scales, brought into the kernels' form in C++."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from saccade.kernels.library import Library
from saccade.schemes.affine import MAX_GROUP_SCALE
from saccade.schemes.packing import RUN


def repack(library: Library, words: Tensor) -> Tensor:
    """words: [O, H/8] int32 of 4-bit values plus 8, the first in the lowest bits, H a multiple of 32. Returns `pack` of the values."""
    call = library.functions.saccade_repack
    call.argtypes, call.restype = [c_void_p, c_void_p, c_int64], None
    words = words.contiguous()
    num_rows, num_columns = len(words), 8 * words.shape[1]
    out = torch.empty(num_rows, num_columns // 2, dtype=torch.uint8)
    call(words.data_ptr(), out.data_ptr(), num_rows * num_columns // RUN)
    return out


def split_group_scales(library: Library, product: Tensor) -> tuple[Tensor, Tensor] | None:
    """schemes.affine.split_group_scales. product: [O, H/G], of any float type."""
    call = library.functions.saccade_split_scales
    call.argtypes, call.restype = [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int32], c_int32
    product = product.float().contiguous()
    scale, multiples = torch.empty(len(product)), torch.empty(product.shape, dtype=torch.int8)
    pointers = (product.data_ptr(), scale.data_ptr(), multiples.data_ptr())
    return (scale, multiples) if call(*pointers, *product.shape, MAX_GROUP_SCALE) else None
