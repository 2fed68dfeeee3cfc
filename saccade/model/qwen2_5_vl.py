"""Qwen2.5-VL: the tower, the decoder, and their meeting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor, nn

from saccade.base.ranks import ALONE, Ranks
from saccade.checkpoints.config import ModelConfig
from saccade.geometry import Grid
from saccade.kernels.record import Kernels
from saccade.model.language import Attend, DecoderLayer, LanguageModel
from saccade.model.layers import Filling, Linear, fill
from saccade.model.sharding import cut_heads, cut_width, length
from saccade.model.vision import VisionBlock, VisionTower
from saccade.schemes.affine import quantize_weight
from saccade.schemes.loading import Loading
from saccade.schemes.scheme import fitting

# The tower's inner width, 3,420, is no multiple of what a card reads at once: rows of 16 bits would begin in the midst of a vector.
PADDED_ON, PADDED_TO = ("cuda",), 128
BLOCKS_AT_ONCE = 4  # that are read, and put into the kernels' form: as many lie in memory twice for a moment


class Qwen2_5_VL(nn.Module):
    """Built without storage from a config; `load` fills it block by block. Of several ranks, each holds its share."""

    def __init__(self, config: ModelConfig, kernels: Kernels, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.ranks = ranks
        self.visual = VisionTower(config.vision, kernels, ranks)
        self.language = LanguageModel(config.text, kernels, ranks)
        head = {"lm_head": config.text.vocab_size}
        everyone = [Ranks(rank, ranks.size) for rank in range(ranks.size)]
        words = [cut_width(config.text.vocab_size, each, "words of the vocabulary") for each in everyone]
        self.head_widths = [length(each) for each in words]
        self.lm_head = Linear(
            kernels, config.text.hidden_size, head, bias=False, quantizable=False, ranks=ranks, rows=[words[ranks.rank]]
        )

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Every part with weights of its own, in the order data flows through them."""
        yield from self.visual.blocks()
        yield from self.language.blocks()
        if not self.config.text.tie_word_embeddings:
            yield "lm_head", self.lm_head

    def load(self, filling: Filling) -> Iterator[str]:
        """Fills the blocks, yielding their names in order; a tied head shares the embedding's numbers, if it is not quantized.

        A few at once where numbers are taken as they are; one where they are quantized, which torch's threads share already.
        """
        before = torch.get_num_threads()
        count = min(before, BLOCKS_AT_ONCE) if filling.loading.is_dense else 1

        def filled(name: str, block: nn.Module) -> None:
            torch.set_num_threads(before // count)  # of this thread
            fill(block, filling if self.stays(name, filling.loading) else replace(filling, in_place=None))
            if filling.folds_keys and isinstance(block, DecoderLayer):
                block.fold_keys()
            if filling.device.type in PADDED_ON and isinstance(block, VisionBlock):
                block.mlp.pad(PADDED_TO)

        try:
            with ThreadPoolExecutor(count) as pool:
                blocks = dict(self.blocks())
                for name, _ in zip(blocks, pool.map(filled, blocks, blocks.values()), strict=True):
                    yield name
        finally:
            torch.set_num_threads(before)  # what threads to come begin with
        if self.config.text.tie_word_embeddings:
            whole = self.language.embed_tokens.weight
            self.lm_head.weight = whole if self.ranks.is_alone else self.lm_head.share_of(whole)
        if not filling.loading.head.is_dense:
            scheme = fitting(filling.loading.head, self.config.text.hidden_size)
            self.lm_head.weight = quantize_weight(self.lm_head.weight, scheme)

    def stays(self, name: str, loading: Loading) -> bool:
        """Whether a block is used as it lies in its file: what is quantized is read and forgotten. A head goes with the decoder, for
        what every token reads may lie better in memory of its own; an embedding that is none is read by the row."""
        is_head = name == "lm_head" or self.config.text.tie_word_embeddings
        if name == "model.embed_tokens" and not (is_head and loading.head.is_dense):
            return True
        return loading.of(name).is_dense and (loading.decoder.is_dense or name.startswith("visual."))

    @property
    def num_kv_heads(self) -> int:
        """Of this rank."""
        return cut_heads(self.config.text.num_heads, self.config.text.num_kv_heads, self.ranks).num_kv

    @property
    def dtype(self) -> torch.dtype:
        return self.language.embed_tokens.weight.values.dtype

    @property
    def device(self) -> torch.device:
        return self.language.embed_tokens.weight.values.device

    def encode(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """patches: [P, patch_values] float32, normalised. Returns [tokens, H]: what stands in for the placeholders."""
        return self.visual(patches.to(device=self.device, dtype=self.dtype), grids)  # type: ignore[no-any-return]

    def embed(
        self, token_ids: Tensor, media_rows: Tensor | None = None, media_features: Tensor | None = None
    ) -> Tensor:
        """token_ids: [T]; rows `media_rows` [M] are replaced by `media_features` [M, H]. Returns [T, H]."""
        x: Tensor = self.language.embed_tokens(token_ids)
        if media_rows is None or media_features is None:
            return x
        return x.index_copy(0, media_rows, media_features.to(x.dtype))

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, media_rows: Tensor | None = None) -> Tensor:
        """x: [T, H] from `embed`, with the same media_rows; positions: [3, T]. Returns the normed last hidden rows [T, H], for
        `head`."""
        is_visual = None
        if media_rows is not None:
            is_visual = torch.zeros(len(x), dtype=torch.bool, device=x.device).index_fill_(0, media_rows, True)
        hidden: Tensor = self.language(x, positions, attend, is_visual)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """hidden: [R, H], only the rows whose logits are wanted. Returns logits [R, vocab] in the model's type."""
        return self.ranks.join(self.lm_head(hidden), self.head_widths)
