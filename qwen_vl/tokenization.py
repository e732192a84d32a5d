"""The Qwen-VL tokenizer: byte-pair ranks from `qwen.tiktoken`, special ids above them, image spans, list format."""

import base64
import binascii
import json
import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import tiktoken
from transformers import PreTrainedTokenizer
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from qwen_vl.checkpoint import (
    VOCAB_FILE,
    MissingFilesError,
    check_vision,
    copy_code_files,
    names_code_of,
    read_json_file,
)
from qwen_vl.configuration import RELEASED_TOKENIZER
from qwen_vl.special_tokens import IMAGE_SPAN, SPECIAL_TOKENS

CONFIG_FILE = "tokenizer_config.json"

# published: the split pattern and the order of the special tokens decide every id.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LIST_FORMAT = re.compile(r"<(img|ref|box|quad)>(.*?)</\1>", re.DOTALL)
_LIST_KEYS = {"img": "image", "ref": "ref", "box": "box", "quad": "quad"}

AllowedSpecial = Literal["all"] | Collection[str]


class QwenVLTokenizer(PreTrainedTokenizer):
    """Text to ids and back exactly as released, on transformers' own base class.

    A token's string is its bytes read as UTF-8; bytes that are not UTF-8 by themselves become surrogates
    (`surrogateescape`).

    Args:
        vocab_file: A `.tiktoken` file: one `base64(token) rank` a line, ranks from 0 without a gap.
        **config: Contents of `tokenizer_config.json`, which are saved again unchanged.

    Raises:
        FileNotFoundError: There is no such vocabulary.
        ValueError: It is not in the `.tiktoken` format.

    Source: the released `tokenization_qwen.py` (behaviour).
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": VOCAB_FILE}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str | Path, **config: Any) -> None:
        self.vocab_file = Path(vocab_file)
        ranks = read_ranks(self.vocab_file)
        self.special_tokens = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "Qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self._ids = {_as_text(token): i for token, i in ranks.items()} | self.special_tokens
        self._tokens = {i: token for token, i in self._ids.items()}
        self.eod_id = self.special_tokens["<|endoftext|>"]
        self.im_start_id = self.special_tokens["<|im_start|>"]
        self.im_end_id = self.special_tokens["<|im_end|>"]
        self.img_start_id = self.special_tokens["<img>"]
        self.img_end_id = self.special_tokens["</img>"]
        self.img_pad_id = self.special_tokens["<imgpad>"]
        self._saved = {key: value for key, value in config.items() if key not in _DERIVED}
        for key in _DERIVED:
            config.pop(key, None)
        for key in ("eos_token", "pad_token"):
            config[key] = config.get(key) or "<|endoftext|>"
        super().__init__(extra_special_tokens=list(SPECIAL_TOKENS[1:]), **config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> "QwenVLTokenizer":
        """Returns the tokenizer of a checkpoint folder (its `.py` files are never run).

        Raises:
            FileNotFoundError: The folder has no `qwen.tiktoken`.
            ValueError: A file of it is damaged, or it is a text-only Qwen's.
        """
        name, folder = str(pretrained_model_name_or_path), Path(pretrained_model_name_or_path)
        if folder.is_dir() and not kwargs.get("subfolder"):
            if not (folder / VOCAB_FILE).is_file():
                raise _no_vocabulary(folder / VOCAB_FILE)
            if (folder / CONFIG_FILE).is_file():
                read_json_file(folder / CONFIG_FILE)
            if (folder / "config.json").is_file():
                check_vision(read_json_file(folder / "config.json"), folder)
        elif not folder.is_dir() and name.count("/") != 1:  # no owner/name of a hub
            raise _no_vocabulary(folder / VOCAB_FILE)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _save_pretrained(
        self,
        save_directory: str | Path,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Writes the vocabulary and the code files, and `tokenizer_config.json` as the released code reads it.

        `file_names` begin with the one that transformers has written, which holds much that follows from the class.
        """
        code = copy_code_files(self.name_or_path, save_directory)
        config_file = Path(file_names[0])
        config = {key: value for key, value in read_json_file(config_file).items() if key not in _DERIVED}
        for key in ("eos_token", "pad_token"):
            if config.get(key) == "<|endoftext|>" and key not in self._saved:
                del config[key]
        if config.get("model_max_length") == VERY_LARGE_INTEGER:
            del config["model_max_length"]
        if "auto_map" in config and not names_code_of(config["auto_map"], save_directory):
            del config["auto_map"]  # it could not be loaded
        config["tokenizer_class"] = RELEASED_TOKENIZER
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return (*file_names, *self.save_vocabulary(str(save_directory), filename_prefix), *map(str, code))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes `qwen.tiktoken`."""
        target = Path(save_directory) / (f"{filename_prefix}-{VOCAB_FILE}" if filename_prefix else VOCAB_FILE)
        if target.resolve() != self.vocab_file.resolve():
            target.write_bytes(self.vocab_file.read_bytes())
        return (str(target),)

    def __len__(self) -> int:
        """Returns the number of used ids: ranks and special tokens."""
        return self.encoding.n_vocab

    @property
    def vocab_size(self) -> int:
        """As `len()`: every special token is a part of the vocabulary."""
        return len(self)

    def get_vocab(self) -> dict[str, int]:
        """Returns the ids by token."""
        return dict(self._ids)

    def _add_tokens(self, new_tokens: Sequence[Any], special_tokens: bool = False) -> int:
        if unknown := [str(token) for token in new_tokens if str(token) not in self._ids]:
            raise ValueError(
                f"no token can be added to Qwen-VL's vocabulary: {unknown[:5]}. Use some of <|extra_0|> to "
                "<|extra_204|>, which nothing else uses."
            )
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def tokenize(
        self,
        text: str,
        *_: Any,
        allowed_special: AllowedSpecial = "all",
        split_special_tokens: bool = False,
        **__: Any,
    ) -> list[str]:
        """Returns the tokens of a text. The arguments are those of `encode`; `split_special_tokens` allows none."""
        ids = self.encode(text, allowed_special=() if split_special_tokens else allowed_special)
        return [self._tokens[i] for i in ids]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens.get(index, "\ufffd")

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Returns the text of tokens."""
        return "".join(tokens).encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")

    def encode(self, text: Any, *args: Any, allowed_special: AllowedSpecial = "all", **kwargs: Any) -> list[int]:
        """Returns the ids of a text, NFC-normalised first; special tokens not in `allowed_special` are plain text.

        Further arguments are those of transformers' `encode`.

        Raises:
            ValueError: An `<img>` without its `</img>`, or a path of over 256 UTF-8 bytes between them.
        """
        if args or kwargs or not isinstance(text, str):
            return super().encode(text, *args, allowed_special=allowed_special, **kwargs)
        text = unicodedata.normalize("NFC", text)
        allowed = set(self.special_tokens) if allowed_special == "all" else set(allowed_special)
        ids = self.encoding.encode(text, allowed_special=allowed, disallowed_special=())
        return self._fill_image_spans(ids)

    def apply_chat_template(self, *_: Any, **__: Any) -> Any:
        """Not offered: a template of text would let what a user typed be read as tags.

        Raises:
            NotImplementedError: Always; says what makes a chat's ids.
        """
        raise NotImplementedError(
            "Qwen-VL's tokenizer has no chat template. Use AutoProcessor.from_pretrained(path).apply_chat_template, "
            'pipeline("image-text-to-text") or qwen_vl.chat.make_context.'
        )

    def encode_plain(self, text: str) -> list[int]:
        """Returns the ids of untrusted text: tags in it stay text."""
        return self.encode(text, allowed_special=())

    def image_span(self, path: bytes = b"") -> list[int]:
        """Returns the 258 ids of one image. The path inside is only a label: the model never reads it."""
        return [self.img_start_id, *path, *[self.img_pad_id] * (IMAGE_SPAN - len(path)), self.img_end_id]

    def _fill_image_spans(self, ids: list[int]) -> list[int]:
        if self.img_start_id not in ids:
            return ids
        out: list[int] = []
        rest = 0
        while self.img_start_id in ids[rest:]:
            start = ids.index(self.img_start_id, rest)
            if self.img_end_id not in ids[start:]:
                raise ValueError(
                    "Unclosed image token: the text has an <img> without a </img> after it, near "
                    f"{self.encoding.decode(ids[start : start + 24])!r}. Close the tag, or pass the text as a list "
                    'element {"text": ...}, where tags are plain text.'
                )
            end = ids.index(self.img_end_id, start)
            # published: the path's bytes are used as ids, whatever tokens these ids otherwise mean.
            path = self.encoding.decode_bytes(ids[start + 1 : end])
            if len(path) > IMAGE_SPAN:
                raise ValueError(
                    f"The content in <img>..</img> is too long: {len(path)} UTF-8 bytes, at most {IMAGE_SPAN} fit "
                    f"({path[:60].decode(errors='replace')!r}...). Use a shorter path, or pass the image as a list "
                    'element {"image": path}, which takes any length.'
                )
            out += ids[rest:start] + self.image_span(path)
            rest = end + 1
        return out + ids[rest:]

    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str = "replace",
        **_: Any,
    ) -> str:
        """Returns the text of ids, for `decode`. A whole image span gives its path; ids that no token has give U+FFFD.

        Args:
            token_ids: One id, or a flat sequence of them.
            skip_special_tokens: Leave out all special tokens; an image's path stays.
            clean_up_tokenization_spaces: Not used: the text is the tokens' bytes.
            errors: Treatment of bytes that are not UTF-8 (`bytes.decode`).
        """
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors=errors)

    def decode_bytes(self, ids: list[int], skip_special_tokens: bool = False) -> bytes:
        """`decode`, before the bytes become text: the last character may be incomplete."""
        pieces: list[bytes] = []
        i = 0
        while i < len(ids):
            if (end := self._span_end(ids, i)) is not None:
                path = bytes(b for b in ids[i + 1 : end] if b != self.img_pad_id)
                pieces.append(path if skip_special_tokens else b"<img>" + path + b"</img>")
                i = end + 1
                continue
            pieces.append(self._token_bytes(ids[i], skip_special_tokens))
            i += 1
        return b"".join(pieces)

    def _span_end(self, ids: list[int], start: int) -> int | None:
        """Returns the index of the `</img>` if a whole image span begins at `start`."""
        end = start + IMAGE_SPAN + 1
        if ids[start] != self.img_start_id or end >= len(ids) or ids[end] != self.img_end_id:
            return None
        return end if all(0 <= b < 256 or b == self.img_pad_id for b in ids[start + 1 : end]) else None

    def _token_bytes(self, token: int, skip_special: bool) -> bytes:
        if not 0 <= token < len(self):
            return "\ufffd".encode()
        if skip_special and token >= self.eod_id:
            return b""
        return self.encoding.decode_single_token_bytes(token)

    def from_list_format(self, elements: Sequence[dict[str, Any]]) -> str:
        """Returns a text from elements like `{"image": "a.jpg"}, {"text": "…"}, {"ref": "dog", "box": (1, 2, 3, 4)}`.

        Raises:
            ValueError: An element has an unknown kind.
        """
        text, pictures = "", 0
        for element in elements:
            if "image" in element:
                pictures += 1
                # published: "Picture 1: <img>...", with the blank, and a newline after it.
                text += f"{picture_label(pictures)}<img>{element['image']}</img>\n"
            elif "text" in element:
                text += element["text"]
            elif "box" in element:
                if "ref" in element:
                    text += f"<ref>{element['ref']}</ref>"
                text += "".join(f"<box>({a},{b}),({c},{d})</box>" for a, b, c, d in _as_boxes(element["box"]))
            else:
                raise ValueError(f'unsupported element {element!r}: it needs one of the keys "image", "text", "box"')
        return text

    def to_list_format(self, text: str) -> list[dict[str, str]]:
        """Returns a text with tags as elements, in order: `text`, `image`, `ref`, `box`, `quad`."""
        elements: list[dict[str, str]] = []
        rest = 0
        for match in _LIST_FORMAT.finditer(text):
            if match.start() > rest:
                elements.append({"text": text[rest : match.start()]})
            elements.append({_LIST_KEYS[match[1]]: match[2]})
            rest = match.end()
        if rest < len(text):
            elements.append({"text": text[rest:]})
        return elements


