"""The Qwen-VL tokenizer: byte-pair ranks from `qwen.tiktoken`, special ids above them, image spans, list format."""

import base64
import binascii
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import tiktoken
import torch
from transformers import BatchEncoding

from qwen_vl.checkpoint import VOCAB_FILE, copy_code_files, read_json_file

CONFIG_FILE = "tokenizer_config.json"

# published: the split pattern and the order of the special tokens decide every id.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VISION_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
IMAGE_TAGS = ("<img>", "</img>", "<imgpad>")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
    *VISION_TAGS,
)
IMAGE_SPAN = 256  # ids between <img> and </img>, one for each output of the resampler

_LIST_FORMAT = re.compile(r"<(img|ref|box|quad)>(.*?)</\1>", re.DOTALL)
_LIST_KEYS = {"img": "image", "ref": "ref", "box": "box", "quad": "quad"}

AllowedSpecial = Literal["all"] | Collection[str]


class QwenVLTokenizer:
    """Text to ids and back, exactly as released, without the transformers tokenizer classes that broke it.

    Args:
        vocab_file: A `.tiktoken` file: one `base64(token) rank` a line, ranks from 0 without a gap.
        config: Contents of `tokenizer_config.json`, kept and saved as they are.
        name_or_path: Where the files came from; code files lying there are carried along by `save_pretrained`.

    Raises:
        FileNotFoundError: There is no such vocabulary.
        ValueError: It is not in the `.tiktoken` format.

    Source: the released `tokenization_qwen.py` (behaviour), DESIGN "What must stay", 1 and 2.
    """

    padding_side = "left"
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, vocab_file: str | Path, config: dict[str, Any] | None = None, name_or_path: str = "") -> None:
        self.vocab_file = Path(vocab_file)
        self.config = dict(config or {})
        self.name_or_path = name_or_path
        ranks = read_ranks(self.vocab_file)
        self.special_tokens = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "Qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self.eod_id = self.eos_token_id = self.pad_token_id = self.special_tokens["<|endoftext|>"]
        self.im_start_id = self.special_tokens["<|im_start|>"]
        self.im_end_id = self.special_tokens["<|im_end|>"]
        self.img_start_id = self.special_tokens["<img>"]
        self.img_end_id = self.special_tokens["</img>"]
        self.img_pad_id = self.special_tokens["<imgpad>"]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "QwenVLTokenizer":
        """The tokenizer of a checkpoint folder (its `.py` files are never run).

        Raises:
            FileNotFoundError: The folder has no `qwen.tiktoken`.
        """
        folder = Path(path)
        config_file = folder / CONFIG_FILE
        config = read_json_file(config_file) if config_file.is_file() else {}
        return cls(folder / VOCAB_FILE, config, str(folder))

    def save_pretrained(self, path: str | Path, **_: Any) -> tuple[str, ...]:
        """Writes the released files to `path`; returns their paths. Further arguments of the Trainer are ignored."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        vocab, config = folder / VOCAB_FILE, folder / CONFIG_FILE
        if vocab.resolve() != self.vocab_file.resolve():
            vocab.write_bytes(self.vocab_file.read_bytes())
        config.write_text(json.dumps(self.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return str(vocab), str(config), *map(str, copy_code_files(self.name_or_path, folder))

    def __len__(self) -> int:
        """Number of ids that mean something: ranks and special tokens."""
        return self.encoding.n_vocab

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        allowed_special: AllowedSpecial = "all",
        padding: bool = False,
        return_tensors: Literal["pt"] | None = None,
    ) -> BatchEncoding:
        """Ids of one text or of several; `padding` adds `<|endoftext|>` on the left with an attention mask of 0.

        Returns:
            `input_ids` and `attention_mask`: lists, nested for several texts, or int64 tensors (B, T).
        """
        single = isinstance(text, str)
        rows = [self.encode(t, allowed_special=allowed_special) for t in ([text] if single else text)]
        masks = [[1] * len(row) for row in rows]
        if padding or (return_tensors and len(rows) > 1):
            longest = max(map(len, rows), default=0)
            masks = [[0] * (longest - len(row)) + mask for row, mask in zip(rows, masks, strict=True)]
            rows = [[self.pad_token_id] * (longest - len(row)) + row for row in rows]
        if return_tensors == "pt":
            return BatchEncoding(
                {"input_ids": torch.tensor(rows, dtype=torch.long), "attention_mask": torch.tensor(masks)}
            )
        return BatchEncoding(
            {"input_ids": rows[0], "attention_mask": masks[0]}
            if single
            else {"input_ids": rows, "attention_mask": masks}
        )

    def encode(self, text: str, *, allowed_special: AllowedSpecial = "all") -> list[int]:
        """Ids of a text, NFC-normalised first; special tokens not in `allowed_special` are plain text.

        Raises:
            ValueError: An `<img>` without its `</img>`, or a path of over 256 UTF-8 bytes between them.
        """
        text = unicodedata.normalize("NFC", text)
        allowed = set(self.special_tokens) if allowed_special == "all" else set(allowed_special)
        ids = self.encoding.encode(text, allowed_special=allowed, disallowed_special=())
        return self._fill_image_spans(ids)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text that nobody vouches for: whatever tags it holds stay text."""
        return self.encode(text, allowed_special=())

    def image_span(self, path: bytes = b"") -> list[int]:
        """The 258 ids of one image. The path inside is only a label: the model never reads it."""
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
            # published: the path's bytes themselves stand as ids, whatever tokens those ids otherwise mean.
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

    def decode(
        self,
        token_ids: int | Iterable[int] | torch.Tensor,
        skip_special_tokens: bool = False,
        errors: str = "replace",
        **_: Any,
    ) -> str:
        """Text of ids. A whole image span gives its path; ids that no token has give U+FFFD.

        Args:
            token_ids: One id, or a flat sequence or tensor of them.
            skip_special_tokens: Leave out all special tokens; an image's path stays.
            errors: What bytes that are not UTF-8 become (`bytes.decode`).
        """
        if isinstance(token_ids, torch.Tensor):
            token_ids = token_ids.flatten().tolist()
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
        """Index of the `</img>` if a whole image span begins at `start`."""
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

    def batch_decode(self, sequences: Iterable[Any], **kwargs: Any) -> list[str]:
        """`decode` of each sequence."""
        return [self.decode(ids, **kwargs) for ids in sequences]

    def from_list_format(self, elements: Sequence[dict[str, Any]]) -> str:
        """One text from elements such as `{"image": "a.jpg"}, {"text": "..."}, {"ref": "dog", "box": (1, 2, 3, 4)}`.

        Raises:
            ValueError: An element of no known kind.
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
        """A text with tags as elements, in order: `text`, `image`, `ref`, `box`, `quad`."""
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


def picture_label(number: int) -> str:
    """What stands before the picture of that number (from 1) in a query."""
    return f"Picture {number}: "


def _as_boxes(box: Sequence[Any]) -> Sequence[Sequence[int]]:
    return box if isinstance(box[0], (list, tuple)) else [box]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to rank from a `.tiktoken` file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line that is not `base64 rank`, or ranks with gaps; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no vocabulary file: {path}\nA Qwen-VL checkpoint has a {VOCAB_FILE} in it; download the folder whole."
        )
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
