"""ChatML contexts, and a conversation with the model: `chat()` and `chat_stream()`."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from qwen_vl.images import QwenVLImageProcessor
from qwen_vl.sampling_params import MAX_NEW_TOKENS, first
from qwen_vl.special_tokens import IMAGE_TAGS, VISION_TAGS
from qwen_vl.tokenization import QwenVLTokenizer, picture_label

MAX_WINDOW_SIZE = 6144  # tokens
DEFAULT_SYSTEM = "You are a helpful assistant."

Query = str | Sequence[dict[str, Any]]
Turn = tuple[Query, str]

# published: a chat context reads the vision tags alone as special, so a typed <|im_end|> stays text.
_USER_TAGS = frozenset(VISION_TAGS)
# An answer may mark regions (<ref>, <box>) but never shows a picture: its <img> is text, and opens no file.
_ANSWER_TAGS = _USER_TAGS - frozenset(IMAGE_TAGS)


class Context(NamedTuple):
    """A prompt or a part of one: its text, its ids, and the images of its spans in order."""

    text: str
    ids: list[int]
    images: list[Any]


def make_context(
    tokenizer: QwenVLTokenizer,
    query: Query,
    history: Sequence[Turn] | None = None,
    system: Query = "",
    max_window_size: int = MAX_WINDOW_SIZE,
) -> tuple[str, list[int]]:
    """Returns the prompt of a conversation, as released.

    Args:
        tokenizer: The checkpoint's tokenizer.
        query: A text, whose vision tags are read; or elements `{"image": path}` and `{"text": plain}`, for programs:
            their texts are always plain, and their image paths may have any length.
        history: Pairs (query, answer), oldest first.
        system: The system message, a text whose vision tags are read or elements as in `query`.
        max_window_size: Tokens within which system and history must stay; older turns are left out completely.

    Returns:
        The text and its ids.

    Raises:
        ValueError: An image tag is not closed, or an element has an unknown kind.

    Source: the released `make_context` (behaviour).
    """
    context = build_context(tokenizer, query, history, system, max_window_size)
    return context.text, context.ids


def build_context(
    tokenizer: QwenVLTokenizer,
    query: Query,
    history: Sequence[Turn] | None = None,
    system: Query = "",
    max_window_size: int = MAX_WINDOW_SIZE,
    *,
    begin_answer: bool = True,
) -> Context:
    """`make_context`, with the images that the prompt shows; without `begin_answer` it ends after the user's turn."""
    head = _message(tokenizer, "system", _piece(tokenizer, system, _USER_TAGS))
    turns: list[Context] = []
    size = len(head.ids)
    for past in reversed(list(history or ())):
        if not isinstance(past, Sequence) or len(past) != 2:
            raise ValueError(f"a turn of the history is a pair (query, answer), not {past!r}")
        past_query, answer = past
        turn = _join(
            _newline(tokenizer),
            _message(tokenizer, "user", _piece(tokenizer, past_query, _USER_TAGS)),
            _newline(tokenizer),
            _message(tokenizer, "assistant", _piece(tokenizer, answer, _ANSWER_TAGS)),
        )
        # published: the newest turns first, until the next one would reach the window.
        if size + len(turn.ids) >= max_window_size:
            break
        size += len(turn.ids)
        turns.insert(0, turn)
    newline = _newline(tokenizer)
    prompt = _join(head, *turns, newline, _message(tokenizer, "user", _piece(tokenizer, query, _USER_TAGS)))
    if not begin_answer:
        return prompt
    start = Context("<|im_start|>assistant", [tokenizer.im_start_id, *tokenizer.encode_plain("assistant")], [])
    return _join(prompt, newline, start, newline)


