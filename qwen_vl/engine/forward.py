"""The decoder over tokens of many sequences at once, without padding; keys and values lie in the batch's caches.

Shapes: T tokens of a pass, of all sequences one after the other; C width, H heads, D width per head, V rows of the
head, n rows of a step.
"""

from collections.abc import Hashable
from itertools import accumulate

import numpy as np
import torch

from qwen_vl.engine.attention import causal_attention, join
from qwen_vl.engine.cache import CacheStep
from qwen_vl.engine.image_cache import image_key
from qwen_vl.engine.scheduler import Batch, Group, Sequence
from qwen_vl.language import Attend, logn_factors, rotary_frequencies, rotary_tables
from qwen_vl.loss import LanguageHead
from qwen_vl.modeling import QwenVLForCausalLM
from qwen_vl.vision import QUERIES

# The head's product over so many rows is made in parts of the vocabulary, which fit a CPU's caches: half the time for 8
# rows, three quarters for 20. With few rows the parts have PART ids each, with more there are PART parts.
SPLIT_ROWS, FEW_ROWS, PART = range(4, 49), 12, 128

Span = tuple[Sequence, int, int]  # tokens of a sequence, from the first index to before the second


class BatchForward:
    """Runs a model's decoder over prompts and over single steps.

    Args:
        model: In eval mode.
    """

    def __init__(self, model: QwenVLForCausalLM) -> None:
        self.model, self.config = model, model.config
        self._alphas: dict[float, int] = {}  # row of the next
        self._frequencies = torch.empty(0, model.config.kv_channels // 2, device=model.device)
        self._logits_buffer = torch.empty(0, 0)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    def prefill(self, groups: list[Group]) -> tuple[list[tuple[Group, Sequence]], torch.Tensor]:
        """Computes all tokens of groups that have just come into the batch.

        The last layer's attention and MLP are computed at the end of each sequence alone: of the other tokens, only
        that layer's keys and values are needed.

        Returns:
            The sequences with their groups, and logits (sequences, V) at the end of each.
        """
        spans: list[Span] = []
        rows: list[tuple[Group, Sequence]] = []
        ends: list[int] = []  # spans that end with a sequence
        lengths: list[list[int]] = []  # of each group: the prefix, and what its members have after it
        for group in groups:
            after = [(member, group.shared, len(member)) for member in group.members if len(member) > group.shared]
            spans += [(group.members[0], 0, group.shared), *after]
            ends += range(len(spans) - max(len(after), 1), len(spans))
            rows += [(group, member) for member in group.members]
            lengths.append([group.shared, *(end - start for _, start, end in after)])

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
            final = layer == self.config.num_hidden_layers - 1
            outs: list[torch.Tensor] = []  # (1, T of it, H, D) each
            v = v.contiguous()  # as q and k are: attention then takes a fourteenth less
            by_group = zip(*(t.split([sum(sizes) for sizes in lengths], dim=2) for t in (q, k, v)), strict=True)
            for group, sizes, qkv in zip(groups, lengths, by_group, strict=True):
                prefix, *members = zip(*(t.split(sizes, dim=2) for t in qkv), strict=True)
                _, *past = prefix
                group.prefix.write(layer, *past)
                if not (final and members):
                    outs.append(causal_attention([prefix], None, scaling, last=final))
                if members:
                    outs.append(causal_attention(members, past, scaling, last=final))
                    for member, (_, *own) in zip(group.members, members, strict=True):
                        member.own.write(layer, *own)
            return torch.cat(outs, dim=1)

        features = {key: feature for group in groups for key, feature in group.features.items()}
        last = np.cumsum([end - start for _, start, end in spans])[ends] - 1
        return rows, self.head(self._spans(spans, features, attend, torch.from_numpy(last).to(self.device)))

    def step(self, batch: Batch) -> torch.Tensor:
        """Feeds the last token of every sequence in the batch.

        Returns:
            Logits (n, V) of its sequences; overwritten by the next step.
        """
        members = batch.sequences
        firsts = accumulate((len(group.members) for group in batch.groups), initial=0)
        of_prefix = {g.prefix: list(range(i, i + len(g.members))) for g, i in zip(batch.groups, firsts, strict=False)}
        prefixes = CacheStep(batch.prefixes, of_prefix, new=0)
        own = CacheStep(batch.own, {member.own: [i] for i, member in enumerate(members)}, new=1)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # (n, H, D)
            own.write(layer, torch.stack((k, v)))
            return join(*prefixes.attend(layer, q, scaling), *own.attend(layer, q, scaling))[None]

        tokens = torch.tensor([member.answer[-1] for member in members], device=self.device)
        positions = torch.tensor([len(member) - 1 for member in members], device=self.device)
        embeds = self.model.transformer.wte(tokens)[None]  # (1, n, C)
        rows = torch.tensor([self._frequency_row(member.alpha) for member in members], device=self.device)
        return self.head(self._layers(embeds, positions, rows, attend)[0])

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the features (N, 256, C) of images (N, 3, size, size)."""
        return self.model.transformer.visual(pixels.to(self.device)).to(self.model.dtype)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns logits (n, V) of (n, C), on a CPU in reused memory: fresh pages cost about as much as the product."""
        head, (count, width) = self.model.lm_head, hidden.shape
        if self.device.type != "cpu" or type(head) is not LanguageHead:
            return head(hidden)
        if len(self._logits_buffer) < count:
            self._logits_buffer = hidden.new_empty(count, head.out_features)
        logits = self._logits_buffer[:count]
        if count not in SPLIT_ROWS or head.out_features % PART:
            return torch.mm(hidden, head.weight.t(), out=logits)
        parts = head.out_features // PART if count <= FEW_ROWS else PART
        weights = head.weight.view(parts, -1, width).transpose(1, 2)
        by_part = torch.bmm(hidden.expand(parts, count, width), weights)  # (parts, n, V / parts)
        return logits.view(count, parts, -1).copy_(by_part.transpose(0, 1)).flatten(1)

    def _spans(
        self, spans: list[Span], features: dict[Hashable, torch.Tensor], attend: Attend, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Returns the hidden states (n, C) at the `wanted` tokens of consecutive stretches of sequences."""
        ids = np.concatenate([member.tokens(start, end) for member, start, end in spans])
        positions = np.concatenate([np.arange(start, end) for _, start, end in spans])
        lengths = [end - start for _, start, end in spans]
        rows = np.repeat([self._frequency_row(member.alpha) for member, _, _ in spans], lengths)
        embeds = self.model.transformer.wte(torch.from_numpy(ids).to(self.device))  # (T, C)
        offset = 0
        for member, start, end in spans:
            places = member.image_places[start:end]
            for image in np.unique(places[places >= 0] // QUERIES):
                here = np.flatnonzero(places // QUERIES == image)
                feature = torch.from_numpy(places[here] - image * QUERIES).to(self.device)
                found = features[image_key(member.images[image])].to(embeds.dtype)[feature]
                embeds[torch.from_numpy(here + offset).to(self.device)] = found
            offset += end - start
        positions, rows = (torch.from_numpy(array).to(self.device) for array in (positions, rows))
        return self._layers(embeds[None], positions, rows, attend, wanted)[0]

    def _layers(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        frequency_rows: torch.Tensor,
        attend: Attend,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns all layers and the final norm.

        Args:
            x: (1, T, C).
            positions: (T,).
            frequency_rows: (T,), of the rotary frequencies.
            attend: Gives the last layer's attention for the n `wanted` tokens only.
            wanted: (n,), whose hidden states are needed; None for all.

        Returns:
            (1, n, C).
        """
        cos, sin = rotary_tables(self._frequencies[frequency_rows], positions[:, None])  # (T, 1, 1, D / 2)
        rotary = cos.transpose(0, 2), sin.transpose(0, 2)  # (1, 1, T, D / 2)
        scaled = self.config.use_logn_attn and int(positions.max()) >= self.config.seq_length  # else all factors are 1
        logn = logn_factors(positions[None], self.config.seq_length) if scaled else None
        given = {"rotary": rotary, "logn": logn, "attention_mask": None, "past_key_values": None, "attend": attend}
        *layers, last = self.model.transformer.h
        for layer in layers:
            x = layer(x, **given)
        attended = last.attn(last.ln_1(x), **given)
        x = (x if wanted is None else x[:, wanted]) + attended
        return self.model.transformer.ln_f(x + last.mlp(last.ln_2(x)))

    def _frequency_row(self, alpha: float) -> int:
        if alpha not in self._alphas:
            new = rotary_frequencies(alpha, self.config.rotary_emb_base, self.config.kv_channels, self.device)
            self._frequencies = torch.cat([self._frequencies, new[None]])
            self._alphas[alpha] = len(self._alphas)
        return self._alphas[alpha]
