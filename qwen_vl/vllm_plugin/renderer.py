"""Messages to a prompt of ids, by the project's own contexts and tokenizer, and the pictures that they show."""

import base64
import binascii
import io
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image
from vllm.config import VllmConfig
from vllm.inputs import MultiModalInput, TokensInput, TokensPrompt
from vllm.renderers.base import BaseRenderer
from vllm.renderers.chat_utils import ChatCompletionMessageParam, ConversationMessage
from vllm.renderers.params import ChatParams
from vllm.utils.async_utils import make_async

from qwen_vl.chat import DEFAULT_SYSTEM, MAX_WINDOW_SIZE, build_context
from qwen_vl.vllm_plugin.admission import check_prompt
from qwen_vl.vllm_plugin.tokenizer import ServingTokenizer

Element = dict[str, Any]
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # of what comes over the network; others start programs


class QwenVLRenderer(BaseRenderer[ServingTokenizer]):
    """Replaces the chat template: text is plain, whoever wrote it, and only a picture's part shows a picture."""

    def __init__(self, config: VllmConfig, tokenizer: ServingTokenizer | None) -> None:
        super().__init__(config, tokenizer)
        settings = self.model_config.try_get_generation_config()
        self.max_window_size = settings.get("max_window_size") or MAX_WINDOW_SIZE
        self.local_pictures = self.model_config.allowed_local_media_path
        self._render_async = make_async(self.render_messages, executor=self._executor)

    def render_messages(
        self, messages: list[ChatCompletionMessageParam], params: ChatParams
    ) -> tuple[list[ConversationMessage], TokensPrompt]:
        """Returns the messages as vLLM wants them back, and the prompt that `make_context` gives for them.

        Raises:
            ValueError: They ask for something that the model's contexts do not have, or a picture cannot be read.
        """
        _check_params(params)
        system, history, query = conversation(messages, self.local_pictures)
        context = build_context(self.get_tokenizer().tokenizer, query, history, system, self.max_window_size)
        prompt = TokensPrompt(prompt_token_ids=context.ids)
        if context.images:
            prompt["multi_modal_data"] = {"image": context.images}
        return [ConversationMessage(role=m["role"], content=m.get("content") or "") for m in messages], prompt

    async def render_messages_async(
        self, messages: list[ChatCompletionMessageParam], params: ChatParams
    ) -> tuple[list[ConversationMessage], TokensPrompt]:
        return await self._render_async(messages, params)

    def process_for_engine(self, *args: Any, **kwargs: Any) -> TokensInput | MultiModalInput:
        return self._checked(super().process_for_engine(*args, **kwargs))

    async def process_for_engine_async(self, *args: Any, **kwargs: Any) -> TokensInput | MultiModalInput:
        return self._checked(await super().process_for_engine_async(*args, **kwargs))

    def _checked(self, prompt: TokensInput | MultiModalInput) -> TokensInput | MultiModalInput:
        """Refuses here, with a message to the client, what the engine would refuse (`admission`)."""
        pictures = len(prompt.get("mm_placeholders", {}).get("image", ()))
        check_prompt(prompt.get("prompt_token_ids", ()), pictures, self.model_config.hf_config)
        return prompt


def conversation(
    messages: list[ChatCompletionMessageParam], local_pictures: str = ""
) -> tuple[list[Element], list[tuple[list[Element], str]], list[Element]]:
    """System message, history and query of `build_context`.

    Args:
        messages: At most one system message, first; then user and assistant in turn, the user last.
        local_pictures: The folder under which `file://` pictures may lie; empty for none.

    Raises:
        ValueError: They are in another order, or hold something that the model does not know.
    """
    messages = list(messages)
    system: list[Element] = [{"text": DEFAULT_SYSTEM}]
    if messages and messages[0]["role"] == "system":
        system = _elements(messages.pop(0), local_pictures)
        if any("image" in element for element in system):
            raise ValueError("a system message shows no picture")
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ValueError(
            f"the roles are {roles}. Qwen-VL takes one system message or none, then user and assistant in turn, and "
            "answers the last message, a user's; an answer that was begun cannot be continued."
        )
    contents = [_elements(message, local_pictures) for message in messages]
    answers = ["".join(_plain(element) for element in content) for content in contents[1::2]]
    return system, list(zip(contents[:-1:2], answers, strict=True)), contents[-1]


def _plain(element: Element) -> str:
    if "text" not in element:
        raise ValueError("an assistant's message shows no picture")
    return element["text"]


def _elements(message: ChatCompletionMessageParam, local_pictures: str) -> list[Element]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"text": content}]
    if content is None or message.get("tool_calls"):
        raise ValueError("each message needs a content of text and pictures; Qwen-VL calls no tools")
    return [_element(part, local_pictures) for part in content]


def _element(part: Any, local_pictures: str) -> Element:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, str) or kind == "text":
        return {"text": part if isinstance(part, str) else part["text"]}
    if kind == "image_url":
        url = part["image_url"]
        return {"image": open_picture(url if isinstance(url, str) else url["url"], local_pictures)}
    if kind == "image_pil":  # vLLM's own, for programs
        return {"image": part["image_pil"].convert("RGB")}
    raise ValueError(f"a content part is text or image_url, not {kind!r}")


def open_picture(url: str, local_pictures: str = "") -> Image.Image:
    """Returns the picture of a `data:` URL, or of a `file://` URL under `local_pictures`, in RGB.

    published: transparency is dropped and EXIF orientation ignored, which vLLM's own loader does otherwise.

    Raises:
        ValueError: It cannot be read, or may not be.
    """
    if url.startswith("data:"):
        try:
            source: Any = io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise ValueError(f"the picture is not base64: {error}") from error
    elif url.startswith("file://") and local_pictures:
        source = Path(unquote(urlsplit(url).path)).resolve()
        if not source.is_relative_to(Path(local_pictures).resolve()):
            raise ValueError(f"the picture is not under --allowed-local-media-path {local_pictures}")
    else:
        raise ValueError(
            f"the picture {url[:60]!r} is not fetched. Send it as data:image/png;base64,… , or start the server with "
            "--allowed-local-media-path FOLDER and send file:// URLs of it."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=FORMATS) as picture:
                return picture.convert("RGB")
    except Exception as error:  # one picture's boundary: each of Pillow's decoders fails in its own way
        raise ValueError(f"not a readable picture: {error}") from error


def _check_params(params: ChatParams) -> None:
    """Refuses what a chat template would be asked for, and the model's context has no place for."""
    asked = params.chat_template_kwargs or {}
    if params.chat_template is not None:
        raise ValueError("Qwen-VL's contexts are fixed: leave chat_template away.")
    if asked.get("continue_final_message") or asked.get("add_generation_prompt") is False:
        raise ValueError("an answer that was begun cannot be continued: leave continue_final_message away.")
    if asked.get("tools") or asked.get("documents"):
        raise ValueError("Qwen-VL calls no tools and takes no documents: put what it needs into the messages.")
