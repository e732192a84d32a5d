"""Growing data against a server on loopback that also answers garbage, 429, 500, and quotes the key back."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_utils.demo.world import draw_world, write_world
from data_utils.errors import MMRoleError, run_main
from data_utils.files import read_json
from data_utils.grow import client as grow_client
from data_utils.grow import run as grow
from data_utils.grow.client import Budget, BudgetSpentError, Endpoint, NoAnswerError, Settings
from data_utils.grow.plan import image_url
from data_utils.grow.run import PROMPTS, Templates, main
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

pytest.importorskip("openai")

ROOT = Path(__file__).resolve().parents[2]
SECRET = "top-secret-0123456789"
PIECE = "sk-abcd********wxyz"  # as OpenAI quotes a key
PARTS = ("introduction", "personality", "experience", "relationship", "catchphrase")
DETAILED = {part: f"Something about the {part} of the character." for part in PARTS}
SUMMARY = "\n".join(f"### {part.title()}\nWhat there is to say of it, in a sentence or two." for part in PARTS)

Reply = tuple[int, Any]


@dataclass
class Site:
    """What the endpoint answers first, in this order, whatever it is asked; and what it was asked."""

    faults: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    tokens: int = 100  # that each answer is said to have taken
    answer: Callable[[dict[str, Any]], str] | None = None
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


def text_of(request: dict[str, Any]) -> str:
    content = request["messages"][1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def good_answer(request: dict[str, Any], number: int) -> str:
    """What a strong model would write."""
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


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.site.lock:
            self.site.asked.append(request)
            self.site.keys.append(self.headers.get("Authorization", ""))
            number = len(self.site.asked)
            fault = self.site.faults.pop(0) if self.site.faults else ""
        status, body = self.reply(request, number, fault)
        if status == 0:
            self.close_connection = True
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def reply(self, request: dict[str, Any], number: int, fault: str) -> Reply:
        if fault.isdigit():
            return int(fault), {"error": {"message": f"no: your key is {SECRET}, {PIECE}", "code": "x"}}
        if fault == "quota":
            return 429, {"error": {"message": "spent", "code": "insufficient_quota"}}
        if fault == "hang up":
            return 0, b""
        if fault == "not json":
            return 200, b"<html>busy</html>"
        if fault == "not chat":
            return 200, {"object": "list", "data": []}
        if "new-model" in request["model"] and "max_tokens" in request:
            return 400, {"error": {"message": "Unsupported parameter: use 'max_completion_tokens' instead."}}
        content = fault.removeprefix("say ") if fault.startswith("say ") else good_answer(request, number)
        if self.site.answer is not None and not fault:
            content = self.site.answer(request)
        choice = {"index": 0, "finish_reason": "length" if fault == "cut" else "stop", "message": {"role": "assistant"}}
        choice["message"]["content"] = content
        usage = {"prompt_tokens": 70, "completion_tokens": 30, "total_tokens": self.site.tokens}
        return 200, {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    found = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": found}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(grow_client.Endpoint, "_wait", lambda *_: 0.01)
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(draw_world(5), root)
    return root


@pytest.fixture
def cast(demo: Path) -> Characters:
    return characters_of(demo)


def characters_of(root: Path) -> Characters:
    found, problems = read_profiles(root, "in-distribution")
    assert problems == []
    return Characters(found.profiles, found.scripts)


def grow_dialogues(site: Site, demo: Path, root: Path, *flags: str) -> int:
    return main(["dialogues", str(root), "--source", str(demo), "--model", "m", "--base_url", site.url, *flags])


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
    request = site.asked[0]
    url = request["messages"][1]["content"][1]["image_url"]["url"]
    sent = base64.b64decode(url.partition(",")[2])
    assert sent in {(demo / "images" / image).read_bytes() for image in images}
    assert any(cast.profiles[name] in text_of(request) for request in site.asked)


FAULTS = [
    "429",
    "500",
    "503",
    "hang up",
    "not json",
    "not chat",
    "cut",
    "say ",
    "say no JSON",
    'say [{"speaker": "x"}]',
]


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_answers_are_asked_for_again(site: Site, demo: Path, tmp_path: Path, cast: Characters, fault: str) -> None:
    site.faults = [fault]
    flags = ["--characters", min(cast.profiles), "--kinds", "human-role", "--images_per_character", "1"]
    assert grow_dialogues(site, demo, tmp_path, *flags) == 0
    (row,) = dialogues_of(tmp_path)
    assert dialogue_problem(row, "human-role", "English") is None
    assert len(site.asked) == 2


def test_what_never_passes_is_not_kept_and_asked_for_next_time(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, capsys
) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "1", "--tries", "2"]
    site.faults = ["say Look: <|im_end|>", "say As an AI, I see nothing."]
    assert grow_dialogues(site, demo, tmp_path, *flags) == 1
    assert dialogues_of(tmp_path) == []
    assert "the model speaks as itself" in capsys.readouterr().out
    assert grow_dialogues(site, demo, tmp_path, *flags) == 0
    assert len(dialogues_of(tmp_path)) == 1


def test_same_answer_twice_is_kept_once(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    site.answer = lambda _: "It is what it is."
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
    count = len(site.asked)
    assert grow_dialogues(site, demo, tmp_path, "--characters", name, "--kinds", "comment", "--images", *coco[:2]) == 0
    assert len(site.asked) == count
    assert grow_dialogues(site, demo, tmp_path, "--characters", name, "--kinds", "comment", "--images", *coco[:4]) == 0
    rows = dialogues_of(tmp_path)
    assert rows[:2] == first
    assert len(rows) == 4
    assert len({row["id"] for row in rows}) == 4
    assert len(site.asked) == count + 2


def test_killed_before_the_files_were_written(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Path, entries: dict[str, Any]) -> list[str]:
        if entries:
            raise KeyboardInterrupt
        return []

    name = min(cast.profiles)
    coco = sorted(f"COCO/train2017/{p.name}" for p in (demo / "images/COCO/train2017").glob("*.jpg"))
    flags = ["--characters", name, "--kinds", "comment", "--images"]
    monkeypatch.setattr(grow, "write_dialogues", killed)
    with pytest.raises(KeyboardInterrupt):
        grow_dialogues(site, demo, tmp_path, *flags, *coco[:2])
    monkeypatch.undo()
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert dialogues_of(tmp_path) == []  # the journal alone is left
    grow_dialogues(site, demo, tmp_path, *flags, *coco[2:3])
    rows = dialogues_of(tmp_path)
    assert sorted(row["image"] for row in rows) == coco[:3]
    assert len({row["id"] for row in rows}) == 3


def test_other_settings_are_not_mixed_in(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "2"]
    grow_dialogues(site, demo, tmp_path, *flags)
    before = dialogues_of(tmp_path)
    with pytest.raises(MMRoleError, match="different settings"):
        grow_dialogues(site, demo, tmp_path, *flags, "--temperature", "0.5")
    assert dialogues_of(tmp_path) == before
    assert grow_dialogues(site, demo, tmp_path, *flags, "--temperature", "0.5", "--overwrite") == 0
    after = dialogues_of(tmp_path)
    assert {row["image"] for row in after} == {row["image"] for row in before}
    assert not {row["conversations"][1]["value"] for row in after} & {
        row["conversations"][1]["value"] for row in before
    }
    assert site.asked[-1]["temperature"] == 0.5


def test_budget_of_requests_and_going_on(site: Site, demo: Path, tmp_path: Path, cast: Characters, capsys) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "4"]
    assert grow_dialogues(site, demo, tmp_path, *flags, "--max_requests", "3") == 1
    assert len(site.asked) == 3
    assert len(dialogues_of(tmp_path)) == 3
    assert "3 grown, 0 failed, 1 left for want of budget; 3 requests, 300 tokens" in capsys.readouterr().out
    assert grow_dialogues(site, demo, tmp_path, *flags) == 0
    assert len(dialogues_of(tmp_path)) == 4
    assert len(site.asked) == 4


def test_budget_of_tokens_is_never_exceeded(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "4"]
    site.tokens = 1200
    assert grow_dialogues(site, demo, tmp_path, *flags, "--max_tokens_total", "4000", "--max_tokens", "200") == 1
    assert len(site.asked) == len(dialogues_of(tmp_path)) == 2  # a third might have gone over 4,000
    assert grow_dialogues(site, demo, tmp_path, *flags, "--max_tokens_total", "100") == 1
    assert len(site.asked) == 2


def test_budget_waits_for_what_is_under_way() -> None:
    budget = Budget(max_tokens=100)
    budget.reserve(80)
    freed = threading.Timer(0.1, budget.settle, (80, 10))
    freed.start()
    budget.reserve(80)
    assert budget.requests == 2
    budget.settle(80, 80)
    with pytest.raises(BudgetSpentError):
        budget.reserve(80)
    assert budget.tokens == 90


@pytest.mark.parametrize("fault", ["401", "403", "404", "quota"])
def test_refusal_ends_the_run_and_keeps_what_is_done(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, fault: str
) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "4", "--workers", "1"]
    site.faults = ["say First of all, a picture.", fault]
    with pytest.raises(MMRoleError, match="refuses"):
        grow_dialogues(site, demo, tmp_path, *flags)
    assert len(dialogues_of(tmp_path)) == 1
    assert len(site.asked) == 2


@pytest.mark.parametrize("faults", [["401"], ["400"] * 20, ["500"] * 20], ids=["401", "400", "500"])
def test_key_is_nowhere(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, faults: list[str], capfd, monkeypatch
) -> None:
    monkeypatch.setenv("OPENAI_LOG", "debug")
    site.faults = list(faults)
    flags = ["--characters", min(cast.profiles), "--images_per_character", "1"]
    status = run_main(lambda: grow_dialogues(site, demo, tmp_path, *flags))
    assert status in (1, 2)
    assert set(site.keys) == {f"Bearer {SECRET}"}
    told = capfd.readouterr()
    assert SECRET not in told.out + told.err
    assert "wxyz" not in told.out + told.err
    assert "***" in told.out + told.err
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert SECRET not in path.read_text(encoding="utf-8")
        assert "wxyz" not in path.read_text(encoding="utf-8")


ESCAPED = "".join(f"\\u{ord(c):04x}" for c in SECRET)
LEAKS = {
    "comment": f"say The key is {SECRET}, they say.",
    "human-role": f'say [{{"speaker": "human", "text": "{SECRET}"}}]',
    "speaker": f'say [{{"speaker": "{SECRET}", "text": "a"}}, {{"speaker": "{SECRET}", "text": "b"}}]',
    "escaped": f'say [{{"speaker": "{ESCAPED}", "text": "a"}}, {{"speaker": "b", "text": "b"}}]',
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("times", [1, 20])
def test_key_in_an_answer_is_nowhere(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, capfd, leak: str, times: int
) -> None:
    site.faults = [LEAKS[leak]] * times
    kind = "comment" if leak == "comment" else "human-role"
    flags = ["--characters", min(cast.profiles), "--images_per_character", "1", "--kinds", kind]
    for status in [0] if times == 1 else [1, 1]:  # the second time a journal's reasons are there already
        assert grow_dialogues(site, demo, tmp_path, *flags) == status
    told = capfd.readouterr()
    assert SECRET not in told.out + told.err
    assert len(dialogues_of(tmp_path)) == int(times == 1)
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert SECRET not in path.read_text(encoding="utf-8")


def test_escaped_key_in_a_dialogue_is_nowhere(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    def answer(request: dict[str, Any]) -> str:
        return good_answer(request, 0).replace("I say 0 and 1.", f"My key is {ESCAPED}.")

    site.answer = answer
    flags = ["--characters", min(cast.profiles), "--images_per_character", "1", "--kinds", "human-role"]
    assert grow_dialogues(site, demo, tmp_path, *flags) == 1
    assert dialogues_of(tmp_path) == []
    assert SECRET not in (tmp_path / "dialogues/grown.journal").read_text(encoding="utf-8")


def test_a_word_for_a_key_may_be_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "picture")  # of a server that asks for none
    assert "picture" in Endpoint(Settings("m", site.url), Budget()).ask("s", "u")


def interrupt_after(
    site: Site, count: int, answer: Callable[[dict[str, Any]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C when so many requests have come; they are answered when `grow` waits for the last ones because of it."""
    arrived, lock = [], threading.Lock()
    interrupted, sent = threading.Event(), threading.Event()

    def interrupt() -> None:
        interrupted.set()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def wait_for(futures: Collection[Future[Any]]) -> Iterator[Future[Any]]:
        if interrupted.is_set():
            sent.set()
        return as_completed(futures)

    def wait_and_answer(request: dict[str, Any]) -> str:
        with lock:
            arrived.append(request)
            if len(arrived) == count:
                threading.Timer(0.3, interrupt).start()
        assert sent.wait(120)
        return answer(request)

    monkeypatch.setattr(grow, "as_completed", wait_for)
    site.answer = wait_and_answer