def append_answer(tokenizer: QwenVLTokenizer, prompt: Context, answer: Query, *, closed: bool) -> Context:
    """Returns a prompt of `build_context` with its answer, or with the beginning of one if it is not closed."""
    end = Context("<|im_end|>", [tokenizer.im_end_id], [])
    return _join(prompt, _piece(tokenizer, answer, _ANSWER_TAGS), *([end] if closed else []))


def _newline(tokenizer: QwenVLTokenizer) -> Context:
    return Context("\n", tokenizer.encode_plain("\n"), [])


def _join(*pieces: Context) -> Context:
    text = "".join(piece.text for piece in pieces)
    ids = [i for piece in pieces for i in piece.ids]
    return Context(text, ids, [image for piece in pieces for image in piece.images])


def _message(tokenizer: QwenVLTokenizer, role: str, content: Context) -> Context:
    """`<|im_start|>role\\n…<|im_end|>`, role, newline and content tokenized separately."""
    ids = [tokenizer.im_start_id, *tokenizer.encode_plain(role), *tokenizer.encode_plain("\n")]
    ids += [*content.ids, tokenizer.im_end_id]
    return Context(f"<|im_start|>{role}\n{content.text}<|im_end|>", ids, content.images)


def _piece(tokenizer: QwenVLTokenizer, content: Query, tags: frozenset[str]) -> Context:
    if isinstance(content, str):
        images = []
        if "<img>" in tags:
            images = [e["image"] for e in tokenizer.to_list_format(content) if "image" in e]
        ids = tokenizer.encode(content, allowed_special=tags)
        if not ids.count(tokenizer.img_start_id) == ids.count(tokenizer.img_end_id) == len(images):
            raise ValueError(
                f"the image tags of {content[:80]!r} cannot be told apart: there is a </img> without its <img>, or a "
                "picture inside another tag. Write <img>path</img> on its own, or give a list of elements."
            )
        return Context(content, ids, images)
    if not isinstance(content, Sequence):
        raise ValueError(f"a text or a list of elements is needed, not {content!r}")
    return _list_piece(tokenizer, content)


def _list_piece(tokenizer: QwenVLTokenizer, elements: Sequence[dict[str, Any]]) -> Context:
    """Returns a list of elements; text between two images is tokenized in one go, as it would be within one string."""
    ids: list[int] = []
    images: list[Any] = []
    text = pending = ""
    for element in elements:
        if "image" in element:
            images.append(element["image"])
            pending += picture_label(len(images))
            text += f"{picture_label(len(images))}<img>{element['image']}</img>\n"
            ids += tokenizer.encode_plain(pending) + tokenizer.image_span()
            pending = "\n"
        elif "text" in element:
            pending += element["text"]
            text += element["text"]
        else:
            raise ValueError(f'unsupported element {element!r}: a query has {{"image": path}} and {{"text": plain}}')
    return Context(text, ids + tokenizer.encode_plain(pending), images)


def cut_answer(tokenizer: QwenVLTokenizer, ids: Sequence[int]) -> str:
    """Returns the text of an answer's ids.

    published: cut before the first `<|im_end|>` or `<|im_start|>`; where there is none, the last token is dropped,
    whatever it is; then stripped.
    """
    stops = (i for i, token in enumerate(ids) if token in (tokenizer.im_end_id, tokenizer.im_start_id))
    return tokenizer.decode(ids[: next(stops, max(len(ids) - 1, 0))]).strip()


