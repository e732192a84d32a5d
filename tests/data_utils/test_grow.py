"""Growing data against a server on loopback that also answers garbage, 429, 500, and quotes the key back."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_utils.check.roots import check_roots
from data_utils.endpoint import Endpoint
from data_utils.errors import MMRoleError, ProblemsError, run_main
from data_utils.files import read_json
from data_utils.grow import run as run_module
from data_utils.grow.__main__ import main
from data_utils.grow.plan import image_url
from data_utils.grow.templates import PROMPTS, Templates
from data_utils.grow.validation import (
    UnusableError,
    dialogue_problem,
    read_comment,
    read_detailed_profile,
    read_summary,
    read_turns,
)
from data_utils.roots import Characters, read_profiles
from data_utils.samples import iterate_samples
from tests.data_utils.loopback import SECRET, Reply, Site, completion, refusal, scripted

pytest.importorskip("openai")

ROOT = Path(__file__).resolve().parents[2]


PARTS = ("introduction", "personality", "experience", "relationship", "catchphrase")
DETAILED = {part: f"Something about the {part} of the character." for part in PARTS}
SUMMARY = "\n".join(f"### {part.title()}\nA sentence or two about this part of the character." for part in PARTS)


def text_of(request: dict[str, Any]) -> str:
    content = request["messages"][1]["content"]
    return content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")


def good_answer(request: dict[str, Any], number: int) -> str:
    """Return an answer of a strong model."""
    text = text_of(request)
    if "Shorten the profile" in text:
        return SUMMARY
    if "five keys" in text:
        return f"Here it is:\n```json\n{json.dumps(DETAILED)}\n```"
    turns = re.search(r"take turns, (\d+) turns", text)
    if not turns:
        return f"I see a picture, and it is the picture number {number} of this day."
    first, second = re.search(r'"speaker": "([^"]+)" or "([^"]+)"', text).groups()
    said = [{"speaker": (first, second)[i % 2], "text": f"I say {number} and {i}."} for i in range(int(turns[1]))]
    return json.dumps(said)


def quoting(status: int) -> Reply:
    """An error that quotes the key, and another key as OpenAI shortens it."""
    message = f"no: your key is {SECRET}, sk-abcd********wxyz"
    return refusal(status, message, code="x", headers={"Retry-After": "0"} if status == 429 else {})


@pytest.fixture
def site(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr("data_utils.endpoint.random.uniform", lambda *_: 0.01)  # the wait before a retry
    site.chat = good_answer
    return site


def endpoint(site: Site) -> list[str]:
    return ["--model", "m", "--base_url", f"{site.url}/v1"]


@pytest.fixture
def cast(demo: Path) -> Characters:
    return characters_of(demo)


def characters_of(root: Path) -> Characters:
    found, problems = read_profiles(root, "in-distribution")
    assert problems == []
    return Characters(found.profiles, found.scripts)


def grow_dialogues(site: Site, demo: Path, root: Path, *flags: str) -> int:
    return main(["dialogues", str(root), "--source", str(demo), *endpoint(site), *flags])


def dialogues_of(root: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((root / "dialogues").rglob("*.json")) for row in read_json(path)]


def kind_of(dialogue: dict[str, Any]) -> str:
    names = {"comment": "comment", "human-role-dialogue": "human-role", "role-role-dialogue": "inter-role"}
    return next(kind for name, kind in names.items() if f"_{name}_" in dialogue["id"])


def test_dialogues_of_the_three_kinds(site: Site, demo: Path, tmp_path: Path, cast: Characters, capsys) -> None:
    name = min(cast.profiles)
    coco = sorted(p.name for p in (demo / "images/COCO/train2017").glob("*.jpg"))[0]
    folder = cast.scripts[name].replace(" ", "_")
    images = [f"COCO/train2017/{coco}", f"{folder}/01.jpg"]
    assert grow_dialogues(site, demo, tmp_path, "--characters", name, "--images", *images) == 0
    rows = dialogues_of(tmp_path)
    assert sorted((kind_of(row), row["image"]) for row in rows) == sorted(
        (kind, image) for kind in ("comment", "human-role", "inter-role") for image in images
    )
    files = sorted(p.relative_to(tmp_path / "dialogues/in-distribution").as_posix() for p in tmp_path.rglob("*.json"))
    stem = name.replace(" ", "_")
    assert files[:2] == [f"comment/{stem}_COCO.json", f"comment/{stem}_script.json"]
    for row in rows:
        assert dialogue_problem(row, kind_of(row), "English") is None
        assert ("scene_info" in row) == (not row["image"].startswith("COCO/"))
    # They can be built from, in the published way; the annotations came along.
    samples = list(iterate_samples(rows, cast))
    assert len(samples) == sum(1 if "from" in t else t["role"] != "human" for r in rows for t in r["conversations"]) - 2
    assert "6 grown, 0 failed, 0 left" in capsys.readouterr().out
    request = site.chats[0]
    url = next(part["image_url"]["url"] for part in request["messages"][1]["content"] if "image_url" in part)
    sent = base64.b64decode(url.partition(",")[2])
    assert sent in {(demo / "images" / image).read_bytes() for image in images}
    assert any(cast.profiles[name] in text_of(request) for request in site.chats)


BAD_ANSWERS = {
    "thinking": '<think>Maybe [{"speaker": "x"}]',
    "429": quoting(429),
    "500": quoting(500),
    "503": quoting(503),
    "hang up": Reply(fault="hang up"),
    "not JSON": Reply(body=b"<html>busy</html>"),
    "no completion": Reply(body={"object": "list", "data": []}),
    "cut off": lambda body, number: completion(good_answer(body, number), finish="length"),
    "empty": "",
    "no list": "no JSON",
    "unknown speaker": '[{"speaker": "x"}]',
}


@pytest.mark.parametrize("bad", BAD_ANSWERS)
def test_bad_answers_are_requested_again(site: Site, demo: Path, tmp_path: Path, cast: Characters, bad: str) -> None:
    site.chat = scripted(BAD_ANSWERS[bad], good_answer)
    flags = ["--characters", min(cast.profiles), "--kinds", "human-role", "--images_per_character", "1"]
    assert grow_dialogues(site, demo, tmp_path, *flags) == 0
    (row,) = dialogues_of(tmp_path)
    assert dialogue_problem(row, "human-role", "English") is None
    assert len(site.chats) == 2


def test_what_never_passes_is_not_kept_and_asked_for_next_time(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, capsys
) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "1", "--tries", "2"]
    site.chat = scripted("Look: <|im_end|>", "As an AI, I see nothing.", good_answer)
    assert grow_dialogues(site, demo, tmp_path, *flags) == 1
    assert dialogues_of(tmp_path) == []
    assert "the model speaks as itself" in capsys.readouterr().out
    assert grow_dialogues(site, demo, tmp_path, *flags) == 0
    assert len(dialogues_of(tmp_path)) == 1


def test_same_answer_twice_is_kept_once(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    site.chat = lambda body, number: "It is what it is."
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "3"]
    assert grow_dialogues(site, demo, tmp_path, *flags) == 1
    assert len(dialogues_of(tmp_path)) == 1


def test_second_run_asks_for_nothing_and_more_images_go_on(
    site: Site, demo: Path, tmp_path: Path, cast: Characters
) -> None:
    name = min(cast.profiles)
    coco = sorted(f"COCO/train2017/{p.name}" for p in (demo / "images/COCO/train2017").glob("*.jpg"))
    assert grow_dialogues(site, demo, tmp_path, "--characters", name, "--kinds", "comment", "--images", *coco[:2]) == 0
    first = dialogues_of(tmp_path)
    count = len(site.chats)
    assert grow_dialogues(site, demo, tmp_path, "--characters", name, "--kinds", "comment", "--images", *coco[:2]) == 0
    assert len(site.chats) == count
    assert grow_dialogues(site, demo, tmp_path, "--characters", name, "--kinds", "comment", "--images", *coco[:4]) == 0
    rows = dialogues_of(tmp_path)
    assert rows[:2] == first
    assert len(rows) == 4
    assert len({row["id"] for row in rows}) == 4
    assert len(site.chats) == count + 2


def test_killed_before_the_files_were_written(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    name = min(cast.profiles)
    coco = sorted(f"COCO/train2017/{p.name}" for p in (demo / "images/COCO/train2017").glob("*.jpg"))
    flags = ["--characters", name, "--kinds", "comment", "--images"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "write_json", killed)
        grow_dialogues(site, demo, tmp_path, *flags, *coco[:2])
    assert dialogues_of(tmp_path) == []  # the journal alone is left
    grow_dialogues(site, demo, tmp_path, *flags, *coco[2:3])
    rows = dialogues_of(tmp_path)
    assert sorted(row["image"] for row in rows) == coco[:3]
    assert len({row["id"] for row in rows}) == 3 == len(site.chats)


def test_budget_of_requests_and_going_on(site: Site, demo: Path, tmp_path: Path, cast: Characters, capsys) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "4"]
    assert grow_dialogues(site, demo, tmp_path, *flags, "--max_requests", "3") == 1
    assert len(site.chats) == 3
    assert len(dialogues_of(tmp_path)) == 3
    assert "3 grown, 0 failed, 1 left because the budget is spent; 3 requests, 300 tokens" in capsys.readouterr().out
    assert grow_dialogues(site, demo, tmp_path, *flags) == 0
    assert len(dialogues_of(tmp_path)) == 4
    assert len(site.chats) == 4


def test_budget_of_tokens_is_never_exceeded(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "4"]
    site.chat = lambda body, number: completion(good_answer(body, number), tokens=1200)
    assert grow_dialogues(site, demo, tmp_path, *flags, "--max_tokens_total", "4000", "--max_tokens", "200") == 1
    assert len(site.chats) == len(dialogues_of(tmp_path)) == 2  # a third might have gone over 4,000
    assert grow_dialogues(site, demo, tmp_path, *flags, "--max_tokens_total", "100") == 1
    assert len(site.chats) == 2


@pytest.mark.parametrize(
    "error",
    [quoting(401), quoting(403), quoting(404), refusal(429, "spent", code="insufficient_quota")],
    ids=["401", "403", "404", "quota"],
)
def test_refusal_ends_the_run_and_keeps_what_is_done(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, error: Reply
) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "4", "--workers", "1"]
    site.chat = scripted("First of all, a picture.", error)
    with pytest.raises(MMRoleError, match="refuses"):
        grow_dialogues(site, demo, tmp_path, *flags)
    assert len(dialogues_of(tmp_path)) == 1
    assert len(site.chats) == 2


@pytest.mark.parametrize("status", [401, 400, 500])
def test_key_is_nowhere(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, status: int, capfd, monkeypatch
) -> None:
    monkeypatch.setenv("OPENAI_LOG", "debug")
    site.chat = scripted(quoting(status))
    flags = ["--characters", min(cast.profiles), "--images_per_character", "1"]
    assert run_main(lambda: grow_dialogues(site, demo, tmp_path, *flags)) in (1, 2)
    assert set(site.keys) == {f"Bearer {SECRET}"}
    result = capfd.readouterr()
    assert SECRET not in result.out + result.err
    assert "wxyz" not in result.out + result.err
    assert "***" in result.out + result.err
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert SECRET not in path.read_text(encoding="utf-8")
        assert "wxyz" not in path.read_text(encoding="utf-8")


ESCAPED = "".join(f"\\u{ord(c):04x}" for c in SECRET)
LEAKS = {
    "comment": f"The key is {SECRET}, they say.",
    "human-role": f'[{{"speaker": "human", "text": "{SECRET}"}}]',
    "speaker": f'[{{"speaker": "{SECRET}", "text": "a"}}, {{"speaker": "{SECRET}", "text": "b"}}]',
    "escaped": f'[{{"speaker": "{ESCAPED}", "text": "a"}}, {{"speaker": "b", "text": "b"}}]',
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("times", [1, 20])
def test_key_in_an_answer_is_nowhere(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, capfd, leak: str, times: int
) -> None:
    site.chat = scripted(*[LEAKS[leak]] * times, good_answer)
    kind = "comment" if leak == "comment" else "human-role"
    flags = ["--characters", min(cast.profiles), "--images_per_character", "1", "--kinds", kind]
    # An escaped key is found when the answer is read, which is requested again; the others wait for the next run.
    for status in [1, 1] if times > 1 else [0] if leak == "escaped" else [1, 0]:
        assert grow_dialogues(site, demo, tmp_path, *flags) == status
    result = capfd.readouterr()
    assert SECRET not in result.out + result.err
    assert len(dialogues_of(tmp_path)) == int(times == 1)
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert SECRET not in path.read_text(encoding="utf-8")


def test_escaped_key_in_a_dialogue_is_nowhere(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    site.chat = lambda body, _: good_answer(body, 0).replace("I say 0 and 1.", f"My key is {ESCAPED}.")
    flags = ["--characters", min(cast.profiles), "--images_per_character", "1", "--kinds", "human-role"]
    assert grow_dialogues(site, demo, tmp_path, *flags) == 1
    assert dialogues_of(tmp_path) == []
    assert SECRET not in (tmp_path / "grown.jsonl").read_text(encoding="utf-8")


def interrupt(
    site: Site, requests: int, answer: Callable[[dict[str, Any], int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C arrives when so many requests wait for an answer, which they get after it."""
    arrived, stopped = threading.Semaphore(0), threading.Event()
    end = Endpoint.end

    def wait_and_answer(body: dict[str, Any], number: int) -> str:
        arrived.release()
        stopped.wait()
        return answer(body, number)

    def as_completed(_: object) -> Iterator[Any]:
        for _ in range(requests):
            arrived.acquire()
        raise KeyboardInterrupt

    site.chat = wait_and_answer
    monkeypatch.setattr(run_module, "as_completed", as_completed)
    monkeypatch.setattr(Endpoint, "end", lambda endpoint: (end(endpoint), stopped.set()))


