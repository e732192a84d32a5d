"""The decoder over tokens of many requests at once, for the engine: no padding, keys and values kept in blocks.

Shapes: T tokens of this pass, of all requests one after the other; C width, H heads, D width per head, V rows of the
head, n rows of a step.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from qwen_vl.engine.attention import join, partial_attention
from qwen_vl.engine.cache import Block
from qwen_vl.engine.image_cache import image_key
from qwen_vl.engine.scheduler import Group, Row
from qwen_vl.language import Attend, logn_factors, rotary_frequencies, rotary_tables, segment_attention
from qwen_vl.loss import LanguageHead
from qwen_vl.modeling import QwenVLForCausalLM
from qwen_vl.vision import QUERIES


class BatchForward:
    """Runs a model's decoder over prefixes, suffixes and single steps.

    Args:
        model: In eval mode.
    """

    def __init__(self, model: QwenVLForCausalLM) -> None:
        self.model = model
        self.config = model.config
        self._known: dict[float, torch.Tensor] = {}
        self._logits_buffer: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def prefixes(self, groups: Sequence[Group]) -> torch.Tensor | None:
        """Fills the groups' prefixes.

        Returns:
            Logits (groups alone, V) at the end of the prompts that are a prefix as a whole, in order; None for none.
        """
        first = [group.members[0] for group in groups]
        spans = [(member, 0, group.shared) for member, group in zip(first, groups, strict=True)]
        features = _features(groups)
        lengths = [group.shared for group in groups]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
            parts = zip(groups, k[0].split(lengths, dim=1), v[0].split(lengths, dim=1), strict=True)
            for group, keys, values in parts:
                group.block.put_prefix(layer, group, keys, values)
            return segment_attention(q, k, v, lengths, scaling)

        hidden = self._tokens(spans, features, attend)
        ends = np.cumsum(lengths) - 1
        return self._logits(hidden, [end for end, group in zip(ends, groups, strict=True) if group.alone])

    def suffixes(self, groups: Sequence[Group]) -> torch.Tensor:
        """Fills what follows the prefixes.

        Returns:
            Logits (rows, V) at the end of every member's prompt, group by group.
        """
        for block in {id(group.block): group.block for group in groups}.values():
            block.grow(max(group.suffix for group in groups if group.block is block) + 1)
        members = [(member, group) for group in groups for member in group.members]
        spans = [(member, group.shared, len(member.ids)) for member, group in members]
        lengths = [end - start for _, start, end in spans]
        of_groups = [sum(len(member.ids) - group.shared for member in group.members) for group in groups]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
            own = []
            for (member, group), *qkv in zip(members, *(t.split(lengths, dim=2) for t in (q, k, v)), strict=True):
                group.block.put_own(layer, member, qkv[1][0], qkv[2][0])
                own.append(partial_attention(*qkv, scaling, causal=True))
            by_group = zip(groups, q.split(of_groups, dim=2), strict=True)
            prefix = [group.block.read_prefix(layer, group, query, scaling) for group, query in by_group]
            own_out, own_lse, out, lse = (
                torch.cat(t, dim=2) for t in (*zip(*own, strict=True), *zip(*prefix, strict=True))
            )
            return join(out, lse, own_out, own_lse).transpose(1, 2)  # (1, T, H, D)

        hidden = self._tokens(spans, _features(groups), attend)
        return self._logits(hidden, (np.cumsum(lengths) - 1).tolist())

    def step(self, blocks: Sequence[Block]) -> torch.Tensor:
        """Feeds the last token of the answer of every row in these blocks.

        Returns:
            Logits (n, V) of the rows, block by block, by place; overwritten by the next step.
        """
        members: list[Row] = [row for block in blocks for _, row in block.held_rows]
        steps = [block.step() for block in blocks]
        counts = [step.n for step in steps]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
            parts = zip(steps, *(t[0].transpose(0, 1).split(counts) for t in (q, k, v)), strict=True)  # (n, H, D)
            return torch.cat([step.attend(layer, *qkv, scaling) for step, *qkv in parts])[None]

        tokens = torch.tensor([member.answer[-1] for member in members], device=self.device)
        positions = torch.tensor([len(m.ids) + len(m.answer) - 1 for m in members], device=self.device)
        embeds = self.model.transformer.wte(tokens)[None]  # (1, n, C)
        hidden = self._layers(embeds, positions, [m.alpha for m in members], [1] * len(members), attend)
        return self._head(hidden[0])

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) of (n, C), in memory that is kept: on a CPU, fresh pages cost nearly as much as the product."""
        head = self.model.lm_head
        if self.device.type != "cpu" or type(head) is not LanguageHead:
            return head(hidden)
        if self._logits_buffer is None or len(self._logits_buffer) < len(hidden):
            self._logits_buffer = hidden.new_empty(len(hidden), head.out_features)
        return torch.mm(hidden, head.weight.t(), out=self._logits_buffer[: len(hidden)])

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (N, 256, C) of images (N, 3, size, size)."""
        return self.model.transformer.visual(pixels.to(self.device)).to(self.model.dtype)

    def _tokens(
        self, spans: Sequence[tuple[Row, int, int]], features: dict[Hashable, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        """Hidden states (T, C) of stretches of prompts, one after the other."""
        ids = np.concatenate([member.ids[start:end] for member, start, end in spans])
        positions = np.concatenate([np.arange(start, end) for _, start, end in spans])
        embeds = self.model.transformer.wte(torch.from_numpy(ids).to(self.device))  # (T, C)
        offset = 0
        for member, start, end in spans:
            places = member.image_places[start:end]
            for image in np.unique(places[places >= 0] // QUERIES):
                here = np.flatnonzero(places // QUERIES == image)
                wanted = torch.from_numpy(places[here] - image * QUERIES).to(self.device)
                found = features[image_key(member.images[image])].to(embeds.dtype)[wanted]
                embeds[torch.from_numpy(here + offset).to(self.device)] = found
            offset += end - start
        alphas, lengths = [m.alpha for m, _, _ in spans], [end - start for _, start, end in spans]
        return self._layers(embeds[None], torch.from_numpy(positions).to(self.device), alphas, lengths, attend)[0]

    def _layers(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        alphas: Sequence[float],
        lengths: Sequence[int],
        attend: Attend,
    ) -> torch.Tensor:
        """All layers and the final norm over (1, T, C); `alphas` hold for `lengths` tokens each."""
        frequencies = torch.stack([self._frequencies(alpha) for alpha in alphas])  # (requests, D / 2)
        repeats = torch.tensor(lengths, device=self.device)
        frequencies = frequencies.repeat_interleave(repeats, dim=0)  # (T, D / 2)
        cos, sin = rotary_tables(frequencies, positions[:, None])  # (T, 1, 1, D)
        rotary = cos.transpose(0, 2), sin.transpose(0, 2)  # (1, 1, T, D)
        logn = logn_factors(positions[None], self.config.seq_length) if self.config.use_logn_attn else None
        for layer in self.model.transformer.h:
            x = layer(x, rotary=rotary, logn=logn, attention_mask=None, past_key_values=None, attend=attend)
        return self.model.transformer.ln_f(x)

    def _frequencies(self, alpha: float) -> torch.Tensor:
        if alpha not in self._known:
            config = self.config
            known = rotary_frequencies(alpha, config.rotary_emb_base, config.kv_channels, self.device)
            self._known[alpha] = known
        return self._known[alpha]

    def _logits(self, hidden: torch.Tensor, places: Sequence[int]) -> torch.Tensor | None:
        """Logits at these tokens alone."""
        if not len(places):
            return None
        return self.model.lm_head(hidden[torch.tensor(places, device=self.device)])


def _features(groups: Sequence[Group]) -> dict[Hashable, torch.Tensor]:
    """The features of all of their images."""
    return {key: feature for group in groups for key, feature in group.features.items()}
