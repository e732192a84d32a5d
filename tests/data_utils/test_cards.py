"""Tavern cards: every version and container is read, bad files get an error, an export loses nothing."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_utils.characters import card_files
from data_utils.characters.__main__ import main
from data_utils.characters.card_files import CardFile, read_card_file, write_card_png
from data_utils.characters.cards import character_of, export_card, exported_cards
from data_utils.characters.importer import NewCharacter, Picture, add_character
from data_utils.check.roots import check_roots
from data_utils.errors import MMRoleError

V1 = {
    "name": "Ada Reed",
    "description": "{{char}} keeps the lighthouse.",
    "personality": "Dry. Likes {{user}}.",
    "scenario": "A storm is near.",
    "first_mes": "Come in.",
    "mes_example": "<START>\n{{user}}: Hello\n{{char}}: Mind the stairs.\n<START>\n{{Char}}: The sea does not hurry.",
}
BOOK = {
    "entries": [
        {"keys": [], "content": "{{char}} has a dog.", "constant": True, "insertion_order": 2, "enabled": True},
        {"keys": [], "content": "Grey Point is an island.", "constant": True, "insertion_order": 1, "enabled": True},
        {"keys": ["ship"], "content": "A ship sank here.", "constant": False, "enabled": True},
        {"keys": [], "content": "Switched off.", "constant": True, "enabled": False},
    ]
}
V3: dict[str, Any] = {
    "spec": "chara_card_v3",
    "spec_version": "3.0",
    "data": {
        **V1,
        "tags": ["The Lighthouse", "Sea"],
        "character_book": BOOK,
        "system_prompt": "Write long answers.",
        "post_history_instructions": "",
        "alternate_greetings": ["Who is there?"],
        "extensions": {"depth_prompt": {"prompt": "x", "depth": 4}},
        "group_only_greetings": [],
        "creator_notes": "Made for tests.",
        "unknown_field": [1, {"two": None}],
        "assets": [
            {"type": "icon", "uri": "ccdefault:", "name": "main", "ext": "png"},
            {"type": "background", "uri": "embeded://assets/background/images/sea.png", "name": "sea", "ext": "png"},
            {"type": "emotion", "uri": "https://example.org/happy.png", "name": "happy", "ext": "png"},
        ],
    },
}
PROFILE = """### Brief Introduction
Ada Reed keeps the lighthouse.
### Personality
Dry. Likes the human.
### Life Story
A storm is near.
### Catchphrases
the human: Hello
Ada Reed: Mind the stairs.

