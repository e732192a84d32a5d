"""The project's tokenizer with the methods that vLLM calls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import BatchEncoding

from qwen_vl import QwenVLTokenizer


class ServingTokenizer:
    """vLLM's tokenizer protocol over `QwenVLTokenizer`.

    Text is encoded as plain text: nothing in it is a tag. A token's string keeps bytes that are no UTF-8 by themselves
    as surrogates, so that joined tokens decode as the ids would.

    Args:
        tokenizer: The checkpoint's.
    """

    is_fast = True  # as far as vLLM cares: no blanks between special tokens
    truncation_side = "left"

    def __init__(self, tokenizer: QwenVLTokenizer, name_or_path: str) -> None:
        self.tokenizer = tokenizer
        self.name_or_path = name_or_path
        self.eos_token_id = self.bos_token_id = self.pad_token_id = tokenizer.eod_id
        # Left out of an answer's text. <ref> and <box> stay, as in `chat()`.
        self.all_special_ids = [tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id]
        self.all_special_tokens = [tokenizer.decode([i]) for i in self.all_special_ids]
        self.vocab_size = len(tokenizer)
        self.max_token_id = self.vocab_size - 1
        self.max_chars_per_token = max(len(token) for token in self.get_vocab())

    @classmethod
    def from_pretrained(cls, path: str | Path, *_: Any, **__: Any) -> "ServingTokenizer":
        """Returns the tokenizer of a checkpoint folder."""
        return cls(QwenVLTokenizer.from_pretrained(path), str(path))

    def __len__(self) -> int:
        return self.vocab_size

    def num_special_tokens_to_add(self) -> int:
        return 0

    def __call__(self, text: str | list[str], text_pair: str | None = None, **kwargs: Any) -> BatchEncoding:
        rows = [self.encode(t, **kwargs) for t in ([text] if isinstance(text, str) else text)]
        return BatchEncoding({"input_ids": rows[0] if isinstance(text, str) else rows})

    def encode(self, text: str, truncation: bool | None = None, max_length: int | None = None, **_: Any) -> list[int]:
        ids = self.tokenizer.encode_plain(text)
        return ids[-max_length:] if truncation and max_length else ids

    def decode(self, ids: Sequence[int] | int, skip_special_tokens: bool = False) -> str:
        ids = [ids] if isinstance(ids, int) else ids
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens))

    def convert_ids_to_tokens(self, ids: Sequence[int], skip_special_tokens: bool = False) -> list[str]:
        left_out = self.all_special_ids if skip_special_tokens else ()
        return self.tokenizer.convert_ids_to_tokens([i for i in ids if i not in left_out])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.tokenizer.convert_tokens_to_string(tokens)

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> Any:
        return self.tokenizer.convert_tokens_to_ids(tokens)

    def get_vocab(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def apply_chat_template(self, *_: Any, **__: Any) -> list[int]:
        raise NotImplementedError("Qwen-VL has no chat template; vLLM renders messages with qwen_vl's own contexts.")
