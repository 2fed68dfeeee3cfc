"""What exact mode is asked for: the options of msModelSlim's Qwen2.5-VL script, and which of them go together (section 2).

Knows options and the model's sizes; knows no tensors. Everything that can be refused is refused here, before anything long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from saccade.base.errors import OptionError
from saccade.base.options import check_values, option
from saccade.checkpoints.config import ModelConfig

GROUP_SIZES = (32, 64, 128, 256)
PARSED_GROUP_SIZES = (*GROUP_SIZES, 512)  # 512 passes the reference's parser and, for 4 bits, nothing behind it
SCALE_BIAS_PARTS = 16  # column blocks of o_proj's scale_bias


@dataclass(frozen=True)
class ExactRecipe:
    """Defaults are the reference's. Raises OptionError for a combination it would fail on, or one not reproduced here."""

    w_bit: int = option(8, "bits of a weight: 8 or 4")
    a_bit: int = option(8, "bits of an activation: 8")
    anti_method: Literal["m2", "m4"] = option("m2", "outlier suppression: m2 (range search) or m4 (iterative smooth)")
    act_method: int = option(2, "static ranges: 1 min-max, 2 histogram, 3 automatic")
    open_outlier: bool = option(True, "must be False for 4 bits")
    is_dynamic: bool = option(False, "activation scales per token at run time")
    is_lowbit: bool = option(False, "the low-bit quantizer: needed for 4 bits; for 8 it keeps scales in float32")
    group_size: int = option(64, "columns that share a 4-bit scale")
    mindie_format: bool = option(False, "write MindIE's layout instead of vLLM Ascend's")
    part_file_size: int | None = option(None, "GiB of a shard; one file by default", low=1)
    device_type: Literal["cpu", "npu"] = option("cpu", "cpu; npu is accepted and computed on the CPU, too")
    trust_remote_code: bool = option(False, "accepted; no remote code is ever run")

    def __post_init__(self) -> None:
        check_values(self)
        if self.w_bit not in (4, 8):
            raise OptionError(f"w_bit is {self.w_bit}; use 8 or 4")
        if self.a_bit != 8:
            raise OptionError(f"a_bit is {self.a_bit}; only 8 is supported")
        if self.act_method not in (1, 2, 3):
            raise OptionError(f"act_method is {self.act_method}; use 1 (min-max), 2 (histogram) or 3 (automatic)")
        if self.group_size not in PARSED_GROUP_SIZES:
            raise OptionError(f"group_size is {self.group_size}; use one of {', '.join(map(str, GROUP_SIZES))}")
        if self.act_method == 3 and self.is_lowbit:
            raise OptionError("act_method 3 does not go with is_lowbit True; use 1 or 2")
        if self.w_bit == 4:
            self._check_four_bits()

    def _check_four_bits(self) -> None:
        if not self.is_lowbit:
            raise OptionError("w_bit 4 needs is_lowbit True")
        if not self.is_dynamic:
            kind = "sparse W8A8S weights are not reproduced" if self.open_outlier else "the reference fails on it"
            raise OptionError(f"w_bit 4 with is_dynamic False: {kind}; use is_dynamic True and open_outlier False")
        if self.open_outlier:
            raise OptionError("w_bit 4 with is_dynamic True needs open_outlier False")
        if self.group_size not in GROUP_SIZES:
            raise OptionError(
                f"group_size {self.group_size} is refused for 4-bit weights; use one of {', '.join(map(str, GROUP_SIZES))}"
            )

    @property
    def scheme(self) -> str:
        """The name in the description file; in lower case that of the weight file."""
        if self.w_bit == 4:
            return "W4A8_DYNAMIC"
        return "W8A8_DYNAMIC" if self.is_dynamic else "W8A8"

    @property
    def is_static(self) -> bool:
        return not self.is_dynamic

    def check_model(self, config: ModelConfig) -> None:
        """Raises OptionError when a layer's shape does not suit 4-bit weights: groups, row pairs, scale_bias blocks."""
        if self.w_bit != 4:
            return
        text, vision = config.text, config.vision
        widths = {
            "visual.blocks.*.attn.qkv": vision.hidden_size,
            "model.layers.*.self_attn.q_proj": text.hidden_size,
            "model.layers.*.self_attn.o_proj": text.num_heads * text.head_dim,
        }
        for name, width in widths.items():
            if width % self.group_size:
                fits = [size for size in GROUP_SIZES if width % size == 0]
                advice = f"use {', '.join(map(str, fits))}" if fits else "use w_bit 8"
                raise OptionError(
                    f"group_size {self.group_size} does not divide the {width} columns of {name}; {advice}"
                )
        heights = {
            "visual.blocks.*.mlp.gate_proj": vision.intermediate_size,
            "model.layers.*.mlp.gate_proj": text.intermediate_size,
        }
        for name, height in heights.items():
            if height % 2 and not self.mindie_format:
                raise OptionError(f"{name} has {height} rows; int4 packing pairs rows, use w_bit 8 or mindie_format")

    def mindie_config(self) -> dict[str, Any]:
        """`quantization_config` of a MindIE config.json (section 8.1): the options as given, in the reference's order."""
        return {
            "group_size": self.group_size,
            "act_method": self.act_method,
            "anti_method": self.anti_method,
            "is_lowbit": self.is_lowbit,
            "mm_tensor": False,
            "w_sym": True,
            "open_outlier": self.open_outlier,
            "is_dynamic": self.is_dynamic,
            "w_bit": self.w_bit,
            "a_bit": self.a_bit,
            "dev_type": self.device_type,
        }