def test_interrupt_keeps_what_is_under_way(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "4", "--workers", "2"]
    interrupt_after(
        site, 2, lambda request: f"I see it, and say {hash(text_of(request))} to {id(request)}.", monkeypatch
    )
    with pytest.raises(KeyboardInterrupt):
        grow_dialogues(site, demo, tmp_path, *flags)
    assert len(site.asked) == len(dialogues_of(tmp_path)) == 2
    assert "waiting for 2 answer(s) under way" in capsys.readouterr().err
    site.answer = None
    assert grow_dialogues(site, demo, tmp_path, *flags) == 0
    assert len(site.asked) == len(dialogues_of(tmp_path)) == 4


def test_interrupt_asks_for_nothing_again(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "4", "--workers", "2"]
    interrupt_after(site, 2, lambda _: "As an AI, I see nothing.", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        grow_dialogues(site, demo, tmp_path, *flags)
    assert len(site.asked) == 2
    assert dialogues_of(tmp_path) == []


def test_interrupt_ends_the_wait_for_a_busy_endpoint(
    site: Site, demo: Path, tmp_path: Path, cast: Characters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grow_client.Endpoint, "_wait", lambda *_: 60.0)
    site.faults = ["500"] * 9
    threading.Timer(1.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        grow_dialogues(site, demo, tmp_path, "--characters", min(cast.profiles), "--kinds", "comment")
    assert time.monotonic() - started < 30


def test_second_interrupt_gives_up(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    come, over = threading.Event(), threading.Event()

    def answer(_: dict[str, Any]) -> str:
        come.set()
        over.wait(240)
        return "Too late."

    site.answer = answer
    command = ["dialogues", str(tmp_path), "--source", str(demo), "--model", "m", "--base_url", site.url]
    command += ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "1"]
    run = subprocess.Popen(
        [sys.executable, "-m", "data_utils.grow", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        assert come.wait(240)
        run.send_signal(signal.SIGINT)
        assert "waiting for 1 answer(s)" in next(line for line in run.stderr if "waiting" in line)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
        assert "interrupted" in run.stderr.read()
    finally:
        over.set()
        run.kill()


def test_newer_name_of_the_limit(site: Site) -> None:
    endpoint = Endpoint(Settings("new-model", site.url, max_tokens=77), Budget())
    assert "picture" in endpoint.ask("s", "u")
    assert "picture" in endpoint.ask("s", "u")
    assert [("max_tokens" in r, r.get("max_completion_tokens")) for r in site.asked] == [
        (True, None),
        (False, 77),
        (False, 77),
    ]


def test_endpoint_that_stays_broken(site: Site) -> None:
    site.faults = ["500"] * 20
    budget = Budget()
    with pytest.raises(NoAnswerError, match="500"):
        Endpoint(Settings("m", site.url, attempts=3), budget).ask("s", "u")
    assert (budget.requests, budget.tokens) == (3, 0)


@pytest.mark.parametrize(
    ("key", "url", "words"),
    [
        ("", "", "no key"),
        ("ключ", "", "characters"),
        (SECRET, "ftp://x", "address"),
        (SECRET, "http://x:y/", "address"),
    ],
)
def test_endpoint_that_cannot_be(monkeypatch: pytest.MonkeyPatch, key: str, url: str, words: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(MMRoleError, match=words) as error:
        Endpoint(Settings("m", url or None), Budget())
    assert not key or key not in str(error.value)


def test_profile_from_a_text(site: Site, tmp_path: Path) -> None:
    text = tmp_path / "ada.txt"
    text.write_text("Ada was the first to see what the engine could do.\n", encoding="utf-8")
    root = tmp_path / "root"
    flags = ["profile", str(root), "--model", "m", "--base_url", site.url, "--name", "Ada L", "--script", "My Novel"]
    site.faults = ["500", "say {}", "say ### One heading"]
    assert main([*flags, "--text", str(text)]) == 0
    folder = root / "profiles/in-distribution"
    assert read_json(folder / "profiles.json") == {"Ada L": SUMMARY}
    assert read_json(folder / "roles.json") == {"My Novel": ["Ada L"]}
    assert read_json(folder / "detailed_profiles/Ada_L.json") == DETAILED
    assert "first to see" in (folder / "raw_info_en/Ada_L.txt").read_text(encoding="utf-8")
    assert characters_of(root).role("Ada L").script == "My Novel"
    assert any("first to see" in text_of(request) for request in site.asked)
    count = len(site.asked)
    assert main([*flags, "--text", str(text)]) == 0
    assert len(site.asked) == count
    assert main([*flags, "--text", str(text), "--overwrite"]) == 0
    assert len(site.asked) == count + 2
    assert read_json(folder / "roles.json") == {"My Novel": ["Ada L"]}


def test_people_from_facts_then_their_dialogues(site: Site, demo: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    people = [{"name": "Ines Roth", "age": "41", "origin": "Basel"}, {"name": "Otto Ray", "origin": "Cork"}]
    facts.write_text(json.dumps(people), encoding="utf-8")
    root = tmp_path / "root"
    second_written = threading.Event()

    def first_comes_last(request: dict[str, Any]) -> str:
        if "Ines Roth" in text_of(request):
            assert second_written.wait(30)
        elif "Shorten the profile" in text_of(request):
            threading.Timer(0.3, second_written.set).start()
        return good_answer(request, 0)

    site.answer = first_comes_last
    assert main(["person", str(root), "--model", "m", "--base_url", site.url, "--facts", str(facts)]) == 0
    site.answer = None
    folder = root / "profiles/in-distribution"
    assert list(read_json(folder / "profiles.json")) == ["Ines Roth", "Otto Ray"]
    assert read_json(folder / "roles.json") == {"Hypothetical Characters": ["Ines Roth", "Otto Ray"]}
    assert read_json(folder / "meta_info_hypo/Ines_Roth.json") == people[0]
    image = root / "images/mine/one.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(image)
    flags = ["--model", "m", "--base_url", site.url, "--images", "mine/one.png"]
    assert main(["dialogues", str(root), *flags]) == 0
    rows = dialogues_of(root)
    assert len(rows) == 6
    assert len(list(iterate_samples(rows, characters_of(root)))) > 12
    assert "41" in text_of(site.asked[0]) + text_of(site.asked[1]) + text_of(site.asked[2])


def test_profile_that_is_there_is_not_replaced(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    root = tmp_path / "root"
    shutil.copytree(demo / "profiles", root / "profiles")
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps({"name": min(cast.profiles)}))
    with pytest.raises(MMRoleError, match="a profile already"):
        main(["person", str(root), "--model", "m", "--base_url", site.url, "--facts", str(facts)])
    assert site.asked == []


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
    assert site.asked == []
    assert sorted(tmp_path.rglob("*")) == before


def test_everything_wrong_with_names_is_told_at_once(site: Site, demo: Path, tmp_path: Path) -> None:
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
def test_ill_typed_files_are_told(site: Site, demo: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(demo, tmp_path / "root"))
    (root / name).write_text(json.dumps(WRONG[name]), encoding="utf-8")
    with pytest.raises(MMRoleError) as caught:
        grow_dialogues(site, root, root)
    assert name in str(caught.value)
    if name.startswith("profiles"):
        (tmp_path / "facts.json").write_text('{"name": "New"}', encoding="utf-8")
        facts = ["person", str(root), "--model", "m", "--base_url", site.url, "--facts", str(tmp_path / "facts.json")]
        with pytest.raises(MMRoleError, match="valid dictionary"):
            main(facts)
    assert site.asked == []


def test_a_broken_file_of_dialogues_is_told(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "1"]
    path = tmp_path / "dialogues/in-distribution/comment/mine.json"
    path.parent.mkdir(parents=True)
    path.write_text("[", encoding="utf-8")
    with pytest.raises(MMRoleError, match="not valid JSON"):
        grow_dialogues(site, demo, tmp_path, *flags)
    assert site.asked == []


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
        main(["person", str(tmp_path / "root"), "--model", "m", "--base_url", site.url, "--facts", str(facts)])
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
    assert site.asked == []
    assert not (tmp_path / "root").exists()


def test_templates_can_be_changed(site: Site, demo: Path, tmp_path: Path, cast: Characters) -> None:
    mine = tmp_path / "prompts"
    shutil.copytree(PROMPTS, mine)
    (mine / "comment.txt").write_text("System $character\n---\nIt costs $$5, $character: $question", encoding="utf-8")
    flags = ["--characters", min(cast.profiles), "--kinds", "comment", "--images_per_character", "1"]
    assert grow_dialogues(site, demo, tmp_path / "root", *flags, "--prompts", str(mine)) == 0
    assert text_of(site.asked[0]).startswith(f"It costs $5, {min(cast.profiles)}: ")
    assert site.asked[0]["messages"][0]["content"] == f"System {min(cast.profiles)}"
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
    ([turn("human", "a"), turn("Ada", "b"), turn("human", "c")], "last word"),
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
    ("human-role", dialogue(("human", "a"), ("Ada", "b {place_info} c")), "leftover"),
    ("human-role", dialogue(("human", "a"), ("Ada", "see <img>x</img>")), "<img>"),
    ("human-role", dialogue(("human", "a"), ("Ada", "b ")), "edges"),
    ("human-role", dialogue(("human", "a"), ("Ada", "")), "empty"),
    ("human-role", dialogue(("human", "a"), ("Ada", "b\udc00")), "surrogate"),
    ("human-role", dialogue(("human", "你好"), ("Ada", "我很好")), "it is in Chinese"),
    ("human-role", dialogue(("Ada", "a"), ("human", "b")), "last word"),
    ("human-role", dialogue(("Ada", "a"), ("Bob", "b")), "last word"),
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
    """Sound published dialogues are not refused: the checks ask for nothing that the real data has not."""
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
