"""The decoder on vLLM's parallel layers, and the project's own vision tower beside it.

Shapes: N tokens of all requests of a step, C width, H heads of this GPU, D per head, V vocabulary.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMRoPE, SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sequence import IntermediateTensors

from qwen_vl.language import logn_factors, rotary_frequencies, rotary_tables, rotate
from qwen_vl.vision import VisionTransformer
from qwen_vl.vllm_plugin.configuration import QwenVLServingConfig
from qwen_vl.vllm_plugin.positions import STRIDE, class_alpha, prompt_length, rotary_class
from qwen_vl.vllm_plugin.processing import DummyPictures, PictureProcessor, ProcessingInfo

# The gated MLP as one matrix: vLLM's kernel multiplies the first half, through SiLU, with the second.
GATE_SHARDS = {"w2": 0, "w1": 1}

Rotary = tuple[torch.Tensor, torch.Tensor]


class ParallelAttention(nn.Module):
    """Causal self-attention over vLLM's paged cache."""

    def __init__(self, config: QwenVLServingConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        total, self.head_dim = config.num_attention_heads, config.kv_channels
        self.heads = total // get_tensor_model_parallel_world_size()
        self.c_attn = QKVParallelLinear(config.hidden_size, self.head_dim, total, bias=True, prefix=f"{prefix}.c_attn")
        self.c_proj = RowParallelLinear(config.hidden_size, config.hidden_size, bias=False, prefix=f"{prefix}.c_proj")
        self.attn = Attention(
            self.heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: torch.Tensor, rotary: Rotary, logn: torch.Tensor | None) -> torch.Tensor:
        qkv, _ = self.c_attn(x)
        q, k, v = qkv.chunk(3, dim=-1)
        # Each token is a row of its own for `rotate`: its request's class decides its frequencies.
        q, k = (rotate(part.view(-1, self.heads, 1, self.head_dim), *rotary) for part in (q, k))  # (N, H, 1, D)
        if logn is not None:
            q = q * logn.to(q.dtype)
        out, _ = self.c_proj(self.attn(q.flatten(1), k.flatten(1), v))
        return out


class ParallelMLP(nn.Module):
    """Gated MLP."""

    def __init__(self, config: QwenVLServingConfig, prefix: str) -> None:
        super().__init__()
        inner = config.intermediate_size // 2
        self.gate = MergedColumnParallelLinear(config.hidden_size, [inner] * 2, bias=False, prefix=f"{prefix}.gate")
        self.c_proj = RowParallelLinear(inner, config.hidden_size, bias=False, prefix=f"{prefix}.c_proj")
        self.activation = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, _ = self.gate(x)
        out, _ = self.c_proj(self.activation(gate))
        return out


class ParallelLayer(nn.Module):
    """One pre-norm layer of the decoder."""

    def __init__(self, config: QwenVLServingConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = ParallelAttention(config, vllm_config, f"{prefix}.attn")
        self.ln_2 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = ParallelMLP(config, f"{prefix}.mlp")

    def forward(self, x: torch.Tensor, rotary: Rotary, logn: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), rotary, logn)
        return x + self.mlp(self.ln_2(x))


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class ParallelDecoder(nn.Module):
    """Embedding and decoder, without the head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: QwenVLServingConfig = vllm_config.model_config.hf_config
        self.config = config
        self.wte = VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=f"{prefix}.wte")
        self.h = nn.ModuleList(
            ParallelLayer(config, vllm_config, f"{prefix}.h.{i}") for i in range(config.num_hidden_layers)
        )
        self.ln_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        longest = vllm_config.model_config.max_model_len
        classes = rotary_class(longest, config.trained_length, dynamic_ntk=config.use_dynamic_ntk) + 1
        table = [
            rotary_frequencies(class_alpha(k), config.rotary_emb_base, config.kv_channels, torch.device("cpu"))
            for k in range(classes)
        ]
        self.register_buffer("frequencies", torch.stack(table).to(self.wte.weight.device), persistent=False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.wte(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the hidden states (N, C) after the final norm; positions (3, N), of which the rows are alike."""
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        places = (positions[0] % STRIDE)[:, None]  # (N, 1)
        # Where a step is padded, positions are left over from steps before.
        classes = (positions[0] // STRIDE).clamp(max=self.frequencies.shape[0] - 1)
        rotary = rotary_tables(self.frequencies[classes], places)  # each (N, 1, 1, D / 2)
        logn = logn_factors(places, self.config.trained_length) if self.config.use_logn_attn else None  # (N, 1, 1, 1)
        for layer in self.h:
            x = layer(x, rotary, logn)
        return self.ln_f(x)


@MULTIMODAL_REGISTRY.register_processor(PictureProcessor, info=ProcessingInfo, dummy_inputs=DummyPictures)
class QwenVLForServing(nn.Module, SupportsMultiModal, SupportsMRoPE):
    """Qwen-VL for vLLM; reads the released names of all weights.

    The vision tower, a fifth of the weights, is the project's own and stands whole on every GPU.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: QwenVLServingConfig = vllm_config.model_config.hf_config
        self.config = config
        with self._mark_tower_model(vllm_config, "image"):
            self.visual = VisionTransformer(**{k: v for k, v in config.visual.items() if k != "image_start_id"})
        with self._mark_language_model(vllm_config):
            self.decoder = ParallelDecoder(vllm_config=vllm_config, prefix=f"{prefix}.decoder".lstrip("."))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=f"{prefix}.lm_head".lstrip("."))
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """None: the renderer writes the ids of a picture, no text stands for one."""
        return None

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Returns the positions (3, tokens) of a request and the delta of those that follow; see `positions`."""
        length = len(input_tokens)
        # vLLM's own trial runs have no prompt.
        if self.config.prompt_ending[0] in input_tokens:
            length = prompt_length(input_tokens, self.config.prompt_ending)
        number = rotary_class(length, self.config.trained_length, dynamic_ntk=self.config.use_dynamic_ntk)
        delta = number * STRIDE
        positions = torch.arange(delta, delta + len(input_tokens))
        return positions.expand(3, -1), delta

    def embed_multimodal(self, **kwargs: torch.Tensor) -> MultiModalEmbeddings:
        """Returns the features (256, C) of each picture of `pixel_values`."""
        pixels = kwargs.get("pixel_values")
        return [] if pixels is None else self.visual(pixels)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        return self.decoder(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Returns the logits (N, V), without the ids that no token has; None where another GPU gathers them."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is not None:
            logits[..., self.config.used_vocab_size :] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads all weights by their released names.

        Raises:
            ValueError: Some are missing, or there are some that the config has no place for; names them.
        """
        parameters = dict(self.named_parameters())
        loaded, unknown = set(), []
        for name, weight in weights:
            own, shard = _own_name(name)
            if own not in parameters:
                unknown.append(name)
                continue
            loader = getattr(parameters[own], "weight_loader", default_weight_loader)
            loader(parameters[own], weight, *shard)
            loaded.add((own, *shard))
        merged = {name for name in parameters if ".mlp.gate." in name}
        wanted = {(name,) for name in parameters.keys() - merged}
        wanted |= {(name, shard) for name in merged for shard in GATE_SHARDS.values()}
        if missing := sorted(str(key[0]) for key in wanted - loaded):
            raise ValueError(
                f"the checkpoint lacks {len(missing)} weights: {', '.join(missing[:5])} … Download it again."
            )
        if unknown:
            raise ValueError(
                f"the checkpoint has {len(unknown)} weights that its config.json has no place for: "
                f"{', '.join(unknown[:5])} … Download config.json again, or merge the adapter (scripts/merge_lora.py)."
            )
        return set(parameters)


def _own_name(name: str) -> tuple[str, tuple[int, ...]]:
    """Returns the parameter that a released weight goes to, and which part of it."""
    name = name.replace("transformer.visual.", "visual.", 1) if name.startswith("transformer.visual.") else name
    name = name.replace("transformer.", "decoder.", 1) if name.startswith("transformer.") else name
    if name.startswith("decoder."):
        for part, shard in GATE_SHARDS.items():
            if f".mlp.{part}." in name:
                return name.replace(f".mlp.{part}.", ".mlp.gate."), (shard,)
    return name, ()
