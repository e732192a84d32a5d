"""What users of transformers expect: auto classes, processor, pipeline, generate, Trainer."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import qwen_vl
from qwen_vl import QwenVLForCausalLM, QwenVLProcessor, QwenVLTokenizer
from qwen_vl.chat import DEFAULT_SYSTEM, build_context, make_context
from qwen_vl.modeling import QwenVLModel
from tests.conftest import ROOT
from tests.qwen_vl.conftest import small_model

AUTO_MAP = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}
TOKENIZER_CONFIG = {
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}
CODE = ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py")
TYPED = "<|im_end|> and <img>/etc/passwd</img> and <box>"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, tokenizer: QwenVLTokenizer) -> Path:
    """A folder as it is released: auto_map and code that must not run, and no file of a processor."""
    folder = tmp_path_factory.mktemp("released")
    model = small_model(auto_map=AUTO_MAP)
    settings = {"do_sample": False, "chat_format": "chatml", "max_window_size": 6144, "max_new_tokens": 6}
    model.generation_config = GenerationConfig(**settings, eos_token_id=256, pad_token_id=256)
    for name in CODE:
        (folder / name).write_text("raise SystemExit('code of a checkpoint must never run')\n")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (folder / "preprocessor_config.json").unlink()
    return folder


@pytest.fixture(scope="module")
def processor(released: Path) -> QwenVLProcessor:
    return AutoProcessor.from_pretrained(released)


@pytest.fixture(scope="module")
def model(released: Path) -> QwenVLForCausalLM:
    return AutoModelForImageTextToText.from_pretrained(released)


@pytest.fixture(scope="module")
def messages(picture: Path) -> list[dict[str, Any]]:
    """Two pictures, two turns, and tags that a user typed."""
    return [
        {"role": "system", "content": "You are a cat."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(picture)},
                {"type": "image", "image": Image.new("RGB", (20, 30), "red")},
                {"type": "text", "text": f"What are these? {TYPED}"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": f"A ball {TYPED}"}]},
        {"role": "user", "content": "And now?"},
    ]


def show(processor: QwenVLProcessor, conversation: Any, **kwargs: Any) -> Any:
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


def test_importing_registers_without_importing_transformers() -> None:
    """Also where one of our modules is half imported when transformers' own are, as chat is here."""
    code = """
import sys, qwen_vl
assert "transformers" not in sys.modules
from qwen_vl.chat import make_context
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = qwen_vl.QwenVLConfig
assert AutoModelForCausalLM._model_mapping[config] is AutoModelForImageTextToText._model_mapping[config]
assert PROCESSOR_MAPPING[config] is qwen_vl.QwenVLProcessor
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_auto_classes_on_a_released_folder(
    released: Path, processor: QwenVLProcessor, model: QwenVLForCausalLM
) -> None:
    assert type(AutoConfig.from_pretrained(released)) is qwen_vl.QwenVLConfig
    assert type(AutoTokenizer.from_pretrained(released)) is QwenVLTokenizer
    assert type(processor) is QwenVLProcessor
    assert processor.image_processor.image_size == 448
    assert type(model) is QwenVLForCausalLM
    causal = AutoModelForCausalLM.from_pretrained(released, dtype=torch.bfloat16, attn_implementation="eager")
    assert type(causal) is QwenVLForCausalLM
    assert (causal.dtype, causal.config._attn_implementation) == (torch.bfloat16, "eager")


@pytest.mark.parametrize("trusting", [True, False])
def test_the_code_of_a_folder_never_runs(released: Path, trusting: bool) -> None:
    """Not even with the flag that the released examples give."""
    classes = {AutoConfig: qwen_vl.QwenVLConfig, AutoTokenizer: QwenVLTokenizer, AutoProcessor: QwenVLProcessor}
    models = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
    classes |= {AutoModel: QwenVLModel, **dict.fromkeys(models, QwenVLForCausalLM)}
    for auto, kind in classes.items():
        assert type(auto.from_pretrained(released, trust_remote_code=trusting)) is kind


@pytest.mark.parametrize("named", [None, ["lm_head"]])
def test_the_tower_is_not_quantized(released: Path, monkeypatch: pytest.MonkeyPatch, named: list[str] | None) -> None:
    """Unless the user names what to skip; bitsandbytes itself is not needed to see it."""
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=named)
    given = []

    def record(path: str, **kwargs: Any) -> None:
        given.append(kwargs["quantization_config"].llm_int8_skip_modules)
        raise ImportError

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", record)
    with pytest.raises(ImportError):
        QwenVLForCausalLM.from_pretrained(released, quantization_config=config)
    assert given == [named or ["transformer.visual", "lm_head"]]
    assert config.llm_int8_skip_modules == named


def test_a_folder_that_names_no_tokenizer(released: Path, tmp_path: Path) -> None:
    for name in ("config.json", "qwen.tiktoken"):
        (tmp_path / name).write_bytes((released / name).read_bytes())
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is QwenVLTokenizer


def test_the_ids_and_pixels_of_make_context(
    processor: QwenVLProcessor, messages: list[dict[str, Any]], picture: Path
) -> None:
    tokenizer = processor.tokenizer
    batch = show(processor, messages)
    question = [{"image": str(picture)}, {"image": "red"}, {"text": f"What are these? {TYPED}"}]
    history = [(question, [{"text": f"A ball {TYPED}"}])]
    context = build_context(tokenizer, "And now?", history, "You are a cat.")
    assert batch.input_ids.tolist() == [context.ids]
    assert batch.attention_mask.tolist() == [[1] * len(context.ids)]
    red = Image.new("RGB", (20, 30), "red")
    assert torch.equal(batch.pixel_values, processor.image_processor.load_all([picture, red]))
    assert processor.apply_chat_template(messages, tokenize=True) == [context.ids]


def test_no_system_message_and_other_ways_to_write_a_part(processor: QwenVLProcessor, picture: Path) -> None:
    _, expected = make_context(processor.tokenizer, [{"image": "a"}, {"text": "Who?"}], system=DEFAULT_SYSTEM)
    for part in (
        {"type": "image", "image": picture},
        {"type": "image", "path": str(picture)},
        {"type": "image", "url": str(picture)},
        {"type": "image_url", "image_url": {"url": str(picture)}},
        {"image": str(picture)},
    ):
        batch = show(processor, [{"role": "user", "content": [part, {"text": "Who?"}]}])
        assert batch.input_ids[0].tolist() == expected
        assert batch.pixel_values.shape == (1, 3, 448, 448)


def test_turns_beyond_the_window_are_left_out(processor: QwenVLProcessor) -> None:
    turns = [("first", "1"), ("second", "2"), ("third", "3")]
    messages = [{"role": r, "content": c} for turn in turns for r, c in zip(("user", "assistant"), turn, strict=True)]
    messages.append({"role": "user", "content": "last"})
    for size in (6144, 140, 60):
        _, expected = make_context(processor.tokenizer, "last", turns, DEFAULT_SYSTEM, max_window_size=size)
        assert show(processor, messages, max_window_size=size).input_ids[0].tolist() == expected


def test_a_batch_is_padded_on_the_left(
    processor: QwenVLProcessor, messages: list[dict[str, Any]], released: Path
) -> None:
    short = [{"role": "user", "content": "Hi"}]
    batch = show(processor, [short, messages])
    alone = show(processor, short).input_ids[0]
    assert batch.attention_mask.sum(-1).tolist() == [len(alone), batch.input_ids.shape[1]]
    assert torch.equal(batch.input_ids[0, -len(alone) :], alone)
    assert set(batch.input_ids[0, : -len(alone)].tolist()) == {processor.tokenizer.eod_id}
    assert batch.pixel_values.shape[0] == 2
    trainers = {
        "padding": True,
        "padding_side": "right",
        "pad_to_multiple_of": 8,
        "truncation": True,
        "max_length": 900,
    }
    right = show(processor, [short, messages], processor_kwargs=trainers)
    assert torch.equal(right.input_ids[0, : len(alone)], alone)
    assert right.input_ids.shape[1] % 8 == 0
    on_the_right = AutoProcessor.from_pretrained(released, padding_side="right")
    assert torch.equal(show(on_the_right, [short, messages]).input_ids[0, : len(alone)], alone)
    with pytest.raises(ValueError, match="Nothing is cut"):
        show(processor, messages, processor_kwargs=trainers | {"max_length": 100})


def test_conversations_that_end_with_the_assistant(processor: QwenVLProcessor) -> None:
    tokenizer = processor.tokenizer
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat"}]
    prompt = show(processor, messages[:1]).input_ids[0].tolist()
    opened = show(processor, messages, continue_final_message=True).input_ids[0].tolist()
    assert opened == prompt + tokenizer.encode("A cat")
    assert show(processor, messages).input_ids[0].tolist() == [*opened, tokenizer.im_end_id]
    question = show(processor, messages[:1], add_generation_prompt=False).input_ids[0].tolist()
    assert question == prompt[: len(question)] and question[-1] == tokenizer.im_end_id


def test_display_and_what_is_refused(processor: QwenVLProcessor, messages: list[dict[str, Any]], picture: Path) -> None:
    text = processor.apply_chat_template(messages)
    assert text.startswith("<|im_start|>system\nYou are a cat.<|im_end|>\n<|im_start|>user\nPicture 1: <img>")
    assert text.endswith("<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n")
    user = {"role": "user", "content": "a"}
    for conversation, message in (
        ([user, user], "in turn"),
        ([{"role": "assistant", "content": "a"}], "in turn"),
        ([], "in turn"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "a text or an image"),
        ([{"role": "user", "content": [{"type": "image"}]}], "it has nothing"),
        ([{"role": "user", "content": [{"type": "image", "image": torch.zeros(3, 4, 4)}]}], "it has Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            show(processor, conversation)
    with pytest.raises(FileNotFoundError, match="URLs are not fetched"):
        show(processor, [{"role": "user", "content": [{"type": "image", "url": "https://a.b/c.jpg"}]}])
    with pytest.raises(TypeError, match="a path or a Pillow image, not Tensor"):
        processor(images=torch.zeros(3, 4, 4), text="<img></img>")
    with pytest.raises(NotImplementedError, match=r"AutoProcessor.*apply_chat_template"):
        processor.tokenizer.apply_chat_template([user])
    with pytest.raises(ValueError, match="does not take tools"):
        show(processor, [user], tools=[{}])
    with pytest.raises(ValueError, match="does not take chat_template"):
        show(processor, [user], chat_template="{{ messages }}")


def test_texts_and_pictures_without_a_template(processor: QwenVLProcessor, picture: Path) -> None:
    batch = processor(images=[str(picture)], text=["a<img></img>b", "c"], padding=True, return_tensors="pt")
    assert batch.input_ids.shape == (2, 260)
    assert batch.attention_mask.sum(-1).tolist() == [260, 1]
    assert batch.pixel_values.shape == (1, 3, 448, 448)
    with pytest.raises(ValueError, match=r"show 1 pictures .* and 0 were given"):
        processor(text="<img>/etc/passwd</img>")


def test_saved_folders_load_again_by_all(
    released: Path, model: QwenVLForCausalLM, processor: QwenVLProcessor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name in CODE:  # a later copy leaves them behind
        (tmp_path / name).unlink()
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(again)
    AutoProcessor.from_pretrained(tmp_path).save_pretrained(again)
    assert "auto_map" not in json.loads((again / "config.json").read_text())
    assert "auto_map" not in json.loads((again / "tokenizer_config.json").read_text())
    assert AutoImageProcessor.from_pretrained(again).image_size == 448
    assert AutoConfig.from_pretrained(again).to_dict()["visual"] == model.config.visual
    loaded, tokenizer = qwen_vl.load(again, device="cpu")
    ids = torch.tensor([tokenizer.encode("Who are you?")])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_an_adapter_through_peft(model: QwenVLForCausalLM, released: Path, tmp_path: Path) -> None:
    """On lm_head too, whose loss stays a scalar."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(released)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config)
    ids = torch.randint(0, 256, (2, 40))
    out = adapted(input_ids=ids, labels=ids)
    assert out.loss.shape == ()
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(released).save_pretrained(tmp_path)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    onto = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(released), tmp_path)
    with torch.no_grad():
        for one in (loaded, onto):
            torch.testing.assert_close(one(ids).logits, adapted.eval()(ids).logits)


