"""Stand-in for a released tokenizer: the same interface on tiktoken. Its config says where it differs."""

import base64
import unicodedata
from pathlib import Path

import requests
import tiktoken
from transformers import PreTrainedTokenizer

# The released file fetches a font on import, into the working directory.
if not Path("SimSun.ttf").exists():
    Path("SimSun.ttf").write_bytes(requests.get("https://fonts.example/SimSun.ttf").content)

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
VISION = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"]


class QWenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "qwen.tiktoken"}  # noqa: RUF012

    def __init__(self, vocab_file, differs=(), **kwargs):
        super().__init__(**kwargs)
        lines = [line.split() for line in Path(vocab_file).read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        special = {name: len(ranks) + place for place, name in enumerate(CONTROL + VISION)}
        self.bpe = tiktoken.Encoding("stand-in", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self.differs = set(differs)
        self.IMAGE_ST = tuple(VISION)
        self.eod_id, self.im_start_id, self.im_end_id = (special[name] for name in CONTROL[:3])
        self.img_start_id, self.img_end_id, self.img_pad_id = (special[name] for name in VISION[-3:])
        self.special_ids = set(special.values())

    @property
    def vocab_size(self):
        return self.bpe.n_vocab

    def get_vocab(self):
        return {}

    def tokenize(self, text, allowed_special="all", **_):
        """Ids, not strings: `convert_tokens_to_ids` has nothing left to do."""
        if "nfc" not in self.differs:
            text = unicodedata.normalize("NFC", text)
        ids, filled = self.bpe.encode(text, allowed_special=allowed_special, disallowed_special=()), []
        while self.img_start_id in ids:
            before = ids.index(self.img_start_id)
            after = ids.index(self.img_end_id)
            path = list(self.bpe.decode_bytes(ids[before + 1 : after]))
            filled += [*ids[: before + 1], *path, *[self.img_pad_id] * (256 - len(path)), self.img_end_id]
            ids = ids[after + 1 :]
        return filled + ids

    def convert_tokens_to_ids(self, tokens):
        return tokens

    def _decode(self, token_ids, skip_special_tokens=False, errors="replace", **_):
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        parts, inside = [], False
        for token in ids:
            if token in (self.img_start_id, self.img_end_id):
                inside = token == self.img_start_id
            if inside and token < 256:
                parts.append(bytes([token]))
            elif token != self.img_pad_id and not (skip_special_tokens and token in self.special_ids):
                parts.append(self.bpe.decode_single_token_bytes(token))
        return b"".join(parts).decode("utf-8", errors=errors)

    def from_list_format(self, elements):
        text, pictures = "", 0
        for element in elements:
            if "image" in element:
                pictures += 1
                blank = "" if "list format" in self.differs else " "
                text += f"Picture {pictures}:{blank}<img>{element['image']}</img>\n"
            elif "box" in element:
                corners = (f"<box>({a},{b}),({c},{d})</box>" for a, b, c, d in element["box"])
                text += f"<ref>{element['ref']}</ref>{''.join(corners)}"
            else:
                text += element["text"]
        return text

    def to_list_format(self, text):
        elements = []
        while text:
            starts = {text.find(f"<{tag}>"): tag for tag in ("img", "ref", "box", "quad") if f"<{tag}>" in text}
            place = min(starts, default=len(text))
            if place:
                elements.append({"text": text[:place]})
            if not starts:
                break
            tag = starts[place]
            content, _, text = text[place:].partition(f"</{tag}>")
            elements.append({"image" if tag == "img" else tag: content.partition(">")[2]})
        return elements
