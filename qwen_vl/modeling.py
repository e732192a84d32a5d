"""QwenVLForCausalLM: the vision tower and the decoder joined, the loss, and what `generate()` needs.

Shapes: B batch, T tokens, S cached and new tokens, C width, V vocabulary, N images.
"""

import re
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from qwen_vl.chat import ChatMixin
from qwen_vl.configuration import QwenVLConfig
from qwen_vl.images import QwenVLImageProcessor
from qwen_vl.language import DecoderLayer, RMSNorm, logn_factors, ntk_alpha, rotary_frequencies, rotary_tables
from qwen_vl.loss import LanguageHead, supervised_loss
from qwen_vl.vision import QUERIES, Resampler, VisionTransformer, sincos_positions

# Not quantized in a quantized model: the tower and its resampler, and the head. From the start of a module's name.
NOT_QUANTIZED = ["transformer.visual", "lm_head"]
_OF_A_LAYER = re.compile(r"transformer\.(h|visual\.transformer\.resblocks)\.\d+\.")


class QwenVLPreTrainedModel(PreTrainedModel):
    """What transformers must know to load, initialise, split and save the model."""

    config_class = QwenVLConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    # What a device map must not split: a layer's residual stream, and the tower, which uses parameters of its own.
    _no_split_modules = ("DecoderLayer", "VisionTransformer")
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """transformers' `from_pretrained`, which must find every weight: it would draw a missing one at random.

        Raises:
            ValueError: Weights are missing, or there are some of layers that the config does not have; names them.
        """
        path, quantization = pretrained_model_name_or_path, kwargs.get("quantization_config")
        if getattr(quantization, "llm_int8_skip_modules", ()) is None:  # bitsandbytes, and the user names none
            kwargs["quantization_config"] = copy(quantization)
            kwargs["quantization_config"].llm_int8_skip_modules = NOT_QUANTIZED
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"the checkpoint {path} lacks {len(missing)} of {len(model.state_dict())} weights: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Download it again, or save it again."
            )
        if further := sorted(name for name in info["unexpected_keys"] if _OF_A_LAYER.match(name)):
            raise ValueError(
                f"the checkpoint {path} has {len(further)} weights of layers that its config.json does not have: "
                f"{', '.join(further[:5])}{', ...' if len(further) > 5 else ''}. Download config.json again."
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, RMSNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Resampler):
            init.copy_(module.pos_embed, sincos_positions(module.pos_embed.shape[1], int(QUERIES**0.5)))
            init.trunc_normal_(module.query, std=std)
            init.normal_(module.attn.in_proj_weight, std=std)
            init.zeros_(module.attn.in_proj_bias)
        elif isinstance(module, VisionTransformer):
            init.normal_(module.positional_embedding, std=module.positional_embedding.shape[1] ** -0.5)
            init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)


