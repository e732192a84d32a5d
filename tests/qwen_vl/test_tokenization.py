"""The tokenizer against the released one's numbers, and against input that it must refuse or survive."""

import base64
import json
from pathlib import Path

import pytest
import torch

from qwen_vl.special_tokens import SPECIAL_TOKENS, VISION_TAGS
from qwen_vl.tokenization import QwenVLTokenizer


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict:
    return json.loads((shared / "golden" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def released(shared: Path) -> QwenVLTokenizer:
    return QwenVLTokenizer.from_pretrained(shared / "qwen_vl_chat")


@pytest.fixture
def byte_vocab(tmp_path: Path) -> Path:
    """A folder whose vocabulary is the 256 bytes and a few pairs."""
    tokens = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello"]
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(tokens)]
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path


@pytest.fixture
def small(byte_vocab: Path) -> QwenVLTokenizer:
    return QwenVLTokenizer.from_pretrained(byte_vocab)


def test_special_ids(golden: dict, released: QwenVLTokenizer) -> None:
    names = {"eod": "eod_id", "im_start": "im_start_id", "im_end": "im_end_id"}
    names |= {"img_start": "img_start_id", "img_end": "img_end_id", "img_pad": "img_pad_id"}
    assert {name: getattr(released, attribute) for name, attribute in names.items()} == {
        name: golden["special"][name] for name in names
    }
    assert len(released) == golden["special"]["n_vocab"]


def test_encode_and_decode(golden: dict, released: QwenVLTokenizer) -> None:
    for case in golden["encode"]:
        assert released(case["text"]).input_ids == case["ids"]
        assert released.encode(case["text"], allowed_special=VISION_TAGS) == case["ids_no_special"]
        assert released.decode(case["ids"]) == case["decode"]
        assert released.decode(torch.tensor(case["ids"]), skip_special_tokens=True) == case["decode_skip"]


def test_list_format(golden: dict, released: QwenVLTokenizer) -> None:
    for case in golden["from_list_format"]:
        assert released.from_list_format(case["elements"]) == case["text"]
    for case in golden["to_list_format"]:
        assert released.to_list_format(case["text"]) == case["elements"]


def test_special_tokens_start_at_the_number_of_ranks(small: QwenVLTokenizer) -> None:
    assert small.eod_id == 260
    assert small.img_start_id == 260 + 214
    assert len(small) == 260 + len(SPECIAL_TOKENS)
    assert small.encode("hello<|im_end|>") == [259, small.im_end_id]


def test_plain_text_has_no_tags(small: QwenVLTokenizer) -> None:
    text = "<img>/etc/passwd</img><|im_end|><|endoftext|><imgpad>"
    ids = small.encode_plain(text)
    assert max(ids) < small.eod_id
    assert small.decode(ids) == text


def test_image_span_is_258_ids_with_the_path_as_bytes(small: QwenVLTokenizer) -> None:
    ids = small.encode("a<img>é.png</img>b")
    assert len(ids) == 2 + 258
    assert ids[1] == small.img_start_id
    assert ids[2:8] == list("é.png".encode())
    assert ids[8:258] == [small.img_pad_id] * 250
    assert small.decode(ids) == "a<img>é.png</img>b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("look <img>a.png", "Unclosed image token"),
        ("</img> then <img>a.png", "Unclosed image token"),
        ("<img>" + "x" * 257 + "</img>", "257 UTF-8 bytes, at most 256"),
        ("<img>" + "图" * 86 + "</img>", "258 UTF-8 bytes, at most 256"),
    ],
)
def test_broken_image_tags_are_refused(small: QwenVLTokenizer, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small.encode(text)


def test_path_of_256_bytes_fits(small: QwenVLTokenizer) -> None:
    ids = small.encode("<img>" + "x" * 256 + "</img>")
    assert small.img_pad_id not in ids
    assert len(ids) == 258


def test_decode_survives_anything(small: QwenVLTokenizer) -> None:
    unused = len(small) + 5
    assert small.decode([unused, 259, -1]) == "\ufffdhello\ufffd"
    assert small.decode([small.img_start_id, 259]) == "<img>hello"
    assert small.decode([small.img_start_id, 259], skip_special_tokens=True) == "hello"
    assert small.decode([0xE5, 0x9B], errors="ignore") == ""


def test_padding_is_on_the_left(small: QwenVLTokenizer) -> None:
    batch = small(["hello", "hellohello"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[small.eod_id, 259], [259, 259]]
    assert batch.attention_mask.tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("extra", [{}, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}])
def test_save_and_load(byte_vocab: Path, tmp_path: Path, extra: dict) -> None:
    config = {
        "model_max_length": 8192,
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (byte_vocab / "tokenizer_config.json").write_text(json.dumps(config | extra))
    (byte_vocab / "tokenization_qwen.py").write_text("raise SystemExit('this must never run')\n")
    out = tmp_path / "saved" / "twice"
    for target in (tmp_path / "saved", out):
        QwenVLTokenizer.from_pretrained(byte_vocab if target != out else out.parent).save_pretrained(target)
    again = QwenVLTokenizer.from_pretrained(out)
    assert again.encode("hello <|im_end|>") == QwenVLTokenizer.from_pretrained(byte_vocab).encode("hello <|im_end|>")
    assert json.loads((out / "tokenizer_config.json").read_text()) == config | extra
    assert (out / "tokenization_qwen.py").read_bytes() == (byte_vocab / "tokenization_qwen.py").read_bytes()
    for folder in (byte_vocab, out):
        (folder / "tokenization_qwen.py").unlink()
    again.save_pretrained(out)
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())


def test_settings_survive_a_round_trip(byte_vocab: Path, tmp_path: Path) -> None:
    tokenizer = QwenVLTokenizer.from_pretrained(byte_vocab, padding_side="right", model_max_length=64)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = QwenVLTokenizer.from_pretrained(tmp_path / "saved")
    assert (again.padding_side, again.model_max_length, again.eos_token_id) == ("right", 64, again.im_end_id)
    assert again.pad_token_id == again.eod_id


def test_as_a_tokenizer_of_transformers(small: QwenVLTokenizer) -> None:
    batch = small(["hello<|im_end|>", "a"], padding="max_length", max_length=3, return_tensors="pt")
    assert batch.input_ids.tolist() == [[small.eod_id, 259, small.im_end_id], [small.eod_id, small.eod_id, 97]]
    assert small("hello" * 9, truncation=True, max_length=2).input_ids == [259, 259]
    assert small("<|im_end|>", split_special_tokens=True).input_ids == small.encode_plain("<|im_end|>")
    text = "é hello<|im_end|>"
    assert small.convert_tokens_to_ids(small.tokenize(text)) == small.encode(text)
    assert small.convert_tokens_to_string(small.convert_ids_to_tokens(small.encode(text))) == text
    assert small.decode([[259], [97]]) == small.batch_decode([[259], [97]]) == ["hello", "a"]
    vocabulary = small.get_vocab()
    assert len(vocabulary) == len(small) == small.vocab_size
    assert set(small.all_special_ids) == set(range(small.eod_id, len(small)))
    assert small.add_special_tokens({"eos_token": "<|im_end|>"}) == 0
    with pytest.raises(ValueError, match="no token can be added"):
        small.add_tokens(["<new>"])


def test_missing_or_damaged_vocabulary(tmp_path: Path, byte_vocab: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"qwen\.tiktoken"):
        QwenVLTokenizer.from_pretrained(tmp_path / "nowhere")
    vocab = byte_vocab / "qwen.tiktoken"
    whole = vocab.read_bytes()
    vocab.write_bytes(whole + b"!!! 260\n")
    with pytest.raises(ValueError, match="line 261"):
        QwenVLTokenizer.from_pretrained(byte_vocab)
    vocab.write_bytes(whole[:900])
    with pytest.raises(ValueError, match="damaged"):
        QwenVLTokenizer.from_pretrained(byte_vocab)


def test_unknown_element(small: QwenVLTokenizer) -> None:
    with pytest.raises(ValueError, match="unsupported element"):
        small.from_list_format([{"video": "a.mp4"}])
