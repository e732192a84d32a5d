"""Containers of Tavern character cards: JSON, PNG and .charx.

A card is a JSON object (V1: the fields themselves; V2 and V3: `spec`, `spec_version`, `data`). A PNG carries it in
base64 in a text chunk, `ccv3` (V3) or `chara` (V1 and V2); a .charx is a zip archive with `card.json` and the assets.
Nothing of a container is unpacked to disk, and no name in it is used as a path.

Source: Character Card specifications V2 (malfoyslastname) and V3 (kwaroran).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from data_utils.errors import MMRoleError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORDS = ("ccv3", "chara")  # in order of preference
ASSET_KEYWORD = "chara-ext-asset_:"  # V3: an asset in a text chunk, before .charx
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_CARD_IN_ARCHIVE = "card.json"
MOST_BYTES = 256 * 2**20  # of a file, and of all that is unpacked from it
_MOST_MEMBERS = 10_000
_LATIN1 = "latin-1"


@dataclass(frozen=True)
class CardFile:
    """The content of a card file.

    Attributes:
        card: The JSON object, unchanged.
        picture: The PNG without its cards and assets, or None if the card is not inside a picture.
        assets: Embedded files by their URI in the card (`embeded://…`, `__asset:…`).
        suffix: `.json`, `.png` or `.charx`, by the content and not by the name.
        notes: Skipped content, for the user.
        content: The file itself; a pipe can be read only once.
    """

    card: dict[str, Any]
    picture: bytes | None = None
    assets: Mapping[str, bytes] = field(default_factory=dict)
    suffix: str = ".json"
    notes: tuple[str, ...] = ()
    content: bytes = b""

    def asset(self, uri: str) -> bytes | None:
        """The embedded file that a card calls by a URI."""
        return self.assets.get(uri.replace("embedded://", "embeded://", 1))  # the specification's spelling


def read_card_file(path: Path) -> CardFile:
    """Reads a card of any version from any container.

    Raises:
        MMRoleError: The file cannot be read, holds no card, is damaged, or unpacks to more than `MOST_BYTES`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        fix = "check the path and its permissions"
        raise MMRoleError(f"cannot read the card: {error.strerror}", path, "--card", fix) from None
    if len(content) > MOST_BYTES:
        _fail("the card is too large", f"more than {MOST_BYTES // 2**20} MiB", path, "give a smaller file")
    return replace(_read(content, path), content=content)


def _read(content: bytes, path: Path) -> CardFile:
    if content.startswith(PNG_SIGNATURE):
        return _read_png(content, path)
    if content.startswith((b"\xff\xd8", b"RIFF")) and not zipfile.is_zipfile(io.BytesIO(content)):
        _fail("only PNG pictures carry a card", path.suffix, path, "export the card as PNG, JSON or .charx")
    if zipfile.is_zipfile(io.BytesIO(content)):  # also behind a JPEG, as RisuAI writes it
        return _read_archive(content, path)
    return CardFile(_card_object(content, path))


