"""The float pass against the transformers that is installed: equal bit for bit to 4.49, whose arithmetic it is, close to others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from saccade.checkpoints.formats import open_checkpoint
from saccade.inputs.chat import ChatTokenizer
from saccade.inputs.pixels import patches
from saccade.quantize.calibration import load_sample
from saccade.quantize.forward import Block, float_linears, rms_norm
from saccade.quantize.pipeline import Stream
from tests.parity.oracle import SHAPES, Shape, build
from tests.parity.test_transformers import picture


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_sample_leaves_the_last_layer_as_from_transformers(tmp_path: Path, shape: Shape) -> None:
    model = build(tmp_path / "model", shape, seed=3)
    picture(150, 90, 1).save(tmp_path / "photo.png")
    checkpoint = open_checkpoint(tmp_path / "model")
    config = checkpoint.config
    sample = load_sample(tmp_path / "photo.png", ChatTokenizer(checkpoint.folder, config), config)

    def read(prefix: str) -> Block:
        names = [name for name in checkpoint.names() if name.startswith(f"{prefix}.")]
        return {name.removeprefix(f"{prefix}."): checkpoint.tensor(name) for name in names}

    with torch.no_grad():
        stream = Stream(config, [sample])
        stream.embed_patches(read("visual.patch_embed"))
        towers = [f"visual.blocks.{index}" for index in range(config.vision.depth)]
        for prefix in towers:
            block = read(prefix)
            stream.pass_block(prefix, block, float_linears(block))
        stream.merge(read("visual.merger"))
        stream.embed_tokens(checkpoint.tensor("model.embed_tokens.weight"))
        for index in range(config.text.num_layers):
            block = read(f"model.layers.{index}")
            stream.pass_block(f"model.layers.{index}", block, float_linears(block))
        found = rms_norm(stream.rows[0], checkpoint.tensor("model.norm.weight"), config.text.rms_norm_eps)

        expected = model.model(
            input_ids=sample.token_ids[None],
            position_ids=sample.positions[:, None],
            pixel_values=patches(sample.frames, config),
            image_grid_thw=torch.tensor([[grid.t, grid.h, grid.w] for grid in sample.grids]),
        ).last_hidden_state[0]
    if transformers.__version__ == "4.49.0":
        assert torch.equal(found, expected)
    assert torch.allclose(found, expected, atol=2e-4, rtol=1e-4)
