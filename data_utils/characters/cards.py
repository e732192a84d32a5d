"""Tavern character cards as characters of a data root, and back.

Name, description, personality, scenario and example messages become the sections of a profile; the picture and the
assets become the character's pictures. Everything else stays in the card's file, which is kept byte for byte in
`profiles/<split>/cards/`, so that an export loses nothing.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from data_utils.characters.card_files import CardFile, decode_base64, read_card_file, write_card_png
from data_utils.characters.importer import CARD_SUFFIXES, NewCharacter, Picture, stored_picture
from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import write_bytes
from data_utils.images import file_name_problem, find_image, plain_picture
from data_utils.layout import SPLITS, card_path, file_name
from data_utils.prompts import HYPOTHETICAL_CHARACTERS
from data_utils.roots import read_annotations, read_profiles
from qwen_vl.special_tokens import SPECIAL_TOKENS

# A profile's headings, as the published ones have them, and the fields that they come from.
SECTIONS = {
    "Brief Introduction": "description",
    "Personality": "personality",
    "Life Story": "scenario",
    "Catchphrases": "mes_example",
}
_WORLD = "World"  # the heading of a lorebook's constant entries
_PARTNER = "the human"  # `{{user}}`: in MMRole a curious human, unless a dialogue says otherwise
_NOT_PICTURED = ("user_icon",)  # the person's at the keyboard, not the character's
_SHOWN_ONLY = ("system_prompt", "post_history_instructions")
_COMMENT = re.compile(r"\{\{\s*(?://|comment:|hidden_key:).*?\}\}", re.IGNORECASE | re.DOTALL)
_CHARACTER = re.compile(r"\{\{\s*char\s*\}\}|<(?:char|bot)>", re.IGNORECASE)
_USER = re.compile(r"\{\{\s*user\s*\}\}|<user>", re.IGNORECASE)
_START = re.compile(r"^\s*<START>\s*$", re.IGNORECASE | re.MULTILINE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))


@dataclass(frozen=True)
class CardPicture:
    """A picture of a card: its bytes in any format, and its name in the card."""

    content: bytes
    name: str
    portrait: bool


@dataclass(frozen=True)
class CardCharacter:
    """A card, read as a character.

    Attributes:
        name: The card's name; not checked yet as a file name.
        script: From the card's tags, else its source, else the published name for made-up characters.
        profile: Markdown in the published sections.
        pictures: The portrait first.
        notes: What was changed, skipped or not applied, for the user.
    """

    name: str
    script: str
    profile: str
    pictures: Sequence[CardPicture]
    notes: Sequence[str]


def character_from_card(
    path: Path, *, name: str | None = None, script: str | None = None, split: str = SPLITS[0]
) -> tuple[NewCharacter, list[str]]:
    """Reads a card as a character that can be added to a data root.

    Args:
        path: The card: JSON, PNG or .charx.
        name: Used instead of the card's own.
        script: Used instead of the one that its tags name.
        split: Where the character belongs.

    Returns:
        The character, and notes for the user on what was changed, skipped or not applied.

    Raises:
        MMRoleError: The card cannot be read, or has no name and none is given.
    """
    file = read_card_file(path)
    character = character_of(file, name)
    problem = file_name_problem(character.name)
    if problem:
        what = f"the card's name cannot name files: {problem}"
        raise MMRoleError(what, character.name, path, "give one with --name")
    notes, pictures = [*character.notes], []
    for number, picture in enumerate(character.pictures):
        who = character.name if picture.portrait else ""
        found = Picture(Path(f"{path.name} ({picture.name})"), who=who, content=picture.content)
        found = replace(found, path=found.path.with_name(f"{found.path.name} {number}"))
        try:
            stored_picture(found)
        except ValueError as error:
            if file.picture is not None and number == 0:
                raise MMRoleError("the card's picture cannot be used", str(error), path, "export it again") from None
            notes.append(f"the asset {picture.name!r} is skipped: not a usable picture ({error})")
            continue
        pictures.append(found)
    script = script or character.script
    return NewCharacter(character.name, script, character.profile, pictures, split, (file.content, file.suffix)), notes


def export_card(root: Path, name: str, out: Path) -> None:
    """Writes a character of a data root as a PNG that carries its V2 and its V3 card.

    The picture is that of the card it was imported from, else one of its script, if possible with the character on it,
    else a plain one.

    Raises:
        MMRoleError: There is no such character, or the file cannot be written.
    """
    for split in SPLITS:
        characters, problems = read_profiles(root, split, may_lack=True)
        raise_problems(problems)
        if name in characters.profiles:
            break
    else:
        raise MMRoleError("there is no such character", name, root / "profiles", "choose one of profiles.json")
    kept = [path for suffix in CARD_SUFFIXES if (path := card_path(root, split, name, suffix)).is_file()]
    file = read_card_file(kept[0]) if kept else CardFile({})
    script = characters.scripts.get(name, HYPOTHETICAL_CHARACTERS)
    cards = exported_cards(file, name, script, characters.profiles[name])
    own = [Picture(Path(picture.name), content=picture.content) for picture in character_of(file, name).pictures]
    picture = file.picture or _first_png(chain(own, _script_pictures(root, script, name)))
    write_bytes(out, write_card_png(picture, cards))


def _script_pictures(root: Path, script: str, name: str) -> Iterator[Picture]:
    """The pictures of a script, those that show the character first."""
    rows, problems = read_annotations(root)
    raise_problems(problems)
    rows = [row for row in rows if row["image"].startswith(f"{file_name(script)}/")]
    for row in sorted(rows, key=lambda row: name not in row["role_info"]):
        path = find_image(root / "images", row["image"])
        if path is not None:
            yield Picture(path)


def _first_png(pictures: Iterable[Picture]) -> bytes:
    """Return the first readable picture, or a plain one, as PNG."""
    out = io.BytesIO()
    for picture in pictures:
        try:
            stored, _ = stored_picture(picture)
        except (OSError, ValueError):
            continue
        with Image.open(io.BytesIO(stored)) as image:
            image.convert("RGB").save(out, "PNG")
        return out.getvalue()
    plain_picture().save(out, "PNG")
    return out.getvalue()


def character_of(file: CardFile, name: str | None = None) -> CardCharacter:
    """Read a card's fields; values of a wrong type are converted to the most likely meaning.

    Args:
        file: The card.
        name: Used instead of the card's own.
    """
    fields = card_fields(file.card)
    notes = list(file.notes)
    own_name = name or _text(fields.get("name")).strip()
    called = name or _text(fields.get("nickname")).strip() or own_name
    sections = {heading: _filled(_text(fields.get(key)), called) for heading, key in SECTIONS.items()}
    sections["Catchphrases"] = re.sub(r"\n{3,}", "\n\n", _START.sub("", sections["Catchphrases"])).strip()
    constant, others = _lore(fields.get("character_book"))
    sections[_WORLD] = "\n".join(_filled(entry, called) for entry in constant)
    if others:
        notes.append(f"{others} lorebook entries depend on keywords: kept in the card, not part of the profile")
    profile = "\n".join(f"### {heading}\n{text}" for heading, text in sections.items() if text)
    clean = _plain(profile)
    if clean != profile:
        notes.append("surrogate characters or special tokens were replaced in the profile")
    shown_only = [(key, _text(fields.get(key)).strip()) for key in _SHOWN_ONLY]
    notes += [f"{key}, shown here and not applied: {text}" for key, text in shown_only if text]
    pictures = [*_pictures(file, fields, notes)]
    return CardCharacter(own_name, _script(fields), clean, pictures, notes)


def card_fields(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return a card's fields: `data` from V2 on, completed by V1's fields beside it."""
    data = card.get("data")
    return {**card, **data} if isinstance(data, dict) else dict(card)


