"""The page in a browser: choose, show a picture, talk, stop, again, edit, save; at phone width and by keyboard."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_utils.prompts import CURIOUS_HUMAN
from tests.golden_checkpoint import GOLDEN
from tests.web.conftest import Served
from web.cast import read_cast

pytest.importorskip("gradio", reason="the web extra is not installed (scripts/test.sh --all runs this beside it)")
from web.page import Visit

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
SECONDS = 90  # limit of one step, for busy machines
PICTURE = GOLDEN / "images" / "rgb_640x480.png"
expect = playwright.expect


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved") / "root"


@pytest.fixture(scope="module")
def address(chat_model: Any, demo: Path, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from web.chats import Limits
    from web.page import Page, mount_page
    from web.server import LOOPBACK, build_app
    from web.service import EngineService

    uploads = tmp_path_factory.mktemp("uploads")
    environment = pytest.MonkeyPatch()
    environment.setenv("GRADIO_TEMP_DIR", str(uploads))
    service, limits = EngineService(*chat_model, "tiny"), Limits()
    cast = read_cast(demo)
    app = build_app(service, cast, hosts=frozenset(LOOPBACK), key=None, limits=limits)
    with Served(mount_page(app, Page(service, cast, uploads, saved, limits))) as served:
        yield served.url
    service.close()
    environment.undo()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page at a phone's width; requests to other hosts and errors fail the test."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(SECONDS * 1000)
    expect.set_options(timeout=SECONDS * 1000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))

    def note_error(message: Any) -> None:
        # Gradio's client sends these two without an event's name where Stop is pressed before its request is accepted.
        early = re.search("/gradio_api/(cancel|reset)$", message.location["url"]) and "422" in message.text
        if message.type == "error" and not early:
            faults.append(message.text)

    page.on("console", note_error)
    local = re.compile(rf"{re.escape(address)}|data:|blob:")
    page.on("request", lambda asked: None if local.match(asked.url) else faults.append(asked.url))
    page.goto(address)
    page.get_by_text("Brief Introduction").wait_for()
    yield page
    page.close()
    # Gradio's client reports streams that were cut off by leaving the page.
    assert [fault for fault in faults if not re.search("AbortError|errored out", fault)] == []


def message_box(page: Any) -> Any:
    return page.get_by_placeholder("Write a message; add or paste a picture")


def answers(page: Any) -> Any:
    return page.locator("#chat .bot.message")


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def test_a_whole_visit(page: Any, saved: Path, demo: Path) -> None:
    page.set_input_files("input[type=file]", PICTURE)
    page.locator(".thumbnail-item, .thumbnails img").first.wait_for()
    message_box(page).fill("What is this?")
    message_box(page).press("Enter")
    expect(answers(page)).to_have_count(1)
    expect(answers(page).first).not_to_be_empty()
    expect(page.locator("#chat img")).to_have_count(1)
    press(page, "Stop")
    with page.expect_response(re.compile("/queue/join")) as accepted:  # the answer before is shown until then
        press(page, "Again")
    accepted.value.finished()
    expect(answers(page).first).not_to_be_empty()
    press(page, "Stop")

    page.get_by_text("The exact prompt").click()
    press(page, "Show the prompt of the next answer")
    expect(page.get_by_label("Prompt")).to_have_value(re.compile("Please step into the shoes of"))
    page.get_by_text("Save as a dialogue").click()
    press(page, "Save this chat")
    page.get_by_text("Saved to").wait_for()
    dialogues = json.loads(next((saved / "dialogues/in-distribution/human-role").glob("*.json")).read_text("utf-8"))
    assert dialogues[0]["conversations"][0] == {"role": "human", "value": "What is this?"}
    assert (saved / "images" / dialogues[0]["image"]).is_file()

    press(page, "Edit last")
    expect(message_box(page)).to_have_value("What is this?")
    expect(page.locator(".thumbnail-item img")).to_have_count(1)
    expect(answers(page)).to_have_count(0)

    page.get_by_label("Character", exact=True).click()
    page.get_by_role("option").nth(1).click()

    expect(page.get_by_text("Brief Introduction")).to_be_visible()

    press(page, "Let it begin")
    expect(answers(page).first).not_to_be_empty()
    press(page, "New chat")
    expect(answers(page)).to_have_count(0)


def test_what_is_known_belongs_to_the_picture_that_is_shown(page: Any, demo: Path) -> None:
    own = read_cast(demo).pictures_of(page.get_by_label("Character", exact=True).input_value())
    page.get_by_text("Pictures of this character").click()
    happens = page.get_by_label("Known about the picture: what happens")
    expect(happens).to_have_value(own[0].information.scene)
    page.get_by_role("button", name="Thumbnail 3").click()
    page.get_by_text("This picture is shown with your next message").wait_for()
    expect(happens).to_have_value(own[2].information.scene)
    message_box(page).fill("And this?")
    message_box(page).press("Enter")
    expect(page.locator("#chat img")).to_have_count(1)
    press(page, "Stop")
    page.set_input_files("input[type=file]", PICTURE)
    page.locator(".thumbnail-item img").first.wait_for()
    for _ in range(30):  # Gradio takes no message until the answer that was stopped has ended
        message_box(page).press("Enter")
        with contextlib.suppress(AssertionError):
            expect(page.locator("#chat img")).to_have_count(2, timeout=3000)
            break
    expect(page.locator("#chat img")).to_have_count(2)
    press(page, "Stop")
    expect(happens).to_have_value("")


def test_a_new_chat_takes_its_pictures_away(tmp_path: Path) -> None:
    visit, picture = Visit(), Image.new("RGB", (8, 8), "red")
    file = Path(visit.file_of(picture, tmp_path))
    assert visit.file_of(picture, tmp_path) == str(file)
    assert file.is_file()
    visit.clear()
    assert not file.exists()
    assert visit.file_of(picture, tmp_path) != str(file)  # a browser keeps what it has seen at an address


def test_an_upload_that_is_no_picture(page: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files("input[type=file]", tmp_path / "broken.png")
    page.locator(".thumbnail-item, .thumbnails img").first.wait_for()
    message_box(page).press("Enter")
    page.get_by_text("a picture cannot be read").wait_for()


@pytest.mark.parametrize(
    ("path", "message"),
    [(str(PICTURE), "it was not uploaded by a user"), ("http://example.org/x.png", "URLs are not fetched")],
)
def test_paths_and_urls_in_place_of_an_upload(address: str, demo: Path, path: str, message: str) -> None:
    """As a program sends them that is not a browser; each is a picture, but was not uploaded."""

    def asked(place: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(
            urllib.request.Request(address + place, data, {"Content-Type": "application/json"}), timeout=SECONDS
        )

    events = json.load(asked("/config"))["dependencies"]
    (send,) = [event for event in events if any(name == "submit" for _, name in event["targets"])]
    upload = {"path": path, "orig_name": "x.png", "mime_type": "image/png", "meta": {"_type": "gradio.FileData"}}
    who = min(read_cast(demo).roles)
    data = [None, who, CURIOUS_HUMAN, "", "", "", {"text": "Look", "files": [upload]}, None, None]
    body = {"data": data, "fn_index": send["id"], "session_hash": message[:9], "event_data": None, "trigger_id": None}
    asked("/gradio_api/queue/join", body).read()
    stream = asked(f"/gradio_api/queue/data?session_hash={urllib.parse.quote(message[:9])}")
    outcome = next(line for line in stream if b"process_completed" in line or b"process_generating" in line)
    assert message in json.loads(outcome.removeprefix(b"data: "))["output"].get("error", "")


def test_by_keyboard_alone(page: Any) -> None:
    message_box(page).focus()
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    expect(answers(page).first).not_to_be_empty()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent").strip() == "Stop":
            break
    assert page.evaluate("document.activeElement.textContent").strip() == "Stop"
    page.keyboard.press("Enter")
    page.reload()
    page.get_by_text("Brief Introduction").wait_for()
    expect(answers(page)).to_have_count(0)


def test_two_characters_talk_by_themselves(page: Any) -> None:
    page.get_by_label("talks with").click()
    page.get_by_role("option").nth(2).click()
    press(page, "Let both talk")
    expect(page.locator("#chat .user.message").first).not_to_be_empty()
    expect(answers(page).first).not_to_be_empty()
    press(page, "Stop")
