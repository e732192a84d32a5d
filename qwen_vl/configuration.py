"""Reads and writes the configuration of a released Qwen-VL checkpoint unchanged."""

import logging
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from qwen_vl.checkpoint import CheckpointError, check_vision, copy_code_files, names_code_of

logger = logging.getLogger(__name__)

# The ids that follow image_start_id in every Qwen-VL vocabulary: <img> </img> <imgpad>.
IMAGE_TOKEN_COUNT = 3
# The ids before it: <|endoftext|> <|im_start|> <|im_end|>, 205 <|extra_N|>, and six of references and boxes.
TOKENS_BEFORE_IMAGES = 3 + 205 + 6
VISUAL_FIELDS = frozenset(
    ["heads", "image_size", "image_start_id", "layers", "mlp_ratio", "output_dim", "patch_size", "width"]
)
RELEASED_ARCHITECTURE = "QWenLMHeadModel"
RELEASED_TOKENIZER = "QWenTokenizer"


class QwenVLConfig(PreTrainedConfig):
    """Shape and behaviour of a Qwen-VL model; every field has its name in the released `config.json`.

    Args:
        vocab_size: Rows of the embedding and of `lm_head`, padded above the tokenizer's ids.
        hidden_size: Width C of the decoder.
        intermediate_size: Twice the inner width of the gated MLP (published: each of its two branches has half of it).
        num_hidden_layers: Decoder layers.
        num_attention_heads: Heads H; `hidden_size / num_attention_heads` is the head width D.
        kv_channels: Head width as the released file states it; must agree with the two above.
        layer_norm_epsilon: Epsilon of the decoder's RMSNorms.
        rotary_emb_base: Base of the rotary frequencies before dynamic NTK, at least 1.
        seq_length: Length the base model was trained at; dynamic NTK and log-n attention begin beyond it, in tokens.
        use_dynamic_ntk: Stretch the rotary base for prompts longer than `seq_length` (not in training mode).
        use_logn_attn: Scale queries beyond `seq_length` by log(position) / log(seq_length) (not in training mode).
        max_position_embeddings: Longest intended context, in tokens.
        visual: The vision tower: `heads image_size image_start_id layers mlp_ratio output_dim patch_size width`.

    Raises:
        ValueError: Sizes do not fit together; names the numbers.
    """

    model_type = "qwen"
    tokenizer_class: ClassVar[str] = RELEASED_TOKENIZER  # for folders whose tokenizer_config.json names none
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]  # the Trainer adds a list to it

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    rotary_emb_base: int | float = 10000
    seq_length: int = 2048
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    max_position_embeddings: int = 8192
    use_cache: bool = True
    tie_word_embeddings: bool = False
    visual: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.visual is None:
            self.visual = {
                "heads": 16,
                "image_size": 448,
                "image_start_id": 151857,
                "layers": 48,
                "mlp_ratio": 4.9231,
                "output_dim": self.hidden_size,
                "patch_size": 14,
                "width": 1664,
            }
        self._check_sizes()
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        if wrong := sorted(VISUAL_FIELDS ^ set(self.visual)):
            raise ValueError(f"config.json: visual must have the fields {sorted(VISUAL_FIELDS)} alone; see to {wrong}")
        if self.num_attention_heads * self.kv_channels != self.hidden_size:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_attention_heads} x kv_channels {self.kv_channels} "
                f"must be hidden_size {self.hidden_size}"
            )
        if self.visual["output_dim"] != self.hidden_size:
            raise ValueError(
                f"config.json: visual.output_dim {self.visual['output_dim']} must be hidden_size {self.hidden_size}, "
                "because image features take the place of token embeddings"
            )
        if self.visual["image_start_id"] + IMAGE_TOKEN_COUNT > self.vocab_size:
            raise ValueError(
                f"config.json: visual.image_start_id {self.visual['image_start_id']} lies outside vocab_size "
                f"{self.vocab_size}"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' `from_dict`, which a text-only Qwen does not get through.

        Raises:
            CheckpointError: There is no vision tower in it.
        """
        try:
            check_vision(config_dict, kwargs.get("name_or_path") or config_dict.get("_name_or_path"))
        except CheckpointError as error:
            logger.error("%s", error)  # AutoProcessor drops the exception, and says that there is no processor
            raise
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes `config.json`, with the code files of the folder that it came from.

        `auto_map` is written only with the files that it names, without which the folder could not be loaded.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        copy_code_files(self._name_or_path, save_directory)
        if hasattr(self, "auto_map") and not names_code_of(self.auto_map, save_directory):
            del self.auto_map
        super().save_pretrained(save_directory, **kwargs)

    @property
    def image_start_id(self) -> int:
        """Id of `<img>`; `</img>` and `<imgpad>` follow it."""
        return self.visual["image_start_id"]

    @property
    def image_end_id(self) -> int:
        """Id of `</img>`."""
        return self.visual["image_start_id"] + 1

    @property
    def stop_ids(self) -> list[int]:
        """Ids of `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`, with which an answer ends."""
        first = self.visual["image_start_id"] - TOKENS_BEFORE_IMAGES
        return [first, first + 1, first + 2]

    @property
    def used_vocab_size(self) -> int:
        """Number of ids with a token; rows of `lm_head` from here on are unused."""
        return self.visual["image_start_id"] + IMAGE_TOKEN_COUNT

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, with the architecture's released name, which the released code needs."""
        return super().to_dict() | {"architectures": [RELEASED_ARCHITECTURE]}

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the content of `config.json`; the released code reads the dtype as `torch_dtype`."""
        fields = super().to_diff_dict()
        if "dtype" in fields:
            fields["torch_dtype"] = fields["dtype"]
        return fields


AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig)
