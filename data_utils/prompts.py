"""The role-play prompt of MMRole-Data, as published: 294 of 294 released test prompts come out byte for byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SYSTEM_MESSAGE = (
    "You are a dedicated role-playing assistant designed to immerse yourself fully in the character you are portraying."
)
TRAINING_SYSTEM = "You are a helpful assistant."  # published: in training, whatever the sample's own says
HUMAN = "human"
CURIOUS_HUMAN = "a curious human"
HYPOTHETICAL_CHARACTERS = "Hypothetical Characters"
CHINESE_SCRIPTS = frozenset({"西游记", "成龙历险记", "中国唐代"})
HISTORICAL = {"the Renaissance period", "the modern times", "the Ancient Greece period", "中国唐代"}
FICTIONAL = {
    *("The Avengers", "X-Men", "Harry Potter", "Toy Story", "Friends", "The Big Bang Theory"),
    *("西游记", "成龙历险记"),
}
INFORMATION_FIELDS = ("role_info", "place_info", "scene_info")  # of annotations and dialogues
CATEGORIES = ("fictional", "historical or public", "hypothetical", "other")


@dataclass(frozen=True)
class Role:
    """A character: name, the script it comes from, and its profile text."""

    name: str
    script: str
    profile: str


@dataclass(frozen=True)
class ImageInformation:
    """The auxiliary information of a script image; texts may be empty."""

    role: str = ""
    place: str = ""
    scene: str = ""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> ImageInformation:
        """Return what a dialogue or an annotation says about its image; a field that is missing says nothing."""
        return cls(*(record.get(name) or "" for name in INFORMATION_FIELDS))

    def fields(self) -> dict[str, str]:
        """Return it as the fields of a dialogue or an annotation."""
        return dict(zip(INFORMATION_FIELDS, (self.role, self.place, self.scene), strict=True))


def prompt_language(script: str) -> str:
    """Return the language that a character of a script must answer in."""
    return "Chinese" if script in CHINESE_SCRIPTS else "English"


def category(script: str) -> str:
    """Return the category of a script's characters in the paper's table; "other" for scripts that it does not have."""
    if script == HYPOTHETICAL_CHARACTERS:
        return "hypothetical"
    if script in HISTORICAL:
        return "historical or public"
    return "fictional" if script in FICTIONAL else "other"


def picture_line(image: str) -> str:
    """Return the line that puts a picture (named relative to the image folder) before a user turn."""
    # published: a blank after the colon.
    return f"Picture 1: <img>images/{image}</img>\n"


def role_play_prompt(
    role: Role,
    partner: Role | None,
    information: ImageInformation,
    history: Sequence[tuple[str, str]],
    last_words: str | None,
) -> str:
    """Return the text that asks a character for its next words about the image.

    Args:
        role: The character that answers.
        partner: The character it talks with; None is "a curious human".
        information: The image's annotation.
        history: (speaker, words) before the partner's last words, oldest first; the human is called "human".
        last_words: The partner's last words, verbatim; None lets the role begin the conversation.

    Source: MMRole, appendix on prompts, and the published test files.
    """
    the_partner = "the curious human" if partner is None else partner.name
    parts = [
        _head(role, partner),
        _description(role),
        "" if partner is None else _description(partner),
        _auxiliary(information),
        _history(role, the_partner, history),
        _tail(role, the_partner, last_words),
    ]
    return "".join(parts)


def _head(role: Role, partner: Role | None) -> str:
    if role.script == HYPOTHETICAL_CHARACTERS:
        who = f"{role.name}, a person who is one of the Hypothetical Characters"
    else:
        who = f"{role.name} from {role.script}"
    if partner is None:
        whom = CURIOUS_HUMAN
    elif partner.script == HYPOTHETICAL_CHARACTERS:
        # published: with the comma at the end.
        whom = f"{partner.name}, another person who is one of the Hypothetical Characters,"
    else:
        whom = f"{partner.name} from {partner.script}"
    return (
        f"Please step into the shoes of {who}. Imagine you are talking with {whom} about the given image. "
        "This requires a deep understanding of the character's background, including their personality, "
        "experiences, abilities, and relationships.\n\n\n"
    )


def _description(role: Role) -> str:
    return f"The description of {role.name} is as follows:\n{role.profile}\n\n\n"


def _auxiliary(information: ImageInformation) -> str:
    lines = []
    if information.role:
        lines.append(f" - Character information: {information.role}\n")
    if information.place:
        # published: the full stop is added whether or not the place ends on one.
        lines.append(f" - Place information: {information.place}.\n")
    if information.scene:
        # published: only the scene is stripped.
        lines.append(f" - Scene information: {information.scene.strip()}\n")
    if not lines:
        return ""
    return f"The auxiliary information of the image is as follows:\n{''.join(lines)}\n\n"


def _history(role: Role, the_partner: str, history: Sequence[tuple[str, str]]) -> str:
    if not history:
        return ""
    lines = "".join(f"[{speaker}]: {words}\n" for speaker, words in history)
    return f"The conversation history between {role.name} and {the_partner} is as follows:\n{lines}\n\n"


def _tail(role: Role, the_partner: str, last_words: str | None) -> str:
    language = prompt_language(role.script)
    manner = f"in {language} using the distinctive tone, manner and vocabulary of {role.name}"
    if last_words is None:
        return (
            f"Please initiate the conversation with {the_partner} {manner}, "
            "raising questions or commenting about the image."
        )
    return f"Please respond to the following words of {the_partner} about the image {manner}:\n{last_words}"
