"""The released configuration as vLLM needs it."""

from typing import Any, ClassVar

from qwen_vl.configuration import QwenVLConfig

TOKENIZER_MODE = "qwen_vl"


class QwenVLServingConfig(QwenVLConfig):
    """`QwenVLConfig` in which no length but `max_position_embeddings` limits a prompt.

    vLLM takes the smallest of all lengths of a config as its limit: the released `seq_length`, from which dynamic NTK
    and log-n attention begin, is called `trained_length` here.

    Args:
        trained_length: The released `seq_length`, in tokens.
        rope_parameters: Makes vLLM ask the model for positions; the model computes the rotation itself.
        prompt_ending: The last ids of each prompt; from the tokenizer, at start-up.
        stop_tokens: Ids that end an answer, also from the tokenizer; the released settings have only the first.
    """

    ignore_keys_at_rope_validation: ClassVar[set[str]] = {"mrope_section"}

    trained_length: int | None = None
    rope_parameters: dict | None = None
    prompt_ending: list | None = None
    stop_tokens: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.trained_length is None:
            self.trained_length = self.seq_length
            self.seq_length = self.max_position_embeddings
        self.rope_parameters = {
            "rope_type": "default",
            "rope_theta": float(self.rotary_emb_base),
            "mrope_section": [self.kv_channels // 2],
        }
        super().__post_init__(**kwargs)