def write_card_png(picture: bytes, cards: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Puts cards into a PNG, each in a tEXt chunk before the end.

    Args:
        picture: A PNG; cards in it are replaced.
        cards: The JSON objects by keyword, `chara` or `ccv3`.
    """
    kept = [chunk for chunk in _chunks(picture) if not _card_text(*chunk)]
    end = next((place for place, (kind, _) in enumerate(kept) if kind == b"IEND"), len(kept))
    texts = [
        (b"tEXt", keyword.encode(_LATIN1) + b"\0" + base64.b64encode(json.dumps(card).encode()))
        for keyword, card in cards.items()
    ]
    return PNG_SIGNATURE + b"".join(_chunk(*chunk) for chunk in [*kept[:end], *texts, (b"IEND", b"")])


def _read_png(content: bytes, path: Path) -> CardFile:
    texts: dict[str, list[bytes]] = {}
    notes = []
    left = MOST_BYTES
    for kind, data in _chunks(content):
        if not _card_text(kind, data):
            continue
        keyword, text = _text_of(kind, data, left)
        if text is None:
            notes.append(f"a {kind.decode()} chunk {keyword!r} is damaged or unpacks to too much")
            continue
        left -= len(text)
        texts.setdefault(keyword if keyword.startswith(ASSET_KEYWORD) else keyword.lower(), []).append(text)
    candidates = [(keyword, text) for keyword in KEYWORDS for text in texts.get(keyword, [])]
    if not candidates:
        fix = "give a PNG that a role-play front end exported as a card"
        _fail("the PNG holds no card", "; ".join(notes) or None, path, fix)
    card = None
    for keyword, text in candidates:
        try:
            found = _card_object(_unwrapped(text), path)
        except MMRoleError as error:
            notes.append(f"a chunk {keyword!r} is not a card: {error.what}")
            if len(candidates) == 1:
                raise
            continue
        if card is None:
            card = found
        elif keyword == KEYWORDS[1] and KEYWORDS[0] in texts:
            continue  # the V2 copy that V3 cards carry for older front ends
        elif found != card:
            notes.append(f"a further chunk {keyword!r} holds another card; the first one counts")
    if card is None:
        _fail("no card in the PNG can be read", notes, path, "export the card again")
    assets = {}
    for keyword, found in texts.items():
        if keyword.startswith(ASSET_KEYWORD):
            try:
                assets["__asset:" + keyword.removeprefix(ASSET_KEYWORD)] = decode_base64(found[0])
            except ValueError:
                notes.append(f"the asset {keyword!r} is not base64")
    return CardFile(card, write_card_png(content, {}), assets, ".png", tuple(notes))


def _read_archive(content: bytes, path: Path) -> CardFile:
    left = MOST_BYTES
    files: dict[str, bytes] = {}
    fix = "export the card again"
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) > _MOST_MEMBERS:
                _fail("the archive holds too many files", f"{len(members):,}", path, fix)
            for member in members:
                name = member.filename
                if PurePosixPath(name).is_absolute() or ".." in name.replace("\\", "/").split("/") or ":" in name:
                    _fail("a file in the archive has a name that leads out of it", name, path, "do not trust this card")
                with archive.open(member) as file:
                    files[name] = file.read(left + 1)
                left -= len(files[name])
                if left < 0:
                    _fail("the archive unpacks to too much", f"more than {MOST_BYTES // 2**20} MiB", path, fix)
    except MMRoleError:
        raise
    except Exception as error:  # noqa: BLE001 - each of zipfile's decompressors fails in its own way
        _fail(f"the archive cannot be read: {error}", path.name, path, fix)
    if _CARD_IN_ARCHIVE not in files:
        _fail(f"the archive holds no {_CARD_IN_ARCHIVE}", list(files)[:10], path, "give a .charx file")
    card = _card_object(files.pop(_CARD_IN_ARCHIVE), path)
    return CardFile(card, None, {f"embeded://{name}": data for name, data in files.items()}, ".charx")


def _card_object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        card = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        _fail("the card is not UTF-8 text", f"byte {error.start}", path, "export the card again")
    except (ValueError, RecursionError) as error:
        _fail(f"the card is not valid JSON: {error}", content[:40], path, "export the card again")
    fields = card.get("data", card) if isinstance(card, dict) else None
    if isinstance(card, dict) and not isinstance(fields, dict) and "name" in card:
        fields = card  # `data` is not an object: the fields of V1 may stand beside it
    if not isinstance(fields, dict) or "name" not in fields:
        fix = "give a card of V1, V2 or V3: a JSON object with a name (in `data` from V2 on)"
        _fail("this is not a character card", content[:40], path, fix)
    return card


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the chunks of a PNG in order, those after its end included; checksums are ignored."""
    place = len(PNG_SIGNATURE)
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        if not kind.isalpha() or place + 8 + length > len(content):
            return
        yield kind, content[place + 8 : place + 8 + length]
        place += 12 + length


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _card_text(kind: bytes, data: bytes) -> bool:
    """Return whether a chunk is a card's or one of its assets'."""
    if kind not in _TEXT_CHUNKS:
        return False
    keyword = data.partition(b"\0")[0].decode(_LATIN1)
    return keyword.lower() in KEYWORDS or keyword.startswith(ASSET_KEYWORD)


def _text_of(kind: bytes, data: bytes, most: int) -> tuple[str, bytes | None]:
    """Return the keyword and the text of a tEXt, zTXt or iTXt chunk; no text if damaged or longer than `most`."""
    keyword, _, rest = data.partition(b"\0")
    packed = False
    if kind == b"zTXt":
        packed, rest = True, rest[1:]
    elif kind == b"iTXt":
        packed = rest[:1] == b"\x01"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # language tag, translated keyword
    if packed:
        try:
            unpacker = zlib.decompressobj()
            rest = unpacker.decompress(rest, most + 1)
            whole = unpacker.eof
        except zlib.error:
            whole = False
        if not whole or len(rest) > most:
            return keyword.decode(_LATIN1), None
    return keyword.decode(_LATIN1), rest


def _unwrapped(text: bytes) -> bytes:
    """Return the JSON in a text chunk: base64 by the specification, plain from some exporters."""
    if text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return text
    try:
        return decode_base64(text)
    except ValueError:
        return text


def decode_base64(text: bytes | str) -> bytes:
    """Return the bytes of a base64 text; line breaks and missing padding are allowed.

    Raises:
        ValueError: It is not base64.
    """
    kept = b"".join((text.encode("ascii", "replace") if isinstance(text, str) else text).split()).rstrip(b"=")
    try:
        return base64.b64decode(kept + b"=" * (-len(kept) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def _fail(what: str, value: object, path: Path, fix: str) -> NoReturn:
    raise MMRoleError(what, value, path, fix)
