"""Chat messages and pictures to the tensors that the model takes, as a processor of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from qwen_vl.chat import DEFAULT_SYSTEM, MAX_WINDOW_SIZE, Context, append_answer, build_context
from qwen_vl.configuration import QwenVLConfig
from qwen_vl.images import QwenVLImageProcessor
from qwen_vl.tokenization import QwenVLTokenizer

Message = dict[str, Any]
Element = dict[str, Any]
# Where a picture stands in the parts of a message that transformers' documentation shows.
_IMAGE_KEYS = ("image", "url", "path", "image_url")
_PADDING = ("padding", "padding_side", "pad_to_multiple_of")
# Arguments of transformers' method that ask for what is always done here.
_ALWAYS_SO = ("sanitize_control_tokens", "add_special_tokens")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_TOKENIZER_ARGUMENTS = ("padding_side", "truncation_side", "model_max_length")


class QwenVLProcessor(ProcessorMixin):
    """Tokenizer and image processor behind one call.

    Args:
        image_processor: Of the checkpoint's image size.
        tokenizer: The checkpoint's.
    """

    def __init__(self, image_processor: QwenVLImageProcessor, tokenizer: QwenVLTokenizer, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "QwenVLProcessor":
        """Returns the processor of a checkpoint: a released one, which has no file for it, or a saved one."""
        place = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        settings = {name: kwargs[name] for name in _TOKENIZER_ARGUMENTS if name in kwargs}
        tokenizer = QwenVLTokenizer.from_pretrained(pretrained_model_name_or_path, **place, **settings)
        return cls(QwenVLImageProcessor.from_pretrained(pretrained_model_name_or_path, **place), tokenizer)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encodes texts in which every special token counts, as in training, and pictures for their `<img></img>`.

        User input belongs into `apply_chat_template`, where it stays text.

        Args:
            images: One picture or any lists of them (paths or Pillow images), in the order of the texts.
            text: One text or several.
            padding: As the tokenizer takes it; the padding is on the left.
            return_tensors: "pt", or None for lists.
            **kwargs: Further arguments of the tokenizer.

        Returns:
            `input_ids`, `attention_mask`, and with pictures `pixel_values` (N, 3, image_size, image_size).

        Raises:
            ValueError: There are more or fewer pictures than `<img></img>` in the texts.
        """
        pictures = list(_flat(images))
        texts = [text] if isinstance(text, str) else list(text or [])
        batch = dict(self.tokenizer(texts, padding=padding, return_tensors=return_tensors, **kwargs)) if texts else {}
        shown = sum(self.tokenizer.encode(one).count(self.tokenizer.img_start_id) for one in texts)
        if texts and shown != len(pictures):
            raise ValueError(
                f"the texts show {shown} pictures (<img></img>), and {len(pictures)} were given as images. "
                "Give one for each, or use apply_chat_template, which puts them where they belong."
            )
        if pictures:
            batch["pixel_values"] = self.image_processor.load_all(pictures)
        return BatchFeature(batch, tensor_type=return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        max_window_size: int = MAX_WINDOW_SIZE,
        padding: bool | str = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the prompts of conversations: the ids that `make_context` gives for the same texts and pictures.

        Text is never read as tags: `<|im_end|>` or `<img>` in a message stay text. Without a system message it is
        `chat()`'s, and turns that do not fit the window are left out whole, as there.

        Args:
            conversation: Messages `{"role": …, "content": …}`, the system's first if there is one, then user and
                assistant in turn; or a list of such conversations. A content is a text, or a list of parts
                `{"type": "text", "text": …}` and `{"type": "image", "image": …}`, a path or a Pillow image.
            chat_template: Must be None: with a template, text could be read as tags.
            add_generation_prompt: Whether the assistant's role follows a conversation that ends with the user; by
                default it does.
            continue_final_message: Leave the last message, the assistant's, open, so that generation continues it.
            tokenize: Return ids; otherwise the text for display, in which pictures are `<img>path</img>`.
            return_dict: Return `input_ids`, `attention_mask` and `pixel_values` (N, 3, image_size, image_size) of all
                pictures, instead of `input_ids` alone.
            return_tensors: "pt", for which rows are padded on the left; or None for lists.
            max_window_size: Tokens that system message and earlier turns may take.
            padding: Pad lists as well.
            processor_kwargs: Further arguments in a dict, as pipelines and trainers give them: `padding_side`,
                `pad_to_multiple_of`, and `truncation` with `max_length`, with which a longer row is an error.

        Raises:
            ValueError: Roles do not follow each other in turn, a part is of no known kind, or an argument is not
                supported.
        """
        options = {**kwargs, **(processor_kwargs or {})}
        return_tensors = options.pop("return_tensors", return_tensors)
        padding = {"padding": padding} | {name: options.pop(name) for name in _PADDING if name in options}
        limit = options.pop("max_length", None)
        limit = limit if options.pop("truncation", False) else None
        unknown = [name for name, value in options.items() if name not in _ALWAYS_SO and value not in (None, False)]
        if chat_template is not None or unknown:
            names = [*(["chat_template"] if chat_template is not None else []), *unknown]
            raise ValueError(f"apply_chat_template of Qwen-VL does not take {', '.join(names)}: its template is fixed.")
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        contexts = [
            self._context(
                messages,
                begin_answer=add_generation_prompt is not False,
                closed=not continue_final_message,
                window=max_window_size,
                display=not tokenize,
            )
            for messages in (conversation if batched else [conversation])
        ]
        if not tokenize:
            texts = [context.text for context in contexts]
            return texts if batched else texts[0]
        if limit is not None and (longest := max(len(context.ids) for context in contexts)) > limit:
            raise ValueError(
                f"a conversation has {longest} tokens, and max_length is {limit}. Nothing is cut, which would break "
                "pictures: raise max_length, or give a smaller max_window_size, which leaves whole turns out."
            )
        if return_tensors is not None and len(contexts) > 1:
            padding["padding"] = padding["padding"] or "longest"
        batch = dict(self.tokenizer.pad({"input_ids": [context.ids for context in contexts]}, **padding))
        if not return_dict:
            return torch.tensor(batch["input_ids"]) if return_tensors == "pt" else batch["input_ids"]
        pictures = [image for context in contexts for image in context.images]
        if pictures:
            batch["pixel_values"] = self.image_processor.load_all(pictures)
        return BatchFeature(batch, tensor_type=return_tensors)

    def _context(
        self, messages: Sequence[Message], *, begin_answer: bool, closed: bool, window: int, display: bool
    ) -> Context:
        turns = [(message.get("role"), _elements(message.get("content"), display=display)) for message in messages]
        system: list[Element] = [{"text": DEFAULT_SYSTEM}]
        if turns and turns[0][0] == "system":
            system = turns.pop(0)[1]
        wanted = [("user", "assistant")[i % 2] for i in range(len(turns))]
        if not turns or [role for role, _ in turns] != wanted:
            raise ValueError(
                f"the roles {[message.get('role') for message in messages]} cannot be a conversation: at most one "
                "system message comes first, then user and assistant in turn, the user first."
            )
        answer = turns.pop()[1] if len(turns) % 2 == 0 else None
        if answer is None and not closed:
            raise ValueError("continue_final_message needs a last message of the assistant's")
        query = turns.pop()[1]
        history = [(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2)]
        begin = begin_answer or answer is not None
        prompt = build_context(self.tokenizer, query, history, system, window, begin_answer=begin)
        return prompt if answer is None else append_answer(self.tokenizer, prompt, answer, closed=closed)


def _elements(content: Any, *, display: bool) -> list[Element]:
    """Returns the content of a message as `make_context` takes it, in which no text is read as tags."""
    parts = [content] if isinstance(content, str | dict) else content
    if not isinstance(parts, Sequence):
        raise ValueError(f"the content of a message is a text or a list of parts, not {content!r}")
    return [_element(part, display=display) for part in parts]


def _element(part: Any, *, display: bool) -> Element:
    if isinstance(part, str):
        return {"text": part}
    if isinstance(part, dict) and "text" in part and part.get("type", "text") == "text":
        return {"text": part["text"]}
    if isinstance(part, dict) and (part.get("type") in ("image", "image_url") or "image" in part):
        image = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
        image = image.get("url") if isinstance(image, dict) else image
        if display:
            return {"image": image if isinstance(image, str | Path) else ""}
        if isinstance(image, str | Path | Image.Image):
            return {"image": image}
        found = "nothing" if image is None else type(image).__name__
        raise ValueError(
            f'an image part needs its picture, {{"type": "image", "image": path or Pillow image}}; it has {found}'
        )
    raise ValueError(f"a part of a message is a text or an image, not {part!r}")


def _flat(images: Any) -> Any:
    """Returns every picture of nested lists, in order."""
    if isinstance(images, list | tuple):
        for image in images:
            yield from _flat(image)
    elif images is not None:
        yield images


AutoProcessor.register(QwenVLConfig, QwenVLProcessor)
