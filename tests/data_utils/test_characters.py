"""New characters: what is written, what is refused, and the example in the documentation."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference
from data_utils.characters.__main__ import main
from data_utils.characters.importer import NewCharacter, Picture, add_character, read_folder
from data_utils.check.roots import check_roots
from data_utils.demo.world import draw_world, write_world
from data_utils.errors import MMRoleError, ProblemsError
from data_utils.layout import PLAIN_IMAGE, SPLITS
from data_utils.prompts import SYSTEM_MESSAGE
from data_utils.schema import TestSample, validate_rows
from eval.running.flags import selection
from eval.running.inputs import read_inputs

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "own_characters.md"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "tower.png"
    Image.new("RGB", (60, 40), (200, 30, 30)).save(path)
    return path


def read(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def test_published_layout(tmp_path: Path, picture: Path) -> None:
    root = tmp_path / "mine"
    ada = NewCharacter("Ada Reed", "The Lighthouse", "Keeps a light.", [Picture(picture, "A tower.", "Grey Point")])
    play = add_character(root, ada, ["What is it?", "Whose is it?"])
    assert read(root / "profiles/in-distribution/profiles.json") == {"Ada Reed": "Keeps a light."}
    assert read(root / "profiles/in-distribution/roles.json") == {"The Lighthouse": ["Ada Reed"]}
    assert read(root / "images/annotations.json") == [
        {
            "image": "The_Lighthouse/01.png",
            "role_info": "",
            "place_info": "Grey Point",
            "scene_info": "A tower.",
        }
    ]
    assert (root / "images/The_Lighthouse/01.png").read_bytes() == picture.read_bytes()
    rows = read(play)
    assert validate_rows(rows, TestSample, play) == []
    assert [row["image"] for row in rows] == ["The_Lighthouse/01.png"] * 2
    assert rows[1]["system"] == SYSTEM_MESSAGE
    prompt = rows[1]["conversations"][0]["value"]
    assert prompt.startswith("Please step into the shoes of Ada Reed from The Lighthouse. ")
    assert " - Scene information: A tower.\n" in prompt
    assert prompt.endswith("vocabulary of Ada Reed:\nWhose is it?")
    assert "error" not in check_roots(root)[0][1].counts()


def test_a_second_call_adds_and_repeats_nothing(tmp_path: Path, picture: Path) -> None:
    root = tmp_path / "mine"
    add_character(root, NewCharacter("Ada", "Sea", "One.", [Picture(picture)]))
    add_character(root, NewCharacter("Ada", "Sea", "Two.", [Picture(picture)]))
    add_character(root, NewCharacter("Tom", "Sea", "Three."))
    assert read(root / "profiles/in-distribution/profiles.json") == {"Ada": "Two.", "Tom": "Three."}
    assert read(root / "profiles/in-distribution/roles.json") == {"Sea": ["Ada", "Tom"]}
    assert len(read(root / "images/annotations.json")) == 1


def test_a_killed_run_is_resumed(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed at any file is completed by the next one, under the same names."""
    ada = NewCharacter("Ada", "Sea", "One.", [Picture(picture, "A tower.")])
    add_character(tmp_path / "whole", ada)
    whole = {path.relative_to(tmp_path / "whole"): path.read_bytes() for path in (tmp_path / "whole").rglob("*.*")}
    replace = Path.replace  # with which every file appears
    for number in range(len(whole)):
        left = [number]

        def killed(temporary: Path, path: Path, left: list[int] = left) -> Path:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return replace(temporary, path)

        root = tmp_path / f"killed{number}"
        monkeypatch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            add_character(root, ada)
        monkeypatch.undo()
        add_character(root, ada)
        assert {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*")} == whole


def pixels_of(path: Path) -> tuple[str, tuple[int, int], list[tuple[int, ...]]]:
    with Image.open(path) as image:
        return image.mode, image.size, [image.getpixel(corner) for corner in ((0, 0), (image.width - 1, 0))]


def test_pictures_are_stored_upright_in_8_bit_rgb(tmp_path: Path) -> None:
    """From a phone, a scanner and a drawing program: the model would see them turned, white and black."""
    phone = Image.new("RGB", (60, 40), (250, 0, 0))
    phone.paste((0, 0, 250), (30, 0, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    phone.save(tmp_path / "phone.png", exif=exif)
    Image.fromarray(np.full((8, 8), 32_768, np.uint16)).save(tmp_path / "scan.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "logo.png")
    pictures = [Picture(tmp_path / f"{name}.png") for name in ("phone", "scan", "logo")]
    for _ in range(2):  # the second time nothing is new
        add_character(tmp_path / "mine", NewCharacter("Ada", "Sea", "One.", pictures))
    stored = sorted((tmp_path / "mine/images/Sea").iterdir())
    assert [pixels_of(path) for path in stored] == [
        ("RGB", (60, 40), [(0, 0, 250), (250, 0, 0)]),
        ("RGB", (8, 8), [(128, 128, 128)] * 2),
        ("RGB", (8, 8), [(255, 255, 255)] * 2),
    ]


def test_a_character_without_pictures_is_shown_a_plain_one(tmp_path: Path) -> None:
    play = add_character(tmp_path, NewCharacter("Ada", "Sea", "One."))
    assert {row["image"] for row in read(play)} == {PLAIN_IMAGE}
    assert Image.open(tmp_path / "images" / PLAIN_IMAGE).size == (448, 448)
    assert check_roots(tmp_path)[0][1].counts() == {}


def test_extends_a_published_root(tmp_path: Path, picture: Path) -> None:
    root = tmp_path / "world"
    write_world(draw_world(2), root)
    before = check_roots(root)[0][1]
    add_character(root, NewCharacter("Ada Reed", "Sea", "One.", [Picture(picture, "A tower.")], SPLITS[1]))
    after = check_roots(root)[0][1]
    assert after.checked["characters"] == before.checked["characters"] + 1
    assert {**after.counts(), "unused_image": 0} == {**before.counts(), "unused_image": 0}


def test_all_faults_at_once_and_nothing_written(tmp_path: Path, picture: Path) -> None:
    picture.write_bytes(picture.read_bytes()[:60])
    wrong = NewCharacter("a/b", "Sea", "  ", [Picture(picture, "<img>x</img>"), Picture(tmp_path / "none.jpg")])
    with pytest.raises(ProblemsError) as caught:
        add_character(tmp_path / "mine", wrong)
    message = str(caught.value)
    for part in ("--name", "the profile is empty", "<img>", picture.name, "none.jpg"):
        assert part in message
    assert not (tmp_path / "mine").exists()


def test_a_character_of_another_script_or_split_is_refused(tmp_path: Path) -> None:
    add_character(tmp_path, NewCharacter("Ada", "Sea", "One."))
    with pytest.raises(ProblemsError, match="another script"):
        add_character(tmp_path, NewCharacter("Ada", "Land", "One."))
    with pytest.raises(ProblemsError, match="other split"):
        add_character(tmp_path, NewCharacter("Ada", "Sea", "One.", split=SPLITS[1]))


def test_names_and_texts_that_cannot_be_kept(tmp_path: Path, picture: Path) -> None:
    add_character(tmp_path / "mine", NewCharacter("Ada Reed", "Sea", "One."))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    for name, words in (
        ("Ada_Reed", "another character's files"),
        ("<|im_end|>", "special token"),
        ("\udcb0", "not UTF-8"),
    ):
        with pytest.raises(MMRoleError, match=words):
            add_character(tmp_path / "mine", NewCharacter(name, "Sea", "One.", [Picture(picture)]))
    with pytest.raises(MMRoleError, match="not UTF-8"):
        add_character(tmp_path / "mine", NewCharacter("Tom", "Sea", "One.", [Picture(picture)]), ["\udcff?"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


def test_a_folder_is_read_and_the_rest_is_reported(
    tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "Ada"
    folder.mkdir()
    for name in ("profile.png", "one.png"):
        (folder / name).write_bytes(picture.read_bytes())
    for name, text in (("profile.txt", "Keeps a light."), ("one.txt", "A tower."), ("two.txt", "?"), ("three.gif", "")):
        (folder / name).write_text(text, encoding="utf-8-sig")
    (folder / ".hidden").touch()
    (folder / "._one.png").write_bytes(b"what macOS writes on foreign disks")
    profile, pictures = read_folder(folder)
    assert profile == "Keeps a light."
    assert [(p.path.name, p.about) for p in pictures] == [("one.png", "A tower."), ("profile.png", "")]
    result = capsys.readouterr().err.splitlines()
    assert [Path(line.partition(" (")[0]).name for line in result] == ["three.gif", "two.txt"]


def test_a_broken_data_root_is_not_touched(tmp_path: Path) -> None:
    roles = tmp_path / "profiles/in-distribution/roles.json"
    roles.parent.mkdir(parents=True)
    roles.write_text('{"Sea": "Ada"}', encoding="utf-8")
    with pytest.raises(ProblemsError, match="Sea: "):
        add_character(tmp_path, NewCharacter("Tom", "Sea", "One."))
    assert roles.read_text(encoding="utf-8") == '{"Sea": "Ada"}'


def test_command_line_needs_a_profile(tmp_path: Path) -> None:
    with pytest.raises(MMRoleError, match="a name and a profile"):
        main([str(tmp_path), "--name", "Ada"])
    (tmp_path / "ada").mkdir()
    with pytest.raises(MMRoleError, match=r"no profile\.txt"):
        main([str(tmp_path / "mine"), "--folder", str(tmp_path / "ada")])


def guide_blocks() -> list[tuple[str, str]]:
    """The guide's shell blocks: what each needs, and its text."""
    return re.findall(r"^```bash ?([\w-]*)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_block(text: str, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = f"set -euo pipefail\n{text}"
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_worked_example(tmp_path: Path) -> None:
    write_world(draw_world(2), tmp_path / "published_data")
    blocks = guide_blocks()
    assert [needs for needs, _ in blocks if needs] == ["needs-checkpoint", "needs-data"] * 2
    data = tmp_path / "my_data"
    for needs, text in blocks:
        if needs != "needs-checkpoint":
            run_block(text, tmp_path)
    written = {path: path.read_bytes() for path in data.rglob("*.*")}
    for needs, text in blocks:  # once more, and nothing changes
        if needs != "needs-checkpoint":
            run_block(text, tmp_path)
    assert {path: path.read_bytes() for path in data.rglob("*.*")} == written
    assert len(read(data / "data/play/Ada_Reed.json")) == 2
    assert [row["role"] for row in read(data / "data/train/train_85k.json")] == ["Tom Marsh", "Ada Reed"]
    both = read(tmp_path / "published_data/data/train/train_85k.json")
    assert [row["id"] for row in both if row["role"] == "Ada Reed"] == ["Ada_Reed_role-role-dialogue_script_0_1"]
    assert (tmp_path / "published_data/images/The_Lighthouse/01.jpg").is_file()
    tests = read(data / "data/test/out-of-distribution/comment_test.json")
    assert [row["conversations"][1]["value"] for row in tests] == ["Too calm. Somebody has tidied up."]
    # The commands that need a checkpoint: their inputs pass everything that is checked before a model is loaded.
    played, tested = (text.replace("\\\n", "").split("\n")[0] for needs, text in blocks if needs == "needs-checkpoint")
    assert inputs_of(played, tmp_path) == {
        f"{name}.json": 2 for name in ("Maud_Keller", "Ada_Reed", "Tom_Marsh", "Inspector_Vale")
    }
    assert sum(inputs_of(tested, tmp_path).values()) == 1


def inputs_of(command: str, folder: Path) -> dict[str, int]:
    """The files that an answering command reads, and how many rows of them."""
    flags = re.findall(r"(--\w+) (\S+)", command)
    arguments = [part if part.startswith("--") else str(folder / part) for flag in flags for part in flag]
    options = inference.parse_arguments(arguments)
    sources, problems = inference.find_sources(options)
    assert problems == []
    inputs, wrong = read_inputs(sources, TestSample, selection(options, needs_image=lambda row: True))
    assert wrong == []
    rows: dict[str, int] = {}
    for source in inputs:
        rows[source.source.input.name] = rows.get(source.source.input.name, 0) + len(source.rows)
    return rows