class _StopWhen(StoppingCriteria):
    """Ends generation as soon as the event is set, because nobody reads the stream any more."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class ChatMixin:
    """Conversation for a model with `generate()`; mixed into `QwenVLForCausalLM`."""

    def chat(
        self,
        tokenizer: QwenVLTokenizer,
        query: Query,
        history: Sequence[Turn] | None = None,
        system: Query = DEFAULT_SYSTEM,
        *,
        seed: int | None = None,
        max_window_size: int | None = None,
        **generation_kwargs: Any,
    ) -> tuple[str, list[Turn]]:
        """Answers a query.

        Args:
            tokenizer: The checkpoint's tokenizer.
            query: A text, in which `<img>path</img>` shows a local picture, or a list of elements (`make_context`).
            history: Pairs (query, answer) of the turns before, oldest first; not changed.
            system: The system message; as elements `[{"text": …}]` nothing in it is a tag.
            seed: Sampling then depends on this alone, and the global random state is unchanged.
            max_window_size: Tokens that system and history may take; by default the checkpoint's.
            **generation_kwargs: What `generate()` takes: `do_sample`, `top_p`, `max_new_tokens` and so on; by default
                the checkpoint's generation settings.

        Returns:
            The answer, and the history with this turn at its end.

        Raises:
            FileNotFoundError: A picture is missing.
            ValueError: A picture cannot be read, a tag is not closed, or the prompt is too long for the model.
        """
        inputs, settings = self._chat_inputs(tokenizer, query, history, system, max_window_size, generation_kwargs)
        with _seeded(seed, self.input_device):
            output = self.generate(**inputs, **settings)
        answer = cut_answer(tokenizer, output[0, inputs["input_ids"].shape[1] :].tolist())
        return answer, [*(history or ()), (query, answer)]

    def chat_stream(
        self,
        tokenizer: QwenVLTokenizer,
        query: Query,
        history: Sequence[Turn] | None = None,
        system: Query = DEFAULT_SYSTEM,
        *,
        seed: int | None = None,
        max_window_size: int | None = None,
        **generation_kwargs: Any,
    ) -> Iterator[str]:
        """Answers a query and yields the text so far while it is written.

        published: special tokens are left out and nothing else is cut, so that a text which ended at the limit keeps
        its last token here, unlike in `chat`. The arguments and errors are `chat`'s.
        """
        inputs, settings = self._chat_inputs(tokenizer, query, history, system, max_window_size, generation_kwargs)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, errors="ignore")
        gone, failures = threading.Event(), []

        def work() -> None:
            try:
                with _seeded(seed, self.input_device):
                    self.generate(
                        **inputs,
                        **settings,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([_StopWhen(gone)]),
                    )
            except BaseException as error:  # noqa: BLE001 - passed on to the reader below
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            text = ""
            for piece in streamer:
                if piece:
                    text += piece
                    yield text
        finally:
            gone.set()
            thread.join()
        if failures:
            raise failures[0]

    def _chat_inputs(
        self,
        tokenizer: QwenVLTokenizer,
        query: Query,
        history: Sequence[Turn] | None,
        system: Query,
        max_window_size: int | None,
        generation_kwargs: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        window = first(max_window_size, getattr(self.generation_config, "max_window_size", None), MAX_WINDOW_SIZE)
        context = build_context(tokenizer, query, history, system, window)
        limit = self.config.max_position_embeddings
        if len(context.ids) >= limit:
            raise ValueError(
                f"the prompt has {len(context.ids)} tokens, and the model has {limit} positions for prompt and answer. "
                "Shorten the query, the system message or the history."
            )
        processor = QwenVLImageProcessor(self.config.visual["image_size"])
        pixels = processor.load_all(context.images)
        device = self.input_device
        ids = torch.tensor([context.ids], device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pixels is not None:
            inputs["pixel_values"] = pixels.to(device)
        # published: after <|im_end|> or <|im_start|> nothing but <|endoftext|> follows: the answer ends there.
        stops = [tokenizer.eod_id, tokenizer.im_end_id, tokenizer.im_start_id]
        settings: dict[str, Any] = {"eos_token_id": stops, "pad_token_id": tokenizer.eod_id}
        if self.generation_config.max_new_tokens is None and "generation_config" not in generation_kwargs:
            settings["max_new_tokens"] = MAX_NEW_TOKENS  # as the engine does; generate() would end after 20
        return inputs, {**settings, **generation_kwargs}


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds torch inside the block and restores the random state after it; does nothing for None."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