def exported_cards(file: CardFile, name: str, script: str, profile: str) -> dict[str, dict[str, Any]]:
    """Return the V2 and the V3 card of a character, by the keyword of their chunks.

    Args:
        file: The card that the character was imported from, empty for none. Its fields stay as they are, unless the
            profile has been changed since: then the whole profile is the description. Its assets become data URLs.
        name: The character's.
        script: The character's; a tag of cards that were not imported.
        profile: The profile in the data root.
    """
    card = file.card
    if not card:
        fields: dict[str, Any] = {"name": name, "description": profile, "tags": [script]}
        rest: dict[str, Any] = {}
    else:
        data = card.get("data")
        fields = dict(data) if isinstance(data, dict) else {k: v for k, v in card.items() if k not in ("spec", "data")}
        rest = {k: v for k, v in card.items() if k not in ("data", "spec", "spec_version")}
        if not isinstance(data, dict):
            rest = {}  # V1: the fields themselves
        if profile != character_of(CardFile(dict(card)), name).profile:
            fields |= {"description": profile, "personality": "", "scenario": "", "mes_example": ""}
        if name != _text(fields.get("name")):
            fields["name"] = name
    if isinstance(fields.get("assets"), list):
        fields["assets"] = [_with_data_url(asset, file) for asset in fields["assets"]]
    required = {"description": "", "personality": "", "scenario": "", "first_mes": "", "mes_example": ""}
    required |= {"creator_notes": "", "system_prompt": "", "post_history_instructions": "", "creator": ""}
    required |= {"alternate_greetings": [], "tags": [], "character_version": "", "extensions": {}}
    v2 = {**rest, "spec": "chara_card_v2", "spec_version": "2.0", "data": {**required, **fields}}
    v3_data = {**required, "group_only_greetings": [], **fields}
    version = card.get("spec_version") if card and card.get("spec") == "chara_card_v3" else None
    v3 = {**rest, "spec": "chara_card_v3", "spec_version": version or "3.0", "data": v3_data}
    return {"chara": v2, "ccv3": v3}