# Keys of a tokenizer's settings that follow from the class or from where it was loaded; they are not saved.
_DERIVED = frozenset(
    [
        *("extra_special_tokens", "additional_special_tokens", "added_tokens_decoder", "model_specific_special_tokens"),
        *("is_local", "local_files_only", "backend"),
    ]
)


def _as_text(token: bytes) -> str:
    return token.decode("utf-8", errors="surrogateescape")


def _no_vocabulary(path: Path) -> MissingFilesError:
    fix = f"a Qwen-VL checkpoint has a {VOCAB_FILE} in it: download the complete folder"
    return MissingFilesError("there is no vocabulary file", path, None, fix)


def picture_label(number: int) -> str:
    """Returns the prefix of the picture of that number (from 1) in a query."""
    return f"Picture {number}: "


def _as_boxes(box: Sequence[Any]) -> Sequence[Sequence[int]]:
    return box if isinstance(box[0], (list, tuple)) else [box]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads the rank of each token from a `.tiktoken` file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line that is not `base64 rank`, or ranks with gaps; names the line.
    """
    if not path.is_file():
        raise _no_vocabulary(path)
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"not a line of a .tiktoken vocabulary: {line[:60]!r} in {path}, line {number}. "
                "The file is damaged: download it again."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise ValueError(
            f"the ranks of {path} are not 0 to {len(ranks) - 1} once each, with all 256 bytes among them. "
            "The file is damaged or cut short: download it again."
        )
    return ranks


# By name alone, which the config knows too: for a config's class, `AutoTokenizer.register`, AutoTokenizer would run the
# folder's own code if it is called with trust_remote_code=True, as the released examples do.
REGISTERED_TOKENIZER_CLASSES.update({RELEASED_TOKENIZER: QwenVLTokenizer, QwenVLTokenizer.__name__: QwenVLTokenizer})