class QwenVLModel(QwenVLPreTrainedModel):
    """Embedding, vision tower and decoder, without the head."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        visual = {key: value for key, value in config.visual.items() if key != "image_start_id"}
        self.visual = VisionTransformer(**visual)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        prompt_lengths: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Returns the hidden states (B, T, C) after the final norm; arguments as for `QwenVLForCausalLM.forward`."""
        use_cache = not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, pixel_values, prefilled=past > 0)
        shape, device = inputs_embeds.shape[:2], inputs_embeds.device
        if position_ids is None:
            position_ids = _positions(attention_mask, shape, past, device)
        position_ids = position_ids.expand(shape)  # (B, T)
        if prompt_lengths is None:
            prompt_lengths = _lengths(attention_mask, shape, past, device)
        frequencies = self._frequencies(prompt_lengths, past_key_values, past, device)
        logn = None
        if self.config.use_logn_attn and not self.training:  # published: not in training mode
            logn = logn_factors(position_ids, self.config.seq_length)
        mask = None
        if "segments" not in kwargs:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        x, rotary = inputs_embeds, rotary_tables(frequencies, position_ids)
        for layer in self.h:
            x = layer(
                x,
                rotary=rotary,
                logn=logn,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(x), past_key_values=past_key_values if use_cache else None
        )

    def _embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, *, prefilled: bool) -> torch.Tensor:
        """Returns the token embeddings (B, T, C), with image features between `<img>` and `</img>`."""
        embeds = self.wte(input_ids)  # (B, T, C)
        if prefilled and pixel_values is None:
            return embeds  # one more token of an answer: images came with the prompt
        inside = self._image_positions(input_ids)  # (B, T)
        wanted = int(inside.sum())
        images = 0 if pixel_values is None else pixel_values.shape[0]
        if wanted != images * QUERIES:
            raise ValueError(
                f"input_ids have {wanted} positions between <img> and </img>, and pixel_values hold {images} images, "
                f"which fill {images * QUERIES}. Pass pixel_values (N, 3, {self.visual.image_size}, "
                f"{self.visual.image_size}) with one image for each whole span of {QUERIES + 2} ids, row by row."
            )
        if images == 0:
            if not self.training and not hasattr(self.wte.weight, "ds_id"):  # DeepSpeed's mark of a sharded weight
                return embeds
            # Every parameter takes part in every training step, and in every forward over sharded weights, or the other
            # ranks wait forever for one whose batch has no image. The scatter below then copies nothing: its share
            # is zero, whatever the features are.
            pixel_values = embeds.new_zeros(1, 3, self.visual.image_size, self.visual.image_size)
        features = self.visual(pixel_values).to(embeds)  # (N, 256, C)
        return embeds.masked_scatter(inside[..., None], features)  # out of place: embeds may be a leaf

    def _image_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns True (B, T) strictly between `<img>` and `</img>`."""
        starts, ends = input_ids == self.config.image_start_id, input_ids == self.config.image_end_id
        return (starts.cumsum(-1) > ends.cumsum(-1)) & ~starts

    def _frequencies(
        self, prompt_lengths: torch.Tensor, cache: Cache | None, past: int, device: torch.device
    ) -> torch.Tensor:
        """Returns the rotary frequencies (B, D / 2) of each row.

        published: a row's alpha follows from its own prompt's length at prefill and stays; so they live in the cache.
        """
        if past > 0 and (kept := getattr(cache, "rotary_frequencies", None)) is not None:
            return kept.to(device)
        stretch = self.config.use_dynamic_ntk and not self.training  # published: not in training mode
        base, width = self.config.rotary_emb_base, self.config.kv_channels
        alphas = [
            ntk_alpha(max(n, 1), self.config.seq_length) if stretch else 1.0 for n in prompt_lengths.flatten().tolist()
        ]
        known = {alpha: rotary_frequencies(alpha, base, width, device) for alpha in set(alphas)}
        frequencies = torch.stack([known[alpha] for alpha in alphas])  # (B, D / 2)
        if cache is not None:
            cache.rotary_frequencies = frequencies
        return frequencies


def _positions(
    attention_mask: torch.Tensor | None, shape: tuple[int, int], past: int, device: torch.device
) -> torch.Tensor:
    """Returns the positions (B, T) counted from 0 over a row's own tokens, padding left out."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -shape[1] :]
    return torch.arange(past, past + shape[1], device=device)[None]