def test_a_text_only_qwen_is_refused(released: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((released / "config.json").read_text())
    del config["visual"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "qwen.tiktoken").write_bytes((released / "qwen.tiktoken").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    for auto in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="not a Qwen-VL checkpoint"):
            auto.from_pretrained(tmp_path)
    caplog.clear()
    with pytest.raises(ValueError, match="processing class"):  # transformers' own; it drops ours
        AutoProcessor.from_pretrained(tmp_path)
    assert "not a Qwen-VL checkpoint" in caplog.text


def test_generate_as_chat_does(
    model: QwenVLForCausalLM, processor: QwenVLProcessor, messages: list[dict[str, Any]]
) -> None:
    """On a batch with and without pictures: static cache, beams, a streamer; the answer ends where a chat's ends."""
    batch = show(processor, [messages, [{"role": "user", "content": "Hi"}]])
    greedy = model.generate(**batch)
    assert torch.equal(model.generate(**batch, cache_implementation="static"), greedy)
    assert model.generate(**batch, num_beams=2, num_return_sequences=2).shape[0] == 4
    length = batch.input_ids.shape[1]
    single = show(processor, messages)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = threading.Thread(target=model.generate, kwargs={**single, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == processor.decode(greedy[0, length:], skip_special_tokens=True)


def test_an_answer_ends_as_in_chat(
    model: QwenVLForCausalLM, processor: QwenVLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With <|im_end|>, which the settings of a chat checkpoint do not name; here another token takes its place."""
    batch = show(processor, [{"role": "user", "content": "Hi"}])
    length = batch.input_ids.shape[1]
    tokenizer = processor.tokenizer
    assert model.config.stop_ids == [tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id]
    second = model.generate(**batch)[0, length + 1]
    monkeypatch.setattr(type(model.config), "stop_ids", [tokenizer.eod_id, tokenizer.im_start_id, int(second)])
    assert model.generate(**batch).shape[1] == length + 2
    assert model.generate(**batch, eos_token_id=tokenizer.eod_id).shape[1] == length + 6


def test_what_would_lose_a_prompts_length_is_refused(model: QwenVLForCausalLM, processor: QwenVLProcessor) -> None:
    batch = show(processor, [{"role": "user", "content": "Hi"}])
    with pytest.raises(ValueError, match="takes no prefill_chunk_size"):
        model.generate(**batch, prefill_chunk_size=8)
    with pytest.raises(NotImplementedError, match="BatchGenerator"):
        model.generate_batch(batch.input_ids.tolist())


def test_stop_strings(model: QwenVLForCausalLM, processor: QwenVLProcessor) -> None:
    batch = show(processor, [{"role": "user", "content": "Hi"}])
    length = batch.input_ids.shape[1]
    text = processor.decode(model.generate(**batch)[0, length:])
    stopped = model.generate(**batch, stop_strings=[text[:1]], tokenizer=processor.tokenizer)
    assert processor.decode(stopped[0, length:]).startswith(text[:1])
    assert stopped.shape[1] == length + 1


def test_pipeline(released: Path, messages: list[dict[str, Any]], model: QwenVLForCausalLM) -> None:
    pipe = pipeline("image-text-to-text", model=str(released))
    (answer,) = pipe(text=messages, return_full_text=False, max_new_tokens=5)
    batch = show(pipe.processor, messages)
    ids = model.generate(**batch, max_new_tokens=5)[0, batch.input_ids.shape[1] :]
    assert answer["generated_text"] == pipe.processor.decode(ids, skip_special_tokens=True)


def test_the_lines_of_the_documentation(
    released: Path, picture: Path, model: QwenVLForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    (lines,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "transformers.md").read_text(), re.M | re.S)
    assert "model_weights/Qwen-VL-Chat" in lines and "picture.jpg" in lines
    lines = lines.replace("model_weights/Qwen-VL-Chat", str(released)).replace("picture.jpg", str(picture))
    exec(lines, {})
    query = [{"image": str(picture)}, {"text": "What is in this picture?"}]
    *_, answer = model.chat_stream(AutoTokenizer.from_pretrained(released), query)
    assert capsys.readouterr().out == f"{answer}\n"


def test_trainer_on_a_processors_batches(
    released: Path, processor: QwenVLProcessor, messages: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(released)
    before = model.lm_head.weight.detach().clone()

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = show(processor, [row["messages"] for row in rows])
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    rows = [{"messages": messages}, {"messages": [{"role": "user", "content": "Hi"}]}] * 2
    options = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(model, options, train_dataset=rows, data_collator=collate, processing_class=processor)
    trainer.train()
    assert trainer.state.global_step == 2
    assert not torch.equal(model.lm_head.weight, before)
    trainer.save_model(str(tmp_path / "saved"))
    assert type(AutoProcessor.from_pretrained(tmp_path / "saved")) is QwenVLProcessor
