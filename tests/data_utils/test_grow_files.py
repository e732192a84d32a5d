"""Growing data: what stands in files stays the user's, and what is wrong is told before anything is paid for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_utils.check.roots import check_roots
from data_utils.errors import MMRoleError, ProblemsError
from data_utils.files import read_json
from data_utils.grow import run as grow
from data_utils.grow.client import Budget, Endpoint, NoAnswerError, Settings
from data_utils.grow.run import PROMPTS, Templates, main
from data_utils.roots import Characters
from tests.data_utils import test_grow
from tests.data_utils.test_grow import SUMMARY, Site, dialogues_of, grow_dialogues

site, demo, cast = test_grow.site, test_grow.demo, test_grow.cast


def ids_of(root: Path) -> list[str]:
    return [row["id"] for row in dialogues_of(root)]


def grow_person(site: Site, root: Path, facts: Any, *flags: str) -> int:
    path = root.parent / "facts.json"
    path.write_text(json.dumps(facts), encoding="utf-8")
    return main(["person", str(root), "--model", "m", "--base_url", site.url, "--facts", str(path), *flags])


def profiles_of(root: Path) -> Path:
    return root / "profiles/in-distribution/profiles.json"


def rewrite(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def test_ids_of_the_source_are_not_given_again(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    source, root = Path(shutil.copytree(demo, tmp_path / "source")), tmp_path / "grown"
    assert grow_dialogues(site, source, root, "--characters", *sorted(cast.profiles)[:2], "--partner", "柳青舟") == 0
    assert ids_of(root)
    assert not set(ids_of(source)) & set(ids_of(root))
    found = check_roots(source, [root])
    assert not [name for _, part in found for name in part.counts() if "id" in name.split("_")]


def test_what_is_named_twice_is_grown_once(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    name = min(cast.profiles)
    image = min(f"COCO/train2017/{path.name}" for path in (demo / "images/COCO/train2017").glob("*.jpg"))
    flags = ["--characters", name, name, "--kinds", "comment", "--images", image, image]
    assert grow_dialogues(site, demo, tmp_path, *flags) == 0
    assert len(site.asked) == len(dialogues_of(tmp_path)) == 1


def test_edited_and_deleted_dialogues_stay_so(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character"]
    assert grow_dialogues(site, demo, tmp_path, *flags, "3") == 0
    files = {path: read_json(path) for path in (tmp_path / "dialogues").rglob("*.json")}
    path, rows = max(files.items(), key=lambda item: len(item[1]))
    rows[0]["conversations"][1]["value"] = "By hand."
    rewrite(path, rows[:-1])
    before = dialogues_of(tmp_path)
    assert grow_dialogues(site, demo, tmp_path, *flags, "3") == 0
    assert dialogues_of(tmp_path) == before
    assert len(site.asked) == 3


def test_edited_profiles_stay_so(site: Site, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert grow_person(site, root, {"name": "Ines"}) == 0
    rewrite(profiles_of(root), {"Ines": "By hand."})
    assert grow_person(site, root, [{"name": "Ines"}, {"name": "Otto"}]) == 0
    assert read_json(profiles_of(root)) == {"Ines": "By hand.", "Otto": SUMMARY}
    assert grow_person(site, root, {"name": "Ines"}, "--overwrite") == 0
    assert read_json(profiles_of(root)) == {"Ines": SUMMARY, "Otto": SUMMARY}


def test_a_profile_of_ones_own_is_not_replaced(site: Site, tmp_path: Path, monkeypatch, capsys) -> None:
    root = tmp_path / "root"
    write = grow.write_profile
    monkeypatch.setattr(grow, "write_profile", lambda *_: [])  # one that comes while it is grown
    assert grow_person(site, root, {"name": "Ines"}) == 0
    monkeypatch.setattr(grow, "write_profile", write)
    journal = root / "profiles/grown.journal"
    lines = [line for line in journal.read_text(encoding="utf-8").splitlines(True) if '"written"' not in line]
    journal.write_text("".join(lines), encoding="utf-8")
    profiles_of(root).parent.mkdir(parents=True)
    rewrite(profiles_of(root), {"Ines": "By hand."})
    assert grow_person(site, root, {"name": "Ines"}) == 0
    assert read_json(profiles_of(root)) == {"Ines": "By hand."}
    assert "another profile of Ines is there" in capsys.readouterr().err
    site.faults = ["say no"] * 9
    assert grow_person(site, root, {"name": "Otto"}) == 1
    rewrite(profiles_of(root), {"Ines": "By hand.", "Otto": "Too."})
    with pytest.raises(MMRoleError, match="a profile already"):  # nothing of Otto was grown here
        grow_person(site, root, {"name": "Otto"})


def test_overwriting_replaces_what_is_planned_when_it_has_passed(
    site: Site, demo: Path, tmp_path: Path, cast: Characters
) -> None:
    coco = sorted(f"COCO/train2017/{p.name}" for p in (demo / "images/COCO/train2017").glob("*.jpg"))
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images"]
    assert grow_dialogues(site, demo, tmp_path, *flags, *coco[:3]) == 0
    before = dialogues_of(tmp_path)
    site.faults = ["401"] * 2
    with pytest.raises(MMRoleError, match="refuses"):
        grow_dialogues(site, demo, tmp_path, *flags, *coco[:2], "--overwrite", "--temperature", "0.5")
    site.faults = []  # the run may have ended before its second request
    assert dialogues_of(tmp_path) == before
    assert grow_dialogues(site, demo, tmp_path, *flags, *coco[:3]) == 0  # as if it had not been tried
    count, new = len(site.asked), ["--temperature", "0.5"]
    limit = ["--overwrite", "--max_requests", "1", "--workers", "1"]
    assert grow_dialogues(site, demo, tmp_path, *flags, *coco[:2], *new, *limit) == 1
    after = dialogues_of(tmp_path)
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert [a == b for a, b in zip(after, before, strict=True)] == [False, True, True]
    assert grow_dialogues(site, demo, tmp_path, *flags, *coco[:2], *new) == 0  # goes on with the second
    assert dialogues_of(tmp_path)[0] == after[0]
    assert [a == b for a, b in zip(dialogues_of(tmp_path), before, strict=True)] == [False, False, True]
    assert grow_dialogues(site, demo, tmp_path, *flags, *coco[:2], *new) == 0
    assert len(site.asked) == count + 2
    site.faults = ["say As an AI, I see nothing."] * 3
    after = dialogues_of(tmp_path)
    assert grow_dialogues(site, demo, tmp_path, *flags, coco[0], *new, "--overwrite") == 1
    assert dialogues_of(tmp_path) == after


BAD_FACTS = [
    ([{"name": "Ines"}, {"name": "Ines"}], "the same name"),
    ([{"name": "Ines R"}, {"name": "Ines_R"}], "the same name"),
    ([], "no facts"),
    ({"name": "human"}, "human is who talks"),
    ({"name": "Ines <|im_end|>"}, "cannot name a file"),
    ({"name": "Ines\ud800"}, "surrogate"),
    ({"name": "Ines", "origin": "\ud800"}, "surrogate"),
    ({"name": "Otto_Ray"}, "another character's files"),
]


@pytest.mark.parametrize(("facts", "words"), BAD_FACTS)
def test_facts_that_are_not_asked_for(site: Site, tmp_path: Path, facts: Any, words: str) -> None:
    root = tmp_path / "root"
    profiles_of(root).parent.mkdir(parents=True)
    rewrite(profiles_of(root), {"Otto Ray": "A profile."})
    with pytest.raises(MMRoleError, match=words):
        grow_person(site, root, facts)
    assert site.asked == []


def test_bytes_and_marks_of_other_encodings(site: Site, tmp_path: Path) -> None:
    text, root = tmp_path / "ada.txt", tmp_path / "root"
    text.write_text("Ada was here.", encoding="utf-8-sig")
    flags = ["profile", str(root), "--model", "m", "--base_url", site.url, "--script", "My Novel", "--text", str(text)]
    with pytest.raises(MMRoleError, match="not UTF-8"):
        main([*flags, "--name", "\udcb0\udca1"])
    assert not root.exists()
    assert main([*flags, "--name", "Ada"]) == 0
    raw = root / "profiles/in-distribution/raw_info_en/Ada.txt"
    assert raw.read_text(encoding="utf-8") == "Ada was here."


def test_templates_with_faults_are_told_at_once(tmp_path: Path) -> None:
    mine = Path(shutil.copytree(PROMPTS, tmp_path / "prompts"))
    questions = mine / "questions_English.txt"
    questions.write_text("\ufeffWhat is it?\n\n  Whose is it? \n", encoding="utf-8")
    assert Templates(mine).questions["English"] == ["What is it?", "Whose is it?"]
    questions.write_text("Is it <img>?\n", encoding="utf-8")
    (mine / "questions_Chinese.txt").write_text(" \n", encoding="utf-8")
    (mine / "comment.txt").write_text("a\n---\n$nothing", encoding="utf-8")
    (mine / "human-role.txt").write_text("---\nSay it.", encoding="utf-8")
    (mine / "inter-role.txt").write_text("Say it.\n---\n", encoding="utf-8")
    with pytest.raises(ProblemsError) as caught:
        Templates(mine)
    told = str(caught.value)
    for words in ("holds <img>", "no questions", "nothing", "nothing before its line ---", "nothing after its line"):
        assert words in told
    assert "no line ---" not in told


@pytest.mark.parametrize("choices", [{"a": 1}, "x", ["x"], None, 3])
def test_choices_of_another_form(site: Site, choices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = {"id": "1", "object": "chat.completion", "choices": choices}
    monkeypatch.setattr(test_grow.Handler, "reply", lambda *_: (200, reply))
    with pytest.raises(NoAnswerError, match="no chat completion"):
        Endpoint(Settings("m", site.url, attempts=1), Budget()).ask("s", "u")


def test_failures_alone_pin_no_settings(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "1"]
    site.faults = ["say As an AI, I see nothing."] * 3
    assert grow_dialogues(site, demo, tmp_path, *flags) == 1
    assert grow_dialogues(site, demo, tmp_path, *flags, "--temperature", "0.5") == 0
    with pytest.raises(MMRoleError, match="different settings"):
        grow_dialogues(site, demo, tmp_path, *flags)


def test_broken_images_are_told_before_any_request(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    source = Path(shutil.copytree(demo, tmp_path / "source"))
    names = [f"COCO/train2017/{path.name}" for path in sorted((source / "images/COCO/train2017").glob("*.jpg"))[:3]]
    for name in names[1:]:
        (source / "images" / name).write_bytes(b"no image")
    with pytest.raises(MMRoleError) as caught:
        grow_dialogues(site, source, tmp_path / "root", "--characters", min(cast.profiles), "--images", *names)
    assert all(name in str(caught.value) for name in names[1:])
    assert site.asked == []
    assert not (tmp_path / "root").exists()


def test_why_the_budget_was_spent(site: Site, demo: Path, tmp_path: Path, cast: Characters, capsys) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "1"]
    site.faults = ["not json"] * 9
    assert grow_dialogues(site, demo, tmp_path, *flags, "--max_requests", "2") == 1
    assert "left after this: the endpoint's answer is not JSON" in capsys.readouterr().out
    site.faults = ["say As an AI, I see nothing."]
    assert grow_dialogues(site, demo, tmp_path, *flags, "--max_requests", "1") == 1
    assert "left after this: the model speaks as itself" in capsys.readouterr().out
    assert grow_dialogues(site, demo, tmp_path, *flags, "--max_tokens_total", "50") == 1
    told = capsys.readouterr().out
    assert "a request reserves" in told
    assert "more than --max_tokens_total 50" in told
