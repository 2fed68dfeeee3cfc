"""Tiny random checkpoints, and transformers as the oracle over them.

Positions are given to transformers explicitly: newer versions changed the rule for videos (the one used in training is ours).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.utils import logging as transformers_logging

from saccade.inputs.pixels import patches
from saccade.inputs.prompt import Prompt

transformers_logging.set_verbosity_error()
TOKENIZER = Path(__file__).parent.parent / "data" / "tokenizer"
SPECIAL = {
    "bos": 397,
    "eos": 399,
    "vision_start": 406,
    "vision_end": 407,
    "image": 409,
    "video": 410,
}  # of that tokenizer


@dataclass(frozen=True)
class Shape:
    """What varies between tiny models. Head size is hidden / heads; mrope_section sums to half of it."""

    name: str
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 64
    intermediate: int = 96
    layers: int = 2
    mrope: tuple[int, int, int] = (2, 3, 3)
    tied: bool = False
    eps: float = 1e-6
    theta: float = 1e6
    vision_hidden: int = 32
    vision_heads: int = 2
    vision_intermediate: int = 52
    depth: int = 3
    window: int = 112
    full: tuple[int, ...] = (1,)
    tokens_per_second: int = 2
    layout: str = "hub"
    generation: dict[str, Any] = field(default_factory=dict)


SHAPES = [
    Shape("plain"),
    Shape("tied", tied=True),
    Shape("one key head", heads=4, kv_heads=1),
    Shape("as many key heads", heads=4, kv_heads=4),
    Shape("seven to one", heads=7, kv_heads=1, hidden=112),
    Shape("small windows", window=56, depth=4, full=(3,)),
    Shape("large windows", window=224, full=(0, 2)),
    Shape("all full", full=(0, 1, 2)),
    Shape("no full", full=()),
    Shape("odd vision sizes", vision_hidden=48, vision_heads=3, vision_intermediate=37, tokens_per_second=4),
    Shape("uneven sections", mrope=(1, 2, 5), theta=1e4, eps=1e-5),
    Shape("deep", layers=5, depth=5, full=(2, 4)),
    Shape("nested layout", layout="nested"),
    Shape("nested and tied", layout="nested", tied=True, heads=6, kv_heads=3, hidden=96),
    Shape("penalised", generation={"do_sample": True, "repetition_penalty": 1.2, "temperature": 1e-6}),
]


def build(
    folder: Path, shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Qwen2_5_VLForConditionalGeneration:
    """A random model written to `folder` as a checkpoint, and transformers' own copy of it in memory."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": shape.theta, "mrope_section": list(shape.mrope)}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "intermediate_size": shape.intermediate,
            "rms_norm_eps": shape.eps,
            "rope_parameters": rope,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": shape.tied,
            "bos_token_id": SPECIAL["bos"],
            "eos_token_id": SPECIAL["eos"],
        },
        vision_config={
            "depth": shape.depth,
            "hidden_size": shape.vision_hidden,
            "num_heads": shape.vision_heads,
            "intermediate_size": shape.vision_intermediate,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": list(shape.full),
            "window_size": shape.window,
            "tokens_per_second": shape.tokens_per_second,
        },
        image_token_id=SPECIAL["image"],
        video_token_id=SPECIAL["video"],
        vision_start_token_id=SPECIAL["vision_start"],
        vision_end_token_id=SPECIAL["vision_end"],
        tie_word_embeddings=shape.tied,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(
                    0, 0.6 if "embed_tokens" in name or "lm_head" in name else 0.7 * parameter[0].numel() ** -0.5
                )
            else:
                parameter.normal_(1.0 if "norm" in name or "ln_q" in name else 0.0, 0.2)
    model.tie_weights()
    model = model.to(dtype)
    _save(folder, model, shape)
    return model


def _save(folder: Path, model: Qwen2_5_VLForConditionalGeneration, shape: Shape) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if shape.tied and name == "lm_head.weight":
            continue
        if shape.layout == "hub":
            name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    if shape.layout == "hub":  # the published flat style
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        vision = config["vision_config"]
        config = {
            **text,
            **config,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        }
        config["vision_config"] = vision
    config |= {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "torch_dtype": str(model.dtype)[6:],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 12_845_056}))
    generation = {"eos_token_id": [SPECIAL["eos"], SPECIAL["bos"]], "pad_token_id": SPECIAL["bos"], **shape.generation}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder / file.name)


class Oracle:
    """transformers, given the same ids, pixel rows and positions."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        self.model = model

    @torch.no_grad()
    def features(self, prompt: Prompt, config: Any) -> Tensor:
        """Vision features [tokens, H] of all media in order of appearance."""
        rows = torch.cat([patches(medium.frames, config) for medium in prompt.media])
        out = self.model.model.visual(rows.to(self.model.dtype), grid_thw=_grids(prompt, ("image", "video")))
        return out.pooler_output  # type: ignore[no-any-return]

    @torch.no_grad()
    def forward(self, prompt: Prompt, config: Any, **more: Any) -> Any:
        ids = torch.tensor([prompt.token_ids])
        inputs: dict[str, Any] = {}
        for kind, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            rows = [patches(m.frames, config) for m in prompt.media if m.receipt.kind == kind]
            if rows:
                inputs |= {pixels: torch.cat(rows).to(self.model.dtype), grid: _grids(prompt, (kind,))}
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        positions = prompt.positions[:, None]
        return self.model(input_ids=ids, position_ids=positions, mm_token_type_ids=kinds, **inputs, **more)

    def logits(self, prompt: Prompt, config: Any) -> Tensor:
        """[T, V] of every prompt token."""
        return self.forward(prompt, config).logits[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def greedy(
        self, prompt: Prompt, config: Any, count: int, penalty: float = 1.0, stop: tuple[int, ...] = ()
    ) -> list[int]:
        """A plain loop: argmax of penalised last logits, one token at a time over transformers' cache."""
        out = self.forward(prompt, config, use_cache=True)
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        ids = torch.tensor([prompt.token_ids])
        answer: list[int] = []
        while True:
            scores = processor(ids, out.logits[:, -1].float()) if penalty != 1.0 else out.logits[:, -1].float()
            token = int(scores.argmax())
            answer.append(token)
            if len(answer) == count or token in stop:
                return answer
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            position = torch.full((3, 1, 1), prompt.next_position + len(answer) - 1)
            out = self.model(
                input_ids=ids[:, -1:],
                position_ids=position,
                past_key_values=out.past_key_values,
                use_cache=True,
                mm_token_type_ids=torch.zeros(1, 1, dtype=torch.int32),
            )


def _grids(prompt: Prompt, kinds: tuple[str, ...]) -> Tensor:
    grids = [medium.receipt.grid for medium in prompt.media if medium.receipt.kind in kinds]
    return torch.tensor([[grid.t, grid.h, grid.w] for grid in grids])


def load(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """A checkpoint in transformers, in float32."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-any-return]