def test_interrupt_keeps_what_is_under_way(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "4", "--workers", "2"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(site, 2, good_answer, patch)
        grow_dialogues(site, demo, tmp_path, *flags)
    assert len(site.chats) == len(dialogues_of(tmp_path)) == 2
    assert "waiting for 2 answer(s) under way" in capsys.readouterr().err
    site.chat = good_answer
    assert grow_dialogues(site, demo, tmp_path, *flags) == 0
    assert len(site.chats) == len(dialogues_of(tmp_path)) == 4


def test_interrupt_asks_for_nothing_again(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "4", "--workers", "2"]
    interrupt(site, 2, lambda *_: "As an AI, I see nothing.", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        grow_dialogues(site, demo, tmp_path, *flags)
    assert len(site.chats) == 2
    assert dialogues_of(tmp_path) == []


def test_second_interrupt_gives_up(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second Ctrl-C arrives while the message about the first one is printed."""
    messages = []

    class InterruptedStderr(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("waiting for 1 answer"):
                messages.append(text)
                raise KeyboardInterrupt
            return len(text)

    def answer(body: dict[str, Any], number: int) -> str:
        site.over.wait()  # until the test is over
        return "Too late."

    interrupt(site, 1, answer, monkeypatch)
    monkeypatch.setattr(sys, "stderr", InterruptedStderr())
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "1"]
    with pytest.raises(KeyboardInterrupt):
        grow_dialogues(site, demo, tmp_path, *flags)
    assert messages
    assert dialogues_of(tmp_path) == []


def test_profile_from_a_text(site: Site, tmp_path: Path) -> None:
    text = tmp_path / "ada.txt"
    text.write_text("Ada was the first to see what the engine could do.\n", encoding="utf-8")
    root = tmp_path / "root"
    flags = ["profile", str(root), *endpoint(site), "--name", "Ada L", "--script", "My Novel"]
    site.chat = scripted(quoting(500), "{}", "### One heading", good_answer)
    assert main([*flags, "--text", str(text)]) == 0
    folder = root / "profiles/in-distribution"
    assert read_json(folder / "profiles.json") == {"Ada L": SUMMARY}
    assert read_json(folder / "roles.json") == {"My Novel": ["Ada L"]}
    assert read_json(folder / "detailed_profiles/Ada_L.json") == DETAILED
    assert "first to see" in (folder / "raw_info_en/Ada_L.txt").read_text(encoding="utf-8")
    assert characters_of(root).role("Ada L").script == "My Novel"
    assert any("first to see" in text_of(request) for request in site.chats)
    count = len(site.chats)
    assert main([*flags, "--text", str(text)]) == 0
    assert len(site.chats) == count
    assert main([*flags, "--text", str(text), "--overwrite"]) == 0
    assert len(site.chats) == count + 2
    assert read_json(folder / "roles.json") == {"My Novel": ["Ada L"]}


def test_people_from_facts_then_their_dialogues(site: Site, demo: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    people = [{"name": "Ines Roth", "age": "41", "origin": "Basel"}, {"name": "Otto Ray", "origin": "Cork"}]
    facts.write_text(json.dumps(people), encoding="utf-8")
    root = tmp_path / "root"
    assert main(["person", str(root), *endpoint(site), "--facts", str(facts)]) == 0
    folder = root / "profiles/in-distribution"
    assert list(read_json(folder / "profiles.json")) == ["Ines Roth", "Otto Ray"]
    assert read_json(folder / "roles.json") == {"Hypothetical Characters": ["Ines Roth", "Otto Ray"]}
    assert read_json(folder / "meta_info_hypo/Ines_Roth.json") == people[0]
    assert any("41" in text_of(request) for request in site.chats)
    image = root / "images/mine/one.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(image)
    flags = [*endpoint(site), "--images", "mine/one.png"]
    assert main(["dialogues", str(root), *flags]) == 0
    rows = dialogues_of(root)
    assert len(rows) == 6
    assert len(list(iterate_samples(rows, characters_of(root)))) > 12


def test_existing_profile_is_not_replaced(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    root = tmp_path / "root"
    shutil.copytree(demo / "profiles", root / "profiles")
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps({"name": min(cast.profiles)}))
    with pytest.raises(MMRoleError, match="already has a profile"):
        main(["person", str(root), *endpoint(site), "--facts", str(facts)])
    assert site.chats == []


NAMES = ["../../evil", "AC/DC", ".x", "Ada ", "A" * 300]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", ["name", "script"])
def test_names_of_the_source_that_lead_elsewhere(site: Site, tmp_path: Path, name: str, bad: str) -> None:
    source, folder = tmp_path / "source", tmp_path / "source/profiles/in-distribution"
    who, script = (name, "Sea") if bad == "name" else ("Ada", name)
    folder.mkdir(parents=True)
    (folder / "profiles.json").write_text(json.dumps({who: "A profile."}), encoding="utf-8")
    (folder / "roles.json").write_text(json.dumps({script: [who]}), encoding="utf-8")
    (source / "images").mkdir()
    Image.new("RGB", (9, 9)).save(source / "images/one.png")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MMRoleError, match="cannot name a file") as caught:
        grow_dialogues(site, source, tmp_path / "a/b/root", "--kinds", "comment", "--images", "one.png")
    assert "roles.json" in str(caught.value)
    assert site.chats == []
    assert sorted(tmp_path.rglob("*")) == before


def test_everything_wrong_with_names_is_reported_at_once(site: Site, demo: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(demo, tmp_path / "source"))
    folder = source / "profiles/in-distribution"
    for name, edit in (("profiles.json", {"a/b": "x", ".c": "y"}), ("roles.json", {"Sea": ["a/b", ".c"]})):
        content = {**read_json(folder / name), **edit}
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(MMRoleError) as caught:
        grow_dialogues(site, source, tmp_path / "root", "--characters", "a/b", ".c", "Nobody")
    assert all(part in str(caught.value) for part in ("a/b", ".c", "Nobody"))


WRONG = {
    "profiles/in-distribution/profiles.json": ["A"],
    "profiles/in-distribution/roles.json": [1],
    "images/annotations.json": [{"image": "a.jpg"}],
    "dialogues/in-distribution/comment/x.json": [{"conversations": []}],
}


@pytest.mark.parametrize("name", WRONG)
def test_ill_typed_files_are_reported(site: Site, demo: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(demo, tmp_path / "root"))
    (root / name).write_text(json.dumps(WRONG[name]), encoding="utf-8")
    with pytest.raises(MMRoleError) as caught:
        grow_dialogues(site, root, root)
    assert name in str(caught.value)
    if name.startswith("profiles"):
        (tmp_path / "facts.json").write_text('{"name": "New"}', encoding="utf-8")
        facts = ["person", str(root), *endpoint(site), "--facts", str(tmp_path / "facts.json")]
        with pytest.raises(MMRoleError, match="valid dictionary"):
            main(facts)
    assert site.chats == []


def test_a_broken_file_of_dialogues_is_reported(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "1"]
    path = tmp_path / "dialogues/in-distribution/comment/mine.json"
    path.parent.mkdir(parents=True)
    path.write_text("[", encoding="utf-8")
    with pytest.raises(MMRoleError, match="not valid JSON"):
        grow_dialogues(site, demo, tmp_path, *flags)
    assert site.chats == []


def test_ids_go_on_after_the_highest(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    name = min(cast.profiles)
    coco = sorted(f"COCO/train2017/{p.name}" for p in (demo / "images/COCO/train2017").glob("*.jpg"))
    flags = ["--characters", name, "--kinds", "comment", "--images"]
    grow_dialogues(site, demo, tmp_path, *flags, coco[0])
    (path,) = (tmp_path / "dialogues").rglob("*.json")
    (row,) = read_json(path)
    head, _, number = row["id"].rpartition("_")
    again = {**row, "id": f"{head}_{int(number) + 1}"}  # about the same image, and before it in the file
    path.write_text(json.dumps([again, row]), encoding="utf-8")
    assert grow_dialogues(site, demo, tmp_path, *flags, coco[1]) == 0
    assert [row["id"] for row in dialogues_of(tmp_path)] == [f"{head}_{int(number) + i}" for i in (1, 0, 2)]


@pytest.mark.parametrize("name", ["../x", "a/b", ".x", " ", "a\nb"])
def test_names_that_lead_elsewhere(site: Site, tmp_path: Path, name: str) -> None:
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps({"name": name}))
    with pytest.raises(MMRoleError, match="cannot name a file"):
        main(["person", str(tmp_path / "root"), *endpoint(site), "--facts", str(facts)])
    assert not (tmp_path / "root").exists()


def test_user_errors_come_before_any_request(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    name = min(cast.profiles)
    cases = {
        "unknown speaker": ["--characters", "Nobody"],
        "no such image": ["--characters", name, "--images", "x/y.jpg"],
        "climb out": ["--characters", name, "--images", "../x.jpg"],
        "template cannot be read": ["--prompts", str(tmp_path)],
        "at least 1": ["--workers", "0"],
    }
    for words, flags in cases.items():
        with pytest.raises(MMRoleError, match=words):
            grow_dialogues(site, demo, tmp_path / "root", *flags)
    assert site.chats == []
    assert not (tmp_path / "root").exists()


def test_templates_can_be_changed(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    mine = tmp_path / "prompts"
    shutil.copytree(PROMPTS, mine)
    (mine / "comment.txt").write_text("System $character\n---\nIt costs $$5, $character: $question", encoding="utf-8")
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "1"]
    assert grow_dialogues(site, demo, tmp_path / "root", *flags, "--prompts", str(mine)) == 0
    assert text_of(site.chats[0]).startswith(f"It costs $5, {min(cast.profiles)}: ")
    assert site.chats[0]["messages"][0]["content"] == f"System {min(cast.profiles)}"
    (mine / "comment.txt").write_text("a\n---\n$nothing", encoding="utf-8")
    with pytest.raises(MMRoleError, match="cannot be filled"):
        grow_dialogues(site, demo, tmp_path / "other", *flags, "--prompts", str(mine))
    (mine / "comment.txt").write_text("a", encoding="utf-8")
    with pytest.raises(MMRoleError, match="no line ---"):
        Templates(mine)


def test_shipped_templates_can_be_filled() -> None:
    templates = Templates(PROMPTS)
    assert all(question for questions in templates.questions.values() for question in questions)
    for name in Templates.NAMES:
        assert (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").count("\n---\n") == 1


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"speaker": speaker, "text": text}


BAD_TURNS = [
    ([turn("human", "a")], "list should have at least 2"),
    ([turn("human", "a"), turn("Zoe", "b")], "unknown speaker"),
    ([turn("Ada", "a"), turn("human", "b")], "should be human's"),
    ([turn("human", "a"), turn("Ada", "b"), turn("human", "c")], "speaks last"),
    ([turn("human", "a"), turn("Ada", " ")], "at least 1 character"),
    ([turn("human", "a"), {"speaker": "Ada"}], "field required"),
    ([turn("human", "a"), turn("Ada", 3)], "valid string"),
    ([turn("human", "a"), turn("Ada", "\ud800")], "unicode string"),
    ({"turns": []}, "valid list"),
]


@pytest.mark.parametrize(("said", "words"), BAD_TURNS)
def test_turns_that_cannot_be_kept(said: Any, words: str) -> None:
    with pytest.raises(UnusableError, match=words):
        read_turns(json.dumps(said), ["human", "Ada"])


def test_turns_are_read_whatever_surrounds_them() -> None:
    said = json.dumps([turn("Human", "Hello"), turn("ada", "Ada: Hello.\n")])
    expected = [{"role": "human", "value": "Hello"}, {"role": "Ada", "value": "Hello."}]
    for answer in (said, f"```json\n{said}\n```", f"Sure!\n{said}\nAnything else?"):
        assert read_turns(answer, ["human", "Ada"]) == expected
    assert read_comment("[Ada]: How nice!", "Ada") == "How nice!"
    for answer in ("", "nothing", "[1, 2", "[" * 100_000):
        with pytest.raises(UnusableError):
            read_turns(answer, ["human", "Ada"])


def dialogue(*said: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"role": name, "value": text} for name, text in said]}


BAD_DIALOGUES = [
    ("human-role", dialogue(("human", "a"), ("Ada", "b {place_info} c")), "unfilled"),
    ("human-role", dialogue(("human", "a"), ("Ada", "see <img>x</img>")), "<img>"),
    ("human-role", dialogue(("human", "a"), ("Ada", "b ")), "trailing blanks"),
    ("human-role", dialogue(("human", "a"), ("Ada", "")), "empty"),
    ("human-role", dialogue(("human", "a"), ("Ada", "b\udc00")), "surrogate"),
    ("human-role", dialogue(("human", "你好"), ("Ada", "我很好")), "it is in Chinese"),
    ("human-role", dialogue(("Ada", "a"), ("human", "b")), "speaks last"),
    ("human-role", dialogue(("Ada", "a"), ("Bob", "b")), "speaks last"),
    ("inter-role", dialogue(("Ada", "a"), ("Ada", "b")), "1 speakers"),
    ("inter-role", dialogue(("Ada", "a"), ("Bob", "b"), ("Ada", "c")), "3 turns"),
    ("inter-role", dialogue(("Ada", "a"), ("Bob", "b"), ("Bob", "c"), ("Ada", "d")), "twice in a row"),
    ("inter-role", dialogue(("Ada", "a"), ("Bob", "b"), ("Ada", "a"), ("Bob", "d")), "word for word"),
    ("comment", dialogue(("human", "a"), ("Ada", "b"), ("human", "c"), ("Ada", "d")), "4 turns"),
]


@pytest.mark.parametrize(("kind", "bad", "words"), BAD_DIALOGUES)
def test_dialogues_that_cannot_be_kept(kind: str, bad: dict[str, Any], words: str) -> None:
    assert words in (dialogue_problem(bad, kind, "English") or "")


def test_published_dialogues_pass(shared: Path) -> None:
    """Good published dialogues are accepted."""
    folder = shared / "mmrole_data/dialogues/in-distribution"
    for kind, name in (("comment", "comment"), ("human-role", "human-role"), ("inter-role", "inter-role")):
        rows = [row for path in sorted((folder / name).glob("Iron_Man*.json")) for row in read_json(path)]
        rows = [row for row in rows if row["conversations"] and len(row["conversations"]) % 2 == 0]
        refused = [dialogue_problem(row, kind, "English") for row in rows]
        assert sum(problem is None for problem in refused) > 0.95 * len(rows) > 10
    rows = read_json(folder / "human-role/孙悟空_COCO.json")
    rows = [row for row in rows if row["conversations"] and len(row["conversations"]) % 2 == 0]
    assert all(dialogue_problem(row, "human-role", "Chinese") is None for row in rows)


def test_profiles_that_cannot_be_kept() -> None:
    assert list(read_detailed_profile(json.dumps(dict(reversed(DETAILED.items()))))) == list(PARTS)
    bad = [{}, {**DETAILED, "more": "x"}, {**DETAILED, "personality": ""}, {**DETAILED, "experience": "<|endoftext|>"}]
    for profile in bad:
        with pytest.raises(UnusableError):
            read_detailed_profile(json.dumps(profile))
    assert read_summary(f"```markdown\n{SUMMARY}\n```") == SUMMARY
    for text in ("", SUMMARY.replace("### ", "", 1), SUMMARY + "\n### Six", "### A\n" * 5, SUMMARY + "$character"):
        with pytest.raises(UnusableError):
            read_summary(text)


def test_images_are_sent_as_endpoints_take_them(tmp_path: Path) -> None:
    def sent(path: Path) -> tuple[str, Image.Image]:
        head, _, data = image_url(path).partition(",")
        return head, Image.open(io.BytesIO(base64.b64decode(data)))

    Image.new("RGB", (40, 30)).save(tmp_path / "a.webp")
    Image.new("CMYK", (40, 30)).save(tmp_path / "b.tiff")
    Image.new("RGBA", (5000, 50)).save(tmp_path / "c.png")
    assert sent(tmp_path / "a.webp")[0] == "data:image/webp;base64"
    head, image = sent(tmp_path / "b.tiff")
    assert (head, image.format, image.size) == ("data:image/jpeg;base64", "JPEG", (40, 30))
    assert sent(tmp_path / "c.png")[1].size[0] == 2048
    (tmp_path / "d.jpg").write_bytes(b"no image")
    with pytest.raises(MMRoleError, match="cannot be read"):
        image_url(tmp_path / "d.jpg")


# ---- the user's edits are kept


def ids_of(root: Path) -> list[str]:
    return [row["id"] for row in dialogues_of(root)]


def grow_person(site: Site, root: Path, facts: Any, *flags: str) -> int:
    path = root.parent / "facts.json"
    path.write_text(json.dumps(facts), encoding="utf-8")
    return main(["person", str(root), *endpoint(site), "--facts", str(path), *flags])


def profiles_of(root: Path) -> Path:
    return root / "profiles/in-distribution/profiles.json"


def rewrite(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def test_ids_of_the_source_are_not_given_again(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    source, root = Path(shutil.copytree(demo, tmp_path / "source")), tmp_path / "grown"
    assert (
        grow_dialogues(
            site, source, root, "--characters", *sorted(cast.profiles)[:2], "--partner", sorted(cast.profiles)[-1]
        )
        == 0
    )
    assert ids_of(root)
    assert not set(ids_of(source)) & set(ids_of(root))
    found = check_roots(source, [root])
    assert not [name for _, part in found for name in part.counts() if "id" in name.split("_")]


def test_what_is_named_twice_is_grown_once(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    name = min(cast.profiles)
    image = min(f"COCO/train2017/{path.name}" for path in (demo / "images/COCO/train2017").glob("*.jpg"))
    flags = ["--characters", name, name, "--kinds", "comment", "--images", image, image]
    assert grow_dialogues(site, demo, tmp_path, *flags) == 0
    assert len(site.chats) == len(dialogues_of(tmp_path)) == 1


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
    assert len(site.chats) == 3


def test_overwriting_replaces_what_has_passed(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    coco = sorted(f"COCO/train2017/{p.name}" for p in (demo / "images/COCO/train2017").glob("*.jpg"))
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--workers", "1", "--images"]
    assert grow_dialogues(site, demo, tmp_path, *flags, *coco[:3]) == 0
    before = dialogues_of(tmp_path)
    site.chat = scripted(quoting(401), good_answer)
    with pytest.raises(MMRoleError, match="refuses"):
        grow_dialogues(site, demo, tmp_path, *flags, *coco[:2], "--overwrite")
    assert dialogues_of(tmp_path) == before
    new = ["--overwrite", "--temperature", "0.5"]
    assert grow_dialogues(site, demo, tmp_path, *flags, *coco[:2], *new, "--max_requests", "1") == 1
    after = dialogues_of(tmp_path)
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert [a == b for a, b in zip(after, before, strict=True)] == [False, True, True]
    assert site.chats[-1]["temperature"] == 0.5
    lines = (tmp_path / "grown.jsonl").read_text(encoding="utf-8").splitlines()
    by = [json.loads(line)["value"]["by"] for line in lines if '"grown"' in line]
    assert [(one["model"], one["temperature"]) for one in by] == [("m", None)] * 3 + [("m", 0.5)]


def test_edited_profiles_stay_so(site: Site, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert grow_person(site, root, {"name": "Ines"}) == 0
    rewrite(profiles_of(root), {"Ines": "By hand."})
    assert grow_person(site, root, [{"name": "Ines"}, {"name": "Otto"}]) == 0
    assert read_json(profiles_of(root)) == {"Ines": "By hand.", "Otto": SUMMARY}
    assert grow_person(site, root, {"name": "Ines"}, "--overwrite") == 0
    assert read_json(profiles_of(root)) == {"Ines": SUMMARY, "Otto": SUMMARY}


def test_a_profile_of_the_user_is_not_replaced(site: Site, tmp_path: Path) -> None:
    site.chat = scripted("no")
    assert grow_person(site, tmp_path / "root", {"name": "Otto"}) == 1
    profiles_of(tmp_path / "root").parent.mkdir(parents=True)
    rewrite(profiles_of(tmp_path / "root"), {"Otto": "By hand."})
    with pytest.raises(MMRoleError, match="already has a profile"):  # nothing of Otto was grown here
        grow_person(site, tmp_path / "root", {"name": "Otto"})


BAD_FACTS = [
    ([{"name": "Ines"}, {"name": "Ines"}], "the same name"),
    ([{"name": "Ines R"}, {"name": "Ines_R"}], "the same name"),
    ([], "no facts"),
    ({"name": "human"}, "the human who talks"),
    ({"name": "Ines <|im_end|>"}, "cannot name a file"),
    ({"name": "Ines\ud800"}, "surrogate"),
    ({"name": "Ines", "origin": "\ud800"}, "surrogate"),
    ({"name": "Otto_Ray"}, "another character's files"),
]


@pytest.mark.parametrize(("facts", "words"), BAD_FACTS)
def test_facts_that_are_refused(site: Site, tmp_path: Path, facts: Any, words: str) -> None:
    root = tmp_path / "root"
    profiles_of(root).parent.mkdir(parents=True)
    rewrite(profiles_of(root), {"Otto Ray": "A profile."})
    with pytest.raises(MMRoleError, match=words):
        grow_person(site, root, facts)
    assert site.chats == []


def test_bytes_and_marks_of_other_encodings(site: Site, tmp_path: Path) -> None:
    text, root = tmp_path / "ada.txt", tmp_path / "root"
    text.write_text("Ada was here.", encoding="utf-8-sig")
    flags = ["profile", str(root), *endpoint(site), "--script", "My Novel", "--text", str(text)]
    with pytest.raises(MMRoleError, match="not UTF-8"):
        main([*flags, "--name", "\udcb0\udca1"])
    assert not root.exists()
    assert main([*flags, "--name", "Ada"]) == 0
    raw = root / "profiles/in-distribution/raw_info_en/Ada.txt"
    assert raw.read_text(encoding="utf-8") == "Ada was here."


def test_templates_with_faults_are_reported_at_once(tmp_path: Path) -> None:
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
    result = str(caught.value)
    for words in ("holds <img>", "no questions", "nothing", "nothing before its line ---", "nothing after its line"):
        assert words in result
    assert "no line ---" not in result


def test_broken_images_are_reported_before_any_request(
    site: Site, demo: Path, tmp_path: Path, cast: Characters
) -> None:
    source = Path(shutil.copytree(demo, tmp_path / "source"))
    names = [f"COCO/train2017/{path.name}" for path in sorted((source / "images/COCO/train2017").glob("*.jpg"))[:3]]
    for name in names[1:]:
        (source / "images" / name).write_bytes(b"no image")
    with pytest.raises(MMRoleError) as caught:
        grow_dialogues(site, source, tmp_path / "root", "--characters", min(cast.profiles), "--images", *names)
    assert all(name in str(caught.value) for name in names[1:])
    assert site.chats == []
    assert not (tmp_path / "root").exists()


def test_why_the_budget_was_spent(site: Site, demo: Path, tmp_path: Path, cast: Characters, capsys) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "1"]
    site.chat = scripted(Reply(body=b"<html>busy</html>"))
    assert grow_dialogues(site, demo, tmp_path, *flags, "--max_requests", "2") == 1
    assert "left after this: the budget of 2 requests is spent" in capsys.readouterr().out
    site.chat = scripted("As an AI, I see nothing.")
    assert grow_dialogues(site, demo, tmp_path, *flags, "--max_requests", "1") == 1
    assert "left after this: the model speaks as itself" in capsys.readouterr().out
    assert grow_dialogues(site, demo, tmp_path, *flags, "--max_tokens_total", "50") == 1
    assert "the budget of 50 tokens is spent: 0 used" in capsys.readouterr().out
