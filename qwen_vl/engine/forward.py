"""The decoder over tokens of many sequences at once, without padding; keys and values lie in the batch's caches.

Shapes: T tokens of a pass, of all sequences one after the other; C width, H heads, D width per head, V rows of the
head, n rows of a step.
"""

from collections.abc import Hashable
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F

from qwen_vl.engine.attention import join, partial_attention
from qwen_vl.engine.cache import CacheStep
from qwen_vl.engine.image_cache import image_key
from qwen_vl.engine.scheduler import Batch, Group, Sequence
from qwen_vl.language import Attend, logn_factors, rotary_frequencies, rotary_tables
from qwen_vl.loss import LanguageHead
from qwen_vl.modeling import QwenVLForCausalLM
from qwen_vl.vision import QUERIES

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
        self._logits_buffer: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def prefill(self, groups: list[Group]) -> tuple[list[tuple[Group, Sequence]], torch.Tensor]:
        """Computes all tokens of groups that have just come into the batch.

        Returns:
            The sequences with their groups, and logits (sequences, V) at the end of each.
        """
        spans: list[Span] = []
        rows: list[tuple[Group, Sequence]] = []
        ends: list[int] = []  # spans that end with a sequence
        lengths: list[tuple[int, list[int]]] = []  # of each group: the prefix, and what its members have after it
        for group in groups:
            spans.append((group.members[0], 0, group.shared))
            after = [(member, group.shared, len(member)) for member in group.members if len(member) > group.shared]
            spans += after
            ends += range(len(spans) - max(len(after), 1), len(spans))
            rows += [(group, member) for member in group.members]
            lengths.append((group.shared, [end - start for _, start, end in after]))
        sizes = [shared + sum(after) for shared, after in lengths]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
            outs: list[torch.Tensor] = []  # (1, T of it, H, D) each
            by_group = zip(*(t.split(sizes, dim=2) for t in (q, k, v)), strict=True)
            for group, (shared, after), qkv in zip(groups, lengths, by_group, strict=True):
                (query, key, value), *members = zip(*(t.split([shared, *after], dim=2) for t in qkv), strict=True)
                group.prefix.write(layer, key[0], value[0])
                out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
                outs.append(out.transpose(1, 2))
                if not members:
                    continue
                prefix = partial_attention(qkv[0][:, :, shared:], key, value, scaling)
                own = [partial_attention(*part, scaling, causal=True) for part in members]
                own = [torch.cat([t.transpose(1, 2) for t in parts], dim=1) for parts in zip(*own, strict=True)]
                outs.append(join(*(t.transpose(1, 2) for t in prefix), *own))
                for member, (_, key, value) in zip(group.members, members, strict=True):
                    member.own.write(layer, key[0], value[0])
            return torch.cat(outs, dim=1)

        features = {key: feature for group in groups for key, feature in group.features.items()}
        hidden = self._spans(spans, features, attend)
        last = np.cumsum([end - start for _, start, end in spans])[ends] - 1
        return rows, self.head(hidden[torch.from_numpy(last).to(self.device)])

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
            own.write(layer, k, v)
            return join(*prefixes.attend(layer, q, scaling), *own.attend(layer, q, scaling))[None]

        tokens = torch.tensor([member.answer[-1] for member in members], device=self.device)
        positions = torch.tensor([len(member) - 1 for member in members], device=self.device)
        embeds = self.model.transformer.wte(tokens)[None]  # (1, n, C)
        rows = torch.tensor([self._frequency_row(member.alpha) for member in members], device=self.device)
        return self.head(self._layers(embeds, positions, rows, attend)[0])

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (N, 256, C) of images (N, 3, size, size)."""
        return self.model.transformer.visual(pixels.to(self.device)).to(self.model.dtype)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) of (n, C), in memory that is kept: on a CPU, fresh pages cost nearly as much as the product."""
        head = self.model.lm_head
        if self.device.type != "cpu" or type(head) is not LanguageHead:
            return head(hidden)
        if self._logits_buffer is None or len(self._logits_buffer) < len(hidden):
            self._logits_buffer = hidden.new_empty(len(hidden), head.out_features)
        return torch.mm(hidden, head.weight.t(), out=self._logits_buffer[: len(hidden)])

    def _spans(self, spans: list[Span], features: dict[Hashable, torch.Tensor], attend: Attend) -> torch.Tensor:
        """Hidden states (T, C) of stretches of sequences, one after the other."""
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
                wanted = torch.from_numpy(places[here] - image * QUERIES).to(self.device)
                found = features[image_key(member.images[image])].to(embeds.dtype)[wanted]
                embeds[torch.from_numpy(here + offset).to(self.device)] = found
            offset += end - start
        positions, rows = (torch.from_numpy(array).to(self.device) for array in (positions, rows))
        return self._layers(embeds[None], positions, rows, attend)[0]

    def _layers(
        self, x: torch.Tensor, positions: torch.Tensor, frequency_rows: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """All layers and the final norm over (1, T, C), for positions (T,) and rows (T,) of the rotary frequencies."""
        cos, sin = rotary_tables(self._frequencies[frequency_rows], positions[:, None])  # (T, 1, 1, D)
        rotary = cos.transpose(0, 2), sin.transpose(0, 2)  # (1, 1, T, D)
        logn = logn_factors(positions[None], self.config.seq_length) if self.config.use_logn_attn else None
        for layer in self.model.transformer.h:
            x = layer(x, rotary=rotary, logn=logn, attention_mask=None, past_key_values=None, attend=attend)
        return self.model.transformer.ln_f(x)

    def _frequency_row(self, alpha: float) -> int:
        if alpha not in self._alphas:
            new = rotary_frequencies(alpha, self.config.rotary_emb_base, self.config.kv_channels, self.device)
            self._frequencies = torch.cat([self._frequencies, new[None]])
            self._alphas[alpha] = len(self._alphas)
        return self._alphas[alpha]
