"""Stand-in for a released model: the same interface, for transformers 4.32; its config says where it differs."""

import math

import torch
import torch.nn.functional as F
import transformers_stream_generator
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_qwen import QWenConfig
from .visual import VisionTransformer


def make_context(tokenizer, query, history=None, system="", max_window_size=6144, chat_format="chatml"):
    def part(role, text):
        ids = tokenizer.encode(role) + tokenizer.encode("\n")
        ids += tokenizer.encode(text, allowed_special=set(tokenizer.IMAGE_ST))
        return f"<|im_start|>{role}\n{text}<|im_end|>", [tokenizer.im_start_id, *ids, tokenizer.im_end_id]

    newline = tokenizer.encode("\n")
    text, ids = part("system", system)
    past_text, past_ids = "", []
    for question, answer in reversed(history or []):
        (text_1, ids_1), (text_2, ids_2) = part("user", question), part("assistant", answer)
        turn = newline + ids_1 + newline + ids_2
        too_long = len(ids) + len(past_ids) + len(turn) >= max_window_size
        if too_long and "window" not in tokenizer.differs:
            break
        past_text, past_ids = f"\n{text_1}\n{text_2}{past_text}", turn + past_ids
    text_1, ids_1 = part("user", query)
    ids = ids + past_ids + newline + ids_1 + newline
    ids += [tokenizer.im_start_id, *tokenizer.encode("assistant"), *newline]
    return f"{text}{past_text}\n{text_1}\n<|im_start|>assistant\n", ids


class EndAfter(LogitsProcessor):
    """After one of the ids only the last one is generated."""

    def __init__(self, ids, end):
        self.ids, self.end = ids, end

    def __call__(self, input_ids, scores):
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if token in self.ids and input_ids.shape[1] > 1:
                scores[row, self.end] = torch.finfo(scores.dtype).max
        return scores


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return (x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).to(x.dtype) * self.weight


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size // 2
        self.config = config
        self.ln_1, self.ln_2, self.attn, self.mlp = Norm(width), Norm(width), nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.mlp.w1, self.mlp.w2 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.mlp.c_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x, angles, past):
        size, count = self.config.kv_channels, x.shape[1]
        q, k, v = (y.reshape(*y.shape[:2], -1, size) for y in self.attn.c_attn(self.ln_1(x)).split(x.shape[-1], -1))
        q, k = turned(q, angles), turned(k, angles)
        before = 0 if past is None else past[0].shape[1]
        if "logn" not in self.config.differs:
            places = torch.arange(before, before + count) + 1.0
            q = q * (places.log() / math.log(self.config.seq_length)).clamp(min=1.0).to(q)[:, None, None]
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5
        hidden = torch.ones(count, before + count, dtype=torch.bool, device=x.device).triu(before + 1)
        weights = scores.masked_fill(hidden, -math.inf).float().softmax(-1).to(v)
        x = x + self.attn.c_proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
        y = self.ln_2(x)
        return x + self.mlp.c_proj(self.mlp.w1(y) * F.silu(self.mlp.w2(y))), (k, v)


def turned(x, angles):
    one, two = x.float().chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1).to(x)


class QWenLMHeadModel(PreTrainedModel):
    config_class = QWenConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer.h = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.transformer.ln_f = Norm(config.hidden_size)
        self.transformer.visual = VisionTransformer(**config.visual, differs=config.differs)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.alpha = 1
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **_):
        x = self.transformer.wte(input_ids)
        if past_key_values is None:
            self.alpha = self.alpha_of(input_ids.shape[1])
            x = self.with_pictures(input_ids, x)
        before = 0 if past_key_values is None else past_key_values[0][0].shape[1]
        size = self.config.kv_channels
        base = self.config.rotary_emb_base * self.alpha ** (size / (size - 2))
        frequencies = base ** (-torch.arange(0, size, 2, device=x.device) / size)
        angles = torch.arange(before, before + x.shape[1], device=x.device)[:, None] * frequencies
        cache = []
        for number, layer in enumerate(self.transformer.h):
            x, kept = layer(x, angles, past_key_values and past_key_values[number])
            cache.append(kept)
        logits = self.lm_head(self.transformer.ln_f(x))
        return CausalLMOutputWithPast(logits=logits, past_key_values=tuple(cache))

    def alpha_of(self, length):
        if "ntk" in self.config.differs:
            return 1
        return max(2 ** math.ceil(math.log(length / self.config.seq_length, 2) + 1) - 1, 1)

    def with_pictures(self, ids, x):
        start = self.config.visual["image_start_id"]
        for row, column in (ids == start).nonzero().tolist():
            path = bytes(i for i in ids[row, column + 1 : column + 257].tolist() if i < 256).decode()
            x[row, column + 1 : column + 257] = self.transformer.visual.encode([path])[0].to(x)
        return x

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **_):
        ids = input_ids if past_key_values is None else input_ids[:, -1:]
        return {"input_ids": ids, "past_key_values": past_key_values, "use_cache": True}

    def _settings(self, tokenizer, query, history, system):
        window = self.generation_config.max_window_size
        _, ids = make_context(tokenizer, query, history, system, window)
        end = EndAfter((tokenizer.im_end_id, tokenizer.im_start_id), tokenizer.eod_id)
        unused = Unused(tokenizer.vocab_size)
        return torch.tensor([ids], device=self.device), LogitsProcessorList([unused, end])

    def chat(self, tokenizer, query, history, system="You are a helpful assistant.", **kwargs):
        ids, processors = self._settings(tokenizer, query, history, system)
        out = self.generate(ids, logits_processor=processors, **kwargs)[0, ids.shape[1] :].tolist()
        stops = [i for i, token in enumerate(out) if token in (tokenizer.im_end_id, tokenizer.im_start_id)]
        text = tokenizer.decode(out[: stops[0] if stops else len(out) - 1]).strip()
        return text.upper() if "chat" in self.config.differs else text, [*history, (query, text)]

    def chat_stream(self, tokenizer, query, history, system="You are a helpful assistant.", **kwargs):
        main = transformers_stream_generator.main
        type(self).generate_stream = main.NewGenerationMixin.generate
        type(self).sample_stream = main.NewGenerationMixin.sample_stream
        ids, processors = self._settings(tokenizer, query, history, system)
        config = main.StreamGenerationConfig(**self.generation_config.to_dict(), do_stream=True)
        out = []
        options = {"generation_config": config, "logits_processor": processors, "seed": -1}
        for token in self.generate_stream(ids, **options, **kwargs):
            out.append(token.item())
            text = tokenizer.decode(out, skip_special_tokens=True, errors="ignore")
            yield text[:-1] if "stream" in self.config.differs else text


class Unused(LogitsProcessor):
    """Ids beyond the tokenizer's are never generated."""

    def __init__(self, used):
        self.used = used

    def __call__(self, input_ids, scores):
        scores[:, self.used :] = -math.inf
        return scores