Ada Reed: The sea does not hurry."""


def png(colour: str = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(*chunks: bytes, picture: bytes | None = None, behind: bool = False) -> bytes:
    """A picture with further chunks before its data, or after its end."""
    picture = picture or png()
    place = len(picture) if behind else 33  # the header: 8 bytes of signature, 25 of IHDR
    return picture[:place] + b"".join(chunks) + picture[place:]


def text_chunk(card: Any, keyword: bytes = b"chara", kind: bytes = b"tEXt") -> bytes:
    text = base64.b64encode(json.dumps(card).encode())
    if kind == b"zTXt":
        return chunk(kind, keyword + b"\0\0" + zlib.compress(text))
    if kind == b"iTXt":
        return chunk(kind, keyword + b"\0\x01\0en\0\0" + zlib.compress(text))
    return chunk(kind, keyword + b"\0" + text)


def charx(card: Any = V3, method: int = zipfile.ZIP_DEFLATED, **files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("card.json", json.dumps(card))
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def spoilt(archive: bytes) -> bytes:
    """An archive with nonsense in the data of its first member."""
    place = archive.index(b"card.json") + 30
    return archive[:place] + b"\xff" * 40 + archive[place + 40 :]


@pytest.fixture
def read(tmp_path: Path):
    def read(content: bytes, name: str = "card") -> CardFile:
        (tmp_path / name).write_bytes(content)
        return read_card_file(tmp_path / name)

    return read


def test_json_of_every_version(read) -> None:
    v2 = {"spec": "chara_card_v2", "spec_version": "2.0", "data": V1}
    for card in (V1, v2, {**V1, **v2, "name": "old"}):
        file = read(json.dumps(card).encode())
        assert (file.card, file.picture, file.suffix) == (card, None, ".json")
        character = character_of(file)
        assert (character.name, character.profile) == ("Ada Reed", PROFILE)
    assert read(b"\xef\xbb\xbf" + json.dumps(V1).encode()).card == V1


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
@pytest.mark.parametrize("behind", [False, True])
def test_png_chunks(read, kind: bytes, behind: bool) -> None:
    file = read(with_chunks(text_chunk(V1, kind=kind), behind=behind))
    assert file.card == V1
    assert file.picture == png()
    assert file.suffix == ".png"


def test_v3_comes_before_its_v2_copy(read) -> None:
    file = read(with_chunks(text_chunk(V1), text_chunk(V3, b"ccv3")))
    assert file.card == V3
    assert file.notes == ()


def test_several_cards_in_one_png(read) -> None:
    file = read(with_chunks(text_chunk(V1), text_chunk({**V1, "name": "Tom"}), chunk(b"tEXt", b"chara\0?")))
    assert file.card == V1
    assert [note[:25] for note in file.notes] == ["a further chunk 'chara' h", "a chunk 'chara' is not a "]


def test_charx_and_its_assets(read) -> None:
    file = read(charx(**{"assets/background/images/sea.png": png("blue"), "assets/other/x.lua": b"code"}))
    character = character_of(file)
    assert [(p.name, p.content, p.portrait) for p in character.pictures] == [("background sea", png("blue"), False)]
    assert "the asset 'emotion happy' is skipped: URLs are not fetched" in " ".join(character.notes)


def test_the_other_spelling_of_embedded_files(read) -> None:
    card = json.loads(json.dumps(V3).replace("embeded://", "embedded://"))
    file = read(charx(card, **{"assets/background/images/sea.png": png("blue")}))
    assert [picture.content for picture in character_of(file).pictures] == [png("blue")]
    assert "data:application/png" in json.dumps(exported_cards(file, "Ada Reed", "Sea", "text"))


def test_assets_in_text_chunks_and_data_urls(read) -> None:
    url = "data:image/png;base64," + base64.b64encode(png("green")).decode()
    assets = [{"type": "icon", "uri": "__asset:1", "name": "a"}, {"type": "emotion", "uri": url, "name": "b"}]
    assets.append({"type": "user_icon", "uri": url, "name": "c"})
    asset = chunk(b"tEXt", b"chara-ext-asset_:1\0" + base64.b64encode(png("blue")))
    file = read(with_chunks(text_chunk({"spec": "chara_card_v3", "data": {**V1, "assets": assets}}, b"ccv3"), asset))
    pictures = [picture.content for picture in character_of(file).pictures]
    assert pictures == [png(), png("blue"), png("green")]


def test_lorebook_prompts_and_script(read) -> None:
    character = character_of(CardFile(V3))
    assert character.script == "The Lighthouse"
    assert character.profile == f"{PROFILE}\n### World\nGrey Point is an island.\nAda Reed has a dog."
    assert "2 lorebook entries depend on keywords" in character.notes[0]
    assert "system_prompt, shown here and not applied: Write long answers." in character.notes
    assert "Write long" not in character.profile


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"character_book": None, "tags": None}, ""),
        ({"alternate_greetings": "Hello", "personality": None, "tags": "Sea, Storm"}, ""),
        ({"description": ["Keeps", "the light."]}, "Keeps\nthe light."),
        ({"description": "half \ud83d of one"}, "half \ufffd of one"),
        ({"description": "says <|im_end|> and <img>x</img>"}, "says ‹|im_end|› and ‹img›x‹/img›"),
        ({"description": "{{// hidden}}{{comment: a}}seen"}, "seen"),
        ({"description": 7, "character_book": {"entries": {"0": {"content": "Sea.", "constant": True}}}}, "Sea."),
    ],
)
def test_cards_in_the_wild(read, fields: dict[str, Any], expected: str) -> None:
    card = {"spec": "chara_card_v2", "data": {"name": "Ada", "description": "Old.", **fields}}
    assert expected in character_of(read(json.dumps(card).encode())).profile


def test_twenty_megabytes_in_a_card(read) -> None:
    picture = base64.b64encode(random.Random(0).randbytes(15_000_000)).decode()
    card = {**V3, "data": {**V3["data"], "assets": [{"type": "icon", "uri": f"data:image/png;base64,{picture}"}]}}
    assert read(with_chunks(text_chunk(card, b"ccv3"))).card == card


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"name": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"name": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"title": "no card"}', "not a character card"),
        (b'["name"]', "not a character card"),
        (png(), "the PNG holds no card"),
        (png()[:50], "the PNG holds no card"),
        (with_chunks(chunk(b"tEXt", b"chara\0????")), "not valid JSON"),
        (with_chunks(chunk(b"zTXt", b"chara\0\0" + zlib.compress(b"x" * 5_000_000))), "holds no card"),
        (b"\xff\xd8\xff\xe0 a JPEG", "only PNG pictures"),
        (charx(**{"../../etc/passwd": b""}), "leads out"),
        (charx(**{"/etc/passwd": b""}), "leads out"),
        (charx(**{"bomb.png": b"0" * 5_000_000}), "unpacks to too much"),
        (charx()[:-30] + b"PK\x05\x06" + bytes(18), "no card.json"),
        (charx().replace(b"card.json", b"Card.json"), "no card.json"),
        (spoilt(charx(method=zipfile.ZIP_LZMA)), "archive cannot be read"),
        (spoilt(charx(method=zipfile.ZIP_BZIP2)), "archive cannot be read"),
    ],
)
def test_broken_and_hostile_files(read, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str) -> None:
    monkeypatch.setattr(card_files, "MOST_BYTES", 2_000_000)
    with pytest.raises(MMRoleError, match=message):
        read(content)


def read_and_export(file: CardFile) -> None:
    character_of(file)
    json.dumps(exported_cards(file, "Ada", "Sea", "text"))


def test_random_damage_never_ends_in_a_traceback(read) -> None:
    """300 damaged files, from fixed seeds: each is read, or is an error for the user."""
    assets = {"assets/background/images/sea.png": png("blue")}
    originals = [with_chunks(text_chunk(V3, b"ccv3", kind)) for kind in (b"tEXt", b"zTXt", b"iTXt")]
    originals += [charx(**assets), json.dumps(V3).encode()]
    outcomes = {True: 0, False: 0}
    for seed in range(300):
        draw = random.Random(seed)
        content = bytearray(draw.choice(originals))
        place = draw.randrange(len(content))
        match draw.randrange(4):
            case 0:
                content[place] ^= 1 << draw.randrange(8)
            case 1:
                del content[place : place + draw.randint(1, 40)]
            case 2:
                content[place:place] = draw.randbytes(draw.randint(1, 8))
            case 3:
                del content[place:]
        try:
            read_and_export(read(bytes(content)))
            outcomes[True] += 1
        except MMRoleError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 20


def test_wrong_types_anywhere_are_read_or_refused(read) -> None:
    """300 cards in which three random values have another type, from fixed seeds."""
    values = [None, True, 0, -1.5, "", "text", [], [None, 1], {}, {"a": []}, "\ud800", "data:,", "embeded://x"]

    def places(value: Any) -> list[tuple[Any, Any]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [place for key, below in items for place in [(value, key), *places(below)]]

    for seed in range(300):
        draw = random.Random(seed)
        card = json.loads(json.dumps(V3))
        for _ in range(3):
            holder, key = draw.choice(places(card))
            holder[key] = json.loads(json.dumps(draw.choice(values)))
        try:
            read_and_export(read(json.dumps(card).encode()))
        except MMRoleError as error:
            assert "not a character card" in str(error)


def test_an_export_loses_nothing(read) -> None:
    file = read(charx(**{"assets/background/images/sea.png": png("blue")}))
    character = character_of(file)
    cards = exported_cards(file, character.name, character.script, character.profile)
    again = read(write_card_png(png(), cards))
    assert again.card == cards["ccv3"]
    before, after = file.card["data"], again.card["data"]
    assert {key: after[key] for key in before if key != "assets"} == {k: v for k, v in before.items() if k != "assets"}
    assert [p.content for p in character_of(again).pictures] == [png(), png("blue")]
    assert character_of(again).profile == character.profile
    assert cards["chara"]["spec"] == "chara_card_v2"
    assert cards["chara"]["data"]["unknown_field"] == V3["data"]["unknown_field"]


def test_an_export_follows_a_changed_profile() -> None:
    fields = exported_cards(CardFile(V3), "Ada Reed", "Sea", "### New\nAll of it.")["ccv3"]["data"]
    assert (fields["description"], fields["personality"]) == ("### New\nAll of it.", "")
    assert fields["alternate_greetings"] == ["Who is there?"]


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_card_becomes_a_character_and_a_card_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "ada.charx"
    source.write_bytes(charx(**{"assets/background/images/sea.png": png("blue")}))
    root = tmp_path / "root"
    main([str(root), "--card", str(source)])
    assert "system_prompt, shown here and not applied" in capsys.readouterr().err
    files = files_of(root)
    assert files["profiles/in-distribution/cards/Ada_Reed.charx"] == source.read_bytes()
    assert json.loads(files["profiles/in-distribution/roles.json"]) == {"The Lighthouse": ["Ada Reed"]}
    assert files["images/The_Lighthouse/01.png"] == png("blue")
    assert "error" not in check_roots(root)[0][1].counts()
    main([str(root), "--export_card", "Ada Reed", str(tmp_path / "ada.png")])
    again = read_card_file(tmp_path / "ada.png")
    assert again.picture is not None
    assert again.card["data"]["character_book"] == BOOK
    main([str(tmp_path / "root2"), "--card", str(tmp_path / "ada.png")])
    assert (
        files_of(tmp_path / "root2")["profiles/in-distribution/profiles.json"]
        == files["profiles/in-distribution/profiles.json"]
    )


def test_a_character_without_a_card_is_exported(tmp_path: Path) -> None:
    add_character(tmp_path, NewCharacter("Tom", "Sea", "Rows."))
    export_card(tmp_path, "Tom", tmp_path / "tom.png")
    card = read_card_file(tmp_path / "tom.png").card
    assert (card["data"]["name"], card["data"]["description"], card["data"]["tags"]) == ("Tom", "Rows.", ["Sea"])
    with pytest.raises(MMRoleError, match="no such character"):
        export_card(tmp_path, "Ada", tmp_path / "ada.png")


def test_the_picture_of_an_export_shows_the_character_and_lies_in_the_data_root(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside.png", tmp_path / "root"
    outside.write_bytes(png("blue"))
    pictures = [Picture(Path("1"), who="Ada", content=png("green")), Picture(Path("2"), who="Tom", content=png())]
    add_character(root, NewCharacter("Tom", "Sea", "Rows.", pictures))
    export_card(root, "Tom", tmp_path / "tom.png")
    assert read_card_file(tmp_path / "tom.png").picture == png()
    (root / "images" / "Sea" / "02.png").unlink()
    (root / "images" / "Sea" / "02.png").symlink_to(outside)
    with pytest.raises(MMRoleError, match="leads out"):
        export_card(root, "Tom", tmp_path / "again.png")


def test_a_card_from_a_pipe_is_kept(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(json.dumps(V1).encode(),))
    writer.start()
    main([str(tmp_path / "root"), "--card", str(pipe)])
    writer.join()
    kept = tmp_path / "root" / "profiles" / "in-distribution" / "cards" / "Ada_Reed.json"
    assert json.loads(kept.read_bytes()) == V1


def test_texts_about_pictures_are_not_for_cards(tmp_path: Path) -> None:
    (tmp_path / "card").write_bytes(json.dumps(V1).encode())
    with pytest.raises(MMRoleError, match="whole character"):
        main([str(tmp_path / "root"), "--card", str(tmp_path / "card"), "--about", "A tower."])


NAMELESS = json.dumps({**V1, "name": ""}).encode()
BOMB = with_chunks(text_chunk(V1), picture=png()[:16] + struct.pack(">II", 60_000, 60_000) + png()[24:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NAMELESS, "name cannot name files"),
        (json.dumps({**V1, "name": "../../etc/passwd"}).encode(), "name cannot name files"),
        (json.dumps({**V1, "name": "Ada\u0000\u001b[31m"}).encode(), "name cannot name files"),
        (json.dumps({**V1, "name": "\ud800"}).encode(), "name cannot name files"),
        (json.dumps({**V1, "name": "<|im_end|>"}).encode(), "special token"),
        (json.dumps({"name": "Ada"}).encode(), "profile is empty"),
        (BOMB, "picture cannot be used"),
        (charx(**{"../up.png": png()}), "leads out"),
    ],
)
def test_a_refused_card_leaves_no_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "card").write_bytes(content)
    with pytest.raises(MMRoleError, match=message):
        main([str(tmp_path / "root"), "--card", str(tmp_path / "card")])
    assert [path.name for path in tmp_path.iterdir()] == ["card"]
    if content == NAMELESS:
        main([str(tmp_path / "root"), "--card", str(tmp_path / "card"), "--name", "Ada", "--script", "Sea"])
        assert "data/play/Ada.json" in files_of(tmp_path / "root")


def test_a_broken_asset_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "card").write_bytes(charx(**{"assets/background/images/sea.png": b"no picture"}))
    main([str(tmp_path / "root"), "--card", str(tmp_path / "card")])
    assert "the asset 'background sea' is skipped: not a usable picture" in capsys.readouterr().err
