"""Reads a client's chat and makes the prompt for a model or a character."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from data_utils.images import plain_picture
from data_utils.prompts import HUMAN, SYSTEM_MESSAGE, ImageInformation, Role, role_play_prompt

DEFAULT_SYSTEM = "You are a helpful assistant."
PLAIN_PICTURE = plain_picture()  # shown if a chat has no picture
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_SYSTEM_ROLES = ("system", "developer")


class ChatError(Exception):
    """An invalid request, in the form of OpenAI's errors.

    Args:
        message: What is wrong and what to do.
        param: The offending field.
        status: The HTTP status.
        code: A word for programs.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        """Return the JSON of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """The limits of a request.

    Attributes:
        body: Bytes of a request.
        pictures: Number of pictures.
        pixels: Pixels of one picture.
        messages: Number of messages.
        new_tokens: Tokens of an answer.
        usual_tokens: Default tokens of an answer; None leaves it to the model.
    """

    body: int = 32 * 2**20
    pictures: int = 8
    pixels: int = 50_000_000
    messages: int = 1_000
    new_tokens: int = 2_048
    usual_tokens: int | None = None


@dataclass(frozen=True)
class Turn:
    """One side's words, with the pictures that it showed."""

    by_assistant: bool
    text: str
    pictures: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Chat:
    """System messages in order, and alternating turns that end with the person's (or no turns)."""

    system: str
    turns: tuple[Turn, ...]

    @property
    def picture(self) -> Image.Image | None:
        """Return the latest picture shown."""
        return next((picture for turn in reversed(self.turns) for picture in reversed(turn.pictures)), None)


@dataclass(frozen=True)
class Prompt:
    """A prompt, with the arguments of `chat()`."""

    query: list[dict[str, Any]]
    system: str
    history: list[tuple[list[dict[str, Any]], str]] = field(default_factory=list)


@dataclass(frozen=True)
class Scene:
    """The two speakers and what is known about the picture.

    Attributes:
        role: The character that answers.
        partner: The character that it talks with; None for a curious human.
        information: What is known about the picture.
    """

    role: Role
    partner: Role | None = None
    information: ImageInformation = field(default_factory=ImageInformation)

    def swapped(self) -> Scene:
        """Return the scene from the other character's side."""
        assert self.partner is not None
        return replace(self, role=self.partner, partner=self.role)


def parse_chat(messages: Any, limits: Limits) -> Chat:
    """Read a client's messages.

    Consecutive messages of one side become one turn, a chat that ends with the assistant gets an empty message of the
    person, and system messages may appear anywhere: front ends send all of that.

    Raises:
        ChatError: A message is malformed, or there are too many, or a picture cannot be used.
    """
    if not isinstance(messages, list) or not messages:
        raise ChatError("messages must be a list with at least one message", "messages")
    if len(messages) > limits.messages:
        raise ChatError(f"more than {limits.messages} messages", "messages")
    system: list[str] = []
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise ChatError(f"{where} must be an object", where)
        role = message.get("role")
        text, pictures = _content(message.get("content"), f"{where}.content", limits)
        if role in _SYSTEM_ROLES:
            if pictures:
                raise ChatError("a system message shows no pictures", where)
            system.append(text)
        elif role in ("user", "assistant"):
            turn = Turn(role == "assistant", text, tuple(pictures))
            if turns and turns[-1].by_assistant == turn.by_assistant:
                before = turns.pop()
                joined = "\n\n".join(part for part in (before.text, turn.text) if part)
                turn = Turn(turn.by_assistant, joined, before.pictures + turn.pictures)
            turns.append(turn)
        else:
            raise ChatError(f"role must be system, user or assistant, not {role!r}", f"{where}.role")
    if sum(len(turn.pictures) for turn in turns) > limits.pictures:
        raise ChatError(f"more than {limits.pictures} pictures", "messages")
    if turns and turns[-1].by_assistant:
        turns.append(Turn(False, ""))
    return Chat("\n\n".join(part for part in system if part), tuple(turns))