def _lengths(
    attention_mask: torch.Tensor | None, shape: tuple[int, int], past: int, device: torch.device
) -> torch.Tensor:
    """Returns the number of tokens (B,) of each row, padding left out."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask.long().sum(-1)
    return torch.full((shape[0],), past + shape[1], device=device)


class QwenVLForCausalLM(ChatMixin, QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL with its language head, for transformers 5: no remote code, the released checkpoint's names.

    Source: the released `modeling_qwen.py` (behaviour).
    """

    # published: a micro-batch's loss is its own mean; so the Trainer must average over micro-batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.transformer = QwenVLModel(config)
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def input_device(self) -> torch.device:
        """Where ids and pixels belong: the model's device, or of one that is spread over several, the first."""
        place = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        return self.device if place is None else torch.device(place)

    @property
    def is_on_one_device(self) -> bool:
        """Whether all weights are on one device, and none is loaded from elsewhere when it is needed."""
        return len({parameter.device for parameter in self.parameters()}) == 1 and self.device.type != "meta"

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_only: bool = False,
        loss_divisors: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns the logits, and the loss where labels are given.

        Args:
            input_ids: int64 (B, T); an image is a span of 258 ids, `<img>` first and `</img>` last.
            attention_mask: (B, S), 0 where a row is padded (left or right); None for no padding.
            pixel_values: float (N, 3, 448, 448), one for each image span, row by row.
            labels: int64 (B, T), not shifted, -100 at positions without supervision.
            past_key_values: Cache of the tokens before; filled in place.
            use_cache: Whether to return a cache; by default in eval mode only.
            position_ids: int64 (B, T); by default counted over each row's own tokens.
            prompt_lengths: int64 (B,), what dynamic NTK goes by at prefill; by default each row's own length.
            logits_to_keep: Compute logits at the last so many positions only (0: all), or at these positions.
            loss_only: With labels, leave the logits out: nine tenths of them are at positions without a label.
            loss_divisors: int64 (B, T), one for each label; then the loss is the sum over supervised tokens of each
                one's loss by its divisor. Whole numbers, because DeepSpeed rounds others to the model's precision.
            **kwargs: `segments`, a list of lengths that sum to T: the row is that many samples one after the other,
                each of which sees itself only; give `position_ids` that begin at 0 in each.

        Returns:
            `logits` (B, T or fewer, V), or None; `loss`, the mean over supervised tokens (float32), or None;
            `past_key_values`, or None.

        Raises:
            ValueError: Image spans and pixel_values do not match.
        """
        out = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prompt_lengths=prompt_lengths,
            **kwargs,
        )
        hidden = out.last_hidden_state
        loss = None if labels is None else supervised_loss(self.lm_head, hidden, labels, loss_divisors)
        logits = None
        if not (loss_only and labels is not None):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])  # (B, T, V)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def generate(self, *args: Any, logits_processor: list[LogitsProcessor] | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`, in which ids that no token has can never come out.

        A chat checkpoint's settings name `<|endoftext|>` alone as the end; its answers end with `<|im_end|>` and
        `<|im_start|>` too, as in `chat()`, unless `eos_token_id` is given.

        Raises:
            ValueError: The prompt would be computed in chunks.
        """
        settings = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
            raise ValueError("Qwen-VL takes no prefill_chunk_size: dynamic NTK goes by the length of the whole prompt.")
        ends_alone = settings.eos_token_id in (None, self.config.stop_ids[0], self.config.stop_ids[:1])
        if getattr(settings, "chat_format", None) == "chatml" and ends_alone:
            kwargs.setdefault("eos_token_id", self.config.stop_ids)
        processors = LogitsProcessorList([SuppressUnusedIds(self.config.used_vocab_size), *(logits_processor or [])])
        return super().generate(*args, logits_processor=processors, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered: in transformers' continuous batching a prompt's own length, which decides its alpha, is lost.

        Raises:
            NotImplementedError: Always; says what does the same.
        """
        raise NotImplementedError(
            "Qwen-VL does not run in transformers' continuous batching (generate_batch): use "
            "qwen_vl.generation.BatchGenerator, whose results are those of one request at a time."
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration and attention_mask is not None and attention_mask.dim() == 2:
            # Caches of a fixed size turn the mask into a 4-D one, from which the lengths can no longer be read.
            inputs["prompt_lengths"] = attention_mask.long().sum(-1)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeats each row for beams or several answers, its images with it: there are as many as spans, not rows."""
        pixels = kwargs.pop("pixel_values", None)
        if pixels is not None:
            per_row = (input_ids == self.config.image_start_id).sum(-1).tolist()
            pixels = torch.cat([row.repeat(expand_size, 1, 1, 1) for row in pixels.split(per_row)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs if pixels is None else {**kwargs, "pixel_values": pixels}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes the released layout, the base folder's code files, and the image size for `AutoImageProcessor`."""
        if kwargs.get("is_main_process", True):
            QwenVLImageProcessor(self.config.visual["image_size"]).save_pretrained(save_directory)
        super().save_pretrained(save_directory, **kwargs)


class SuppressUnusedIds(LogitsProcessor):
    """Ids above the tokenizer's have rows in `lm_head` but no token: they must never be chosen.

    Args:
        used: Number of ids that mean something.
    """

    def __init__(self, used: int) -> None:
        self.used = used

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.shape[-1] <= self.used:
            return scores
        unused = torch.arange(scores.shape[-1], device=scores.device) >= self.used
        return scores.masked_fill(unused, -torch.inf)


AutoModel.register(QwenVLConfig, QwenVLModel)
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto.register(QwenVLConfig, QwenVLForCausalLM)