def _with_data_url(asset: Any, file: CardFile) -> Any:
    content = file.asset(_text(asset.get("uri"))) if isinstance(asset, dict) else None
    if content is None:
        return asset
    kind = re.sub(r"[^a-z0-9.+-]", "", _text(asset.get("ext")).lower()) or "octet-stream"
    return {**asset, "uri": f"data:application/{kind};base64,{base64.b64encode(content).decode()}"}


def _pictures(file: CardFile, fields: Mapping[str, Any], notes: list[str]) -> Iterator[CardPicture]:
    """Return the PNG around a card, then its assets: icons, emotions, backgrounds and others in the file."""
    if file.picture is not None:
        yield CardPicture(file.picture, "the card's picture", portrait=True)
    assets = fields.get("assets")
    for asset in assets if isinstance(assets, list) else []:
        if not isinstance(asset, dict) or _text(asset.get("type")) in _NOT_PICTURED:
            continue
        uri, kind = _text(asset.get("uri")), _text(asset.get("type"))
        name = f"{kind} {_text(asset.get('name'))}".strip()
        if uri.startswith("ccdefault:"):
            continue  # the picture itself
        content = file.asset(uri)
        if content is None and uri.startswith("data:"):
            try:
                content = decode_base64(uri.partition(",")[2])
            except ValueError:
                notes.append(f"the asset {name!r} is skipped: its data URL is not base64")
                continue
        if content is None:
            why = "URLs are not fetched" if "://" in uri and not uri.startswith("embeded:") else "it is not in the file"
            notes.append(f"the asset {name!r} is skipped: {why} ({uri[:80]})")
            continue
        yield CardPicture(content, name, portrait=kind in ("icon", "emotion"))


def _lore(book: Any) -> tuple[list[str], int]:
    """Return the constant entries of a lorebook in their order, and how many others there are."""
    entries = book.get("entries") if isinstance(book, dict) else None
    if isinstance(entries, dict):
        entries = [*entries.values()]
    found = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    used = [entry for entry in found if entry.get("enabled", True)]
    used.sort(key=lambda entry: order if isinstance(order := entry.get("insertion_order"), int | float) else 0)
    constant = [text for entry in used if entry.get("constant") and (text := _text(entry.get("content")).strip())]
    return constant, len(found) - len(constant)


def _script(fields: Mapping[str, Any]) -> str:
    tags, source = fields.get("tags"), fields.get("source")
    tags = tags.split(",") if isinstance(tags, str) else tags
    candidates = [*(tags if isinstance(tags, list) else []), *(source if isinstance(source, list) else [source])]
    for text in (_text(candidate).strip() for candidate in candidates):
        if text and "://" not in text and not file_name_problem(text) and not _MARKS.search(text):
            return text
    return HYPOTHETICAL_CHARACTERS


def _filled(text: str, name: str) -> str:
    """Return a text with both names filled in, and without comments to the front end."""
    text = _COMMENT.sub("", text.replace("\r\n", "\n"))
    text = _CHARACTER.sub(lambda _: name, text)
    return _USER.sub(_PARTNER, text).strip()


def _plain(text: str) -> str:
    """Return a text without surrogate characters and special tokens."""
    return _MARKS.sub(lambda mark: mark[0].replace("<", "‹").replace(">", "›"), _SURROGATE.sub("\ufffd", text))


def _text(value: Any) -> str:
    """Return a field as a text: lists are joined, null and objects give an empty text."""
    if isinstance(value, list):
        return "\n".join(_text(item) for item in value)
    if isinstance(value, bool) or value is None or isinstance(value, dict):
        return ""
    return value if isinstance(value, str) else str(value)