def plain_prompt(chat: Chat) -> Prompt:
    """Return the prompt of the bare model: ChatML turns, with each picture in its place."""
    turns = list(chat.turns)
    if not turns:
        raise ChatError("there is no message of a user", "messages")
    if turns[0].by_assistant:
        turns.insert(0, Turn(False, ""))
    pairs = zip(turns[:-1:2], turns[1::2], strict=True)
    history = [(_elements(user), answer.text) for user, answer in pairs]
    return Prompt(_elements(turns[-1]), chat.system or DEFAULT_SYSTEM, history)


def role_play(scene: Scene, chat: Chat, picture: Image.Image | None = None) -> Prompt:
    """Return the prompt of a character: the published role-play prompt, which includes the history.

    Args:
        scene: The two speakers.
        chat: The chat; an empty one lets the character begin. Its system messages follow the published one.
        picture: Shown if the chat shows none.
    """
    partner = HUMAN if scene.partner is None else scene.partner.name
    said = [(scene.role.name if turn.by_assistant else partner, turn.text) for turn in chat.turns]
    last_words = said[-1][1] if said else None
    text = role_play_prompt(scene.role, scene.partner, scene.information, history=said[:-1], last_words=last_words)
    shown = chat.picture or picture or PLAIN_PICTURE
    system = "\n\n".join(part for part in (SYSTEM_MESSAGE, chat.system) if part)
    return Prompt([{"image": shown}, {"text": text}], system)


def without_oldest_turns(chat: Chat, pairs: int) -> Chat:
    """Return the chat without its oldest turns of each side, but with its latest picture."""
    rest = chat.turns[2 * pairs :]
    if chat.picture is not None and not any(turn.pictures for turn in rest):
        rest = (replace(rest[0], pictures=(chat.picture,)), *rest[1:])
    return replace(chat, turns=rest)


def read_picture(content: bytes, limits: Limits, where: str) -> Image.Image:
    """Return an uploaded picture, upright, in RGB; the first frame of an animation.

    Raises:
        ChatError: It cannot be read, has too many pixels, or has another format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is checked below
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                if image.width * image.height > limits.pixels:
                    raise ChatError(f"a picture has more than {limits.pixels:,} pixels: make it smaller", where)
                image.load()
                return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ChatError("a picture cannot be read: send PNG, JPEG, WebP or GIF", where) from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ChatError(f"a picture cannot be read ({error}): send it whole", where) from None


def _content(content: Any, where: str, limits: Limits) -> tuple[str, list[Image.Image]]:
    if content is None or isinstance(content, str):
        return _clean(content or ""), []
    if not isinstance(content, list):
        raise ChatError(f"{where} must be a text or a list of parts", where)
    texts, pictures = [], []
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(_clean(part["text"]))
        elif kind == "image_url":
            url = part.get("image_url")
            pictures.append(_picture(url.get("url") if isinstance(url, dict) else url, place, limits))
        else:
            raise ChatError(f"{place}: a part is a text or an image_url, not {kind!r}", place)
    return "\n".join(texts), pictures


def _picture(url: Any, where: str, limits: Limits) -> Image.Image:
    if not isinstance(url, str) or not url.startswith("data:"):
        what = "send the picture itself as a data URL (data:image/png;base64,…)"
        raise ChatError(f"{where}: URLs are not fetched and paths are not read: {what}", where)
    head, _, text = url.partition(",")
    if not head.endswith(";base64"):
        raise ChatError(f"{where}: the data URL must be base64", where)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ChatError(f"{where}: the data URL is not valid base64", where) from None
    return read_picture(content, limits, where)


def _elements(turn: Turn) -> list[dict[str, Any]]:
    return [*({"image": picture} for picture in turn.pictures), {"text": turn.text}]


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # surrogate characters


def openai_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt as messages for an OpenAI-compatible endpoint, with pictures as the model's 448 x 448 PNGs."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": prompt.system}]
    for query, answer in prompt.history:
        messages += [{"role": "user", "content": _parts(query)}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": _parts(prompt.query)}]


def _parts(elements: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for element in elements:
        if "text" in element:
            parts.append({"type": "text", "text": element["text"]})
        else:
            out = io.BytesIO()
            element["image"].resize((448, 448), Image.Resampling.BICUBIC).save(out, "PNG")
            url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
            parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts
