"""The page: complete, safe with hostile texts, and usable in a browser without a network."""

import base64
import gzip
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.judging.metrics import METRIC_NAMES
from eval.results.html import report_html, thumbnail
from eval.results.report import build_report
from eval.results.reviews import read_agents
from tests.eval.made_reviews import made_row, record, write_agent

ATTACK = "</script><script>window.hacked = 1; alert(1)</script><img src=x onerror='window.hacked = 2'>{{ 7 * 7 }}"
BROKEN = "half of a pair: \ud800, reversed: \u202e abc \u2066, null: \x00, bell: \x07"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def page_of(eval_dir: Path, image_dir: Path | None = None) -> str:
    return report_html(build_report(read_agents(eval_dir)), {"judge": "me"}, image_dir).decode("utf-8")


def content_of(page: str) -> Any:
    packed = re.search(r'<script type="application/octet-stream" id="data">([A-Za-z0-9+/=]+)</script>', page)
    assert packed is not None
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


class Reader(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def write_hostile(eval_dir: Path) -> None:
    """Two agents whose names, characters, ids, pictures, answers and reviews are all hostile."""
    rows = []
    for i in range(9):
        review = {"review": f"{ATTACK}{BROKEN} [Scores]: (8, {9 - i % 3})", "score": [8, 9 - i % 3]}
        row = made_row(i, answer=f"{ATTACK}{BROKEN}", records=dict.fromkeys(METRIC_NAMES, review))
        row |= {"id": f"{ATTACK}_{i}", "role": f"{BROKEN}{ATTACK}{i}", "script": ATTACK, "image": "../../etc/passwd"}
        row["conversations"][0]["value"] = f"{ATTACK}\n\n\n{BROKEN}"
        rows.append(row)
    rows[3]["conversations"][1]["answer"] = "x" * 100_000
    write_agent(eval_dir, '"><script>window.hacked = 3<_script>', rows)
    write_agent(eval_dir, "$plain_1$ | b", rows)


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    write_hostile(tmp_path)
    page = page_of(tmp_path)
    content = content_of(page)
    assert content["rows"][0]["prompt"] == f"{ATTACK}\n\n\n{BROKEN}"
    assert content["answers"][0][0][0] == f"{ATTACK}{BROKEN}" and len(content["answers"][0][3][0]) == 100_000
    assert content["answers"][0][0][1][0][:2] == [8, 9] and content["answers"][0][0][1][0][2].startswith(ATTACK)
    assert content["pictures"] == {"../../etc/passwd": None}
    reader = Reader(page)
    assert [tag for tag, _ in reader.tags].count("script") == 2 and "window.hacked = 3<_script>" in reader.text
    assert not [tag for tag, _ in reader.tags if tag in ("img", "iframe", "object", "embed", "base", "link", "form ")]
    attributes = {name for _, found in reader.tags for name in found}
    assert not {name for name in attributes if name.startswith("on")}


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row(i) | {"role": f"c {i}"} for i in range(9)])
    tags = Reader(page_of(tmp_path)).tags
    loading = [value for _, found in tags for name, value in found.items() if name in ("src", "href", "xlink:href")]
    assert loading and all(value.startswith("#") for value in loading)
    (policy,) = [found["content"] for _, found in tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1]


def test_the_page_has_every_table_figure_and_row(tmp_path: Path) -> None:
    rows = [made_row(i, (i, 10)) | {"role": f"c {i}"} for i in range(1, 10)]
    rows[0]["rm_review"]["Fluency"] = {"review": "?", "score": [], "failure": "no marker", "attempts": 3}
    write_agent(tmp_path, "one", rows)
    write_agent(tmp_path, "two", [*rows[:5], made_row(6, answer="") | {"role": "c 6"}], skip=[("out", "comment")])
    page = page_of(tmp_path)
    for title in ("The paper's table", "Sample means: all", "Who can be told apart: all", "Counts", "Single rows"):
        assert title.replace("'", "&#39;") in page
    assert page.count("<svg") == 5 and page.count('role="img" aria-label=') == 5
    content = content_of(page)
    assert len(content["rows"]) == 6 * 9 and [len(answers) for answers in content["answers"]] == [54, 54]
    place = [agent["folder"] for agent in content["agents"]].index("two")
    two = {
        (row["split"], row["kind"], row["id"]): content["answers"][place][i] for i, row in enumerate(content["rows"])
    }
    assert two["out", "comment", "row_1"] is None
    assert two["in", "comment", "row_6"][0] == "" and two["in", "comment", "row_6"][1][0] == [
        None,
        None,
        "",
        "no answer",
    ]
    assert two["in", "comment", "row_1"][1][1] == [None, None, "?", "no marker; 3 attempts"]
    assert two["in", "comment", "row_1"][1][0] == [1, 10, record((1, 10))["review"], ""]


def test_pictures_are_small_and_from_the_image_folder_alone(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.effect_noise((1600, 900), 80).save(images / "a.jpg")
    Image.new("RGB", (10, 10)).save(tmp_path / "outside.png")
    (images / "link.png").symlink_to(tmp_path / "outside.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    found = thumbnail(images, "a.jpg")
    assert found is not None
    path = tmp_path / "small.webp"
    path.write_bytes(base64.b64decode(found.removeprefix("data:image/webp;base64,")))
    assert Image.open(path).size == (256, 144) and path.stat().st_size < 20_000
    for name in ("../outside.png", "link.png", "broken.jpg", "absent.jpg", "", "https://x/y.png"):
        assert thumbnail(images, name) is None
    assert thumbnail(None, "a.jpg") is None


@pytest.fixture(scope="module")
def browser() -> Any:
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright")
    quiet = ("background-networking", "component-update", "sync", "gpu", "dev-shm-usage")
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


def opened(browser: Any, path: Path, **settings: Any) -> tuple[Any, list[str]]:
    """Return a page that is ready, and a list of its errors and requests."""
    page = browser.new_context(**settings).new_page()
    page.set_default_timeout(120_000)  # a busy machine
    noise: list[str] = []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("dialog", lambda dialog: (noise.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: noise.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    assert noise.pop(0) == path.as_uri()
    return page, noise


def test_browsing_eleven_agents_in_chromium(browser: Any, tmp_path: Path) -> None:
    for agent in range(11):
        rows = [
            made_row(i, (1 + (i * (agent + 3)) % 10, 10), answer=f"answer {i} of {agent}") | {"role": f"c {i % 12}"}
            for i in range(50)
        ]
        write_agent(tmp_path, f"agent {agent}", rows)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images" / "a.jpg")
    path = tmp_path / "report.html"
    path.write_text(page_of(tmp_path, tmp_path / "images"), encoding="utf-8")
    page, noise = opened(browser, path, viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # wide tables scroll in their own boxes
    assert page.inner_text("#found") == "300 of 300 rows" and page.locator("#rows tbody tr").count() == 20

    for name, label in (("first", "agent 3"), ("second", "agent 6"), ("sort", "difference, agent behind first")):
        page.select_option(f"[name={name}]", label=label)
    page.wait_for_selector("#rows tbody tr:first-child td:last-child:text-matches('^-')")
    differences = [float(text) for text in page.locator("#rows tbody td:last-child").all_inner_texts()]
    assert differences == sorted(differences)
    page.select_option("[name=kind]", label="comment")
    page.select_option("[name=split]", label="In-Test")
    page.fill("[name=text]", "ANSWER 7 of 5")
    page.wait_for_selector("#found:text-is('1 of 300 rows')")
    page.focus("#rows tbody a")
    page.keyboard.press("Enter")
    page.wait_for_selector("#row .card")
    assert page.locator("#row img").evaluate("image => image.naturalWidth") == 40
    assert page.locator("#row h4").all_inner_texts()[0] == "Reference" and page.locator("#row .card").count() == 3
    page.get_by_role("checkbox", name="agent 9").check()
    assert "answer 7 of 9" in page.inner_text("#row") and page.locator("#row .card details").count() == 3 * 8
    again, _ = opened(browser, path, viewport={"width": 1000, "height": 700})
    assert (
        again.evaluate("(box => box.scrollWidth - box.clientWidth)(document.getElementById('rows').parentElement)") == 0
    )
    again.goto(page.url)  # the link to this row
    again.wait_for_selector("#row .card")
    assert again.locator("#row .none").first.inner_text().startswith("row_7")
    assert page.pdf().startswith(b"%PDF")
    assert noise == []


def test_hostile_texts_do_not_run_in_chromium(browser: Any, tmp_path: Path) -> None:
    write_hostile(tmp_path)
    path = tmp_path / "report.html"
    path.write_text(page_of(tmp_path), encoding="utf-8")
    page, noise = opened(browser, path, viewport={"width": 390, "height": 844})
    for i in (0, 3):
        page.locator("#rows tbody a").nth(i).click()
        page.wait_for_selector(f"#rows tbody tr:nth-child({i + 1}).open")
    assert page.locator("#row .said").nth(3).evaluate("box => box.textContent.length") == 100_000
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("window.hacked === undefined") and noise == []
