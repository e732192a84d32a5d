"""Downloads against a server on loopback that drops the line, lies about lengths, sends garbage, and is busy."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import threading
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from data_utils import download, download_coco
from data_utils.download import HubFile, content_problem, fetch_repo, list_repo
from data_utils.download_coco import COCO_FOLDER, Retries, fetch_coco, jpeg_problem, missing_coco, referenced_coco
from data_utils.errors import MMRoleError

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c0ffee" + "0" * 34
QUICK = Retries(attempts=5, first_wait=0.01)
LARGE = 2000  # bytes from which the fake hub gives a sha256


def jpeg(seed: int, size: int = 240) -> bytes:
    pixels = Image.effect_noise((size, size), 40 + seed).convert("RGB")
    content = io.BytesIO()
    pixels.save(content, "JPEG")
    return content.getvalue()


@dataclass
class Site:
    """What the server holds, how it misbehaves, and what it was asked.

    Attributes:
        files: Content by path.
        faults: By path, what to do wrong at the first, second, ... GET of it.
        asked: (method, path, Range header) of each request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def gets(self, path: str) -> list[str | None]:
        return [byte_range for method, asked, byte_range in self.asked if method == "GET" and asked == path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range")
        self.site.asked.append((self.command, path, asked))
        content = self.site.files.get(path)
        faults = self.site.faults.get(path, []) if self.command == "GET" else []
        fault = faults.pop(0) if faults else ""
        if content is None or fault == "missing":
            return self.send(404, b"")
        if fault == "busy":
            return self.send(503, b"", {"Retry-After": "0"})
        if fault == "garbage":
            content = b"<html>" + content[6:]  # as many bytes as it should be
        if fault == "short":  # the announced length fits what comes, and it is not all
            return self.send(200, content[:-40], self.about(path, content))
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked and fault != "no range" else 0
        if start >= len(content) > 0 and start:
            return self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers = self.about(path, content)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if fault == "drop":
            return self.send(206 if start else 200, body[: len(body) // 2], headers, announced=len(body))
        if fault == "long":
            return self.send(206 if start else 200, body, headers, announced=len(body) + 100)
        return self.send(206 if start else 200, body, headers)

    def about(self, path: str, content: bytes) -> dict[str, str]:
        if "/resolve/" not in path:
            return {}
        return {"ETag": f'"{hub_id(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}

    def send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, announced: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        if announced is not None:
            self.close_connection = True
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def hub_id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if len(content) >= LARGE else git_id(content)


@pytest.fixture
def site() -> Iterator[Site]:
    found = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": found}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def hub_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "COCO_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))


def put_repo(site: Site, name: str, kind: str, files: dict[str, bytes]) -> dict[str, str]:
    """Lets the site hold a hub repository; gives the path on the server of each file."""
    base = f"/datasets/{name}" if kind == "dataset" else f"/{name}"
    tree = []
    for path, content in files.items():
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
        if len(content) >= LARGE:
            entry["lfs"] = {"oid": hub_id(content), "size": len(content), "pointerSize": 130}
        tree.append(entry)
        site.files[f"{base}/resolve/{COMMIT}/{path}"] = content
    about = json.dumps({"id": name, "sha": COMMIT, "siblings": [], "private": False, "tags": []}).encode()
    for revision in ("main", COMMIT):
        site.files[f"/api/{kind}s/{name}/revision/{revision}"] = about
        site.files[f"/api/{kind}s/{name}/tree/{revision}"] = json.dumps(tree).encode()
    return {path: f"{base}/resolve/{COMMIT}/{path}" for path in files}


def everything(_: str) -> bool:
    return True


SMALL = {"config.json": b'{"a": 1}', "deep/er/成龙 01.json": "成龙".encode(), "weights.bin": bytes(range(256)) * 4000}


@pytest.fixture
def repo(site: Site, tmp_path: Path) -> tuple[dict[str, str], Callable[[], tuple[int, list[str]]], Path]:
    """A repository of three files: their paths on the server, what fetches them, and where to."""
    paths = put_repo(site, "someone/thing", "model", SMALL)
    target = tmp_path / "target"

    def fetch() -> tuple[int, list[str]]:
        found = list_repo("someone/thing", "model", "main", everything, site.url)
        assert found.commit == COMMIT
        return fetch_repo(found, target, target / ".download", workers=2, retries=QUICK)

    return paths, fetch, target


def held(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_hub_repository_arrives_whole(site, repo) -> None:
    _, fetch, target = repo
    assert fetch() == (3, [])
    assert held(target) == SMALL  # and nothing else: no staging, no .part, no metadata


def test_second_run_fetches_only_what_is_missing_or_broken(site, repo) -> None:
    paths, fetch, target = repo
    fetch()
    content = bytearray(SMALL["weights.bin"])
    content[1234] ^= 1
    (target / "weights.bin").write_bytes(content)
    (target / "config.json").unlink()
    site.asked.clear()
    assert fetch() == (2, [])
    assert held(target) == SMALL
    assert site.gets(paths["deep/er/成龙 01.json"]) == []
    site.asked.clear()
    assert fetch() == (0, [])
    assert not any("/resolve/" in path for _, path, _ in site.asked)


@pytest.mark.parametrize(
    "faults", [["drop"], ["long"], ["busy"], ["garbage"], ["drop", "no range"], ["short"]], ids=str
)
def test_hub_file_survives_a_bad_server(site, repo, faults) -> None:
    paths, fetch, target = repo
    site.faults[paths["weights.bin"]] = list(faults)
    assert fetch() == (3, [])
    assert held(target) == SMALL
    assert len(site.gets(paths["weights.bin"])) > 1


def test_dropped_hub_file_is_gone_on_with(site, repo, monkeypatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # kept in such pieces; 10 MB otherwise
    paths, fetch, target = repo
    site.faults[paths["weights.bin"]] = ["drop"]
    fetch()
    half = len(SMALL["weights.bin"]) // 2
    assert site.gets(paths["weights.bin"]) == [None, f"bytes={half}-"]
    assert held(target) == SMALL


def test_hub_file_that_never_fits_is_reported_and_does_not_appear(site, repo) -> None:
    paths, fetch, target = repo
    site.faults[paths["weights.bin"]] = ["garbage"] * 20
    fetched, failed = fetch()
    assert fetched == 2
    assert len(failed) == 1
    assert failed[0].startswith("weights.bin: what came is not what the hub lists: its sha256")
    assert not (target / "weights.bin").exists()
    assert len(site.gets(paths["weights.bin"])) == QUICK.attempts
    site.faults.clear()
    assert fetch() == (1, [])
    assert held(target) == SMALL


def test_hub_without_the_repository(site) -> None:
    with pytest.raises(MMRoleError, match="does not list") as error:
        list_repo("someone/other", "model", "main", everything, site.url)
    assert "HF_ENDPOINT" in str(error.value)


@pytest.mark.parametrize("path", ["../out.json", "/etc/out.json", "a/../../out.json"])
def test_hub_cannot_write_elsewhere(site, path) -> None:
    put_repo(site, "someone/thing", "model", {"x": b"x"})
    tree = [{"type": "file", "path": path, "size": 1, "oid": git_id(b"x")}]
    site.files[f"/api/models/someone/thing/tree/{COMMIT}"] = json.dumps(tree).encode()
    with pytest.raises(MMRoleError, match="leads elsewhere"):
        list_repo("someone/thing", "model", "main", everything, site.url)


def test_content_problem(tmp_path: Path) -> None:
    path = tmp_path / "file"
    small, large = HubFile("file", 3, git_id(b"abc")), HubFile("file", 3, "", hashlib.sha256(b"abc").hexdigest())
    assert content_problem(path, small) == "not there"
    path.write_bytes(b"abc")
    assert content_problem(path, small) is None
    assert content_problem(path, large) is None
    path.write_bytes(b"abd")
    assert "git id" in content_problem(path, small)
    assert "sha256" in content_problem(path, large)
    path.write_bytes(b"abcd")
    assert content_problem(path, small) == "4 bytes instead of 3"


def test_full_disk_is_told_before_anything_is_fetched(site, repo, monkeypatch) -> None:
    _, fetch, target = repo
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(MMRoleError, match="not enough room") as error:
        fetch()
    assert "0.0 GB free" in str(error.value)
    assert not target.exists()
    assert not any("/resolve/" in path for _, path, _ in site.asked)


def test_what_is_wanted_of_the_repositories() -> None:
    wanted = [
        "config.json",
        "qwen.tiktoken",
        "pytorch_model-00001-of-00010.bin",
        "LICENSE",
        "assets/logo.jpg",
        "SimSun.ttf",
    ]
    unwanted = ["modeling_qwen.py", "training_args.bin", "global_step100/x.pt", "rng_state_0.pth", ".gitattributes"]
    assert [name for name in wanted + unwanted if download._is_weight(name)] == wanted
    assert download._is_data("images/annotations.json")
    assert download._is_data("data/train/train_85k.json")
    assert not download._is_data("README.md")  # would be written over this repository's own


IMAGES = {f"{number:012d}.jpg": jpeg(number) for number in (9, 25, 30)}
BAD_FAULTS = [["drop"], ["long"], ["short"], ["busy", "busy"], ["garbage"], ["drop", "no range"], ["drop", "garbage"]]


@pytest.fixture
def coco(site: Site) -> Site:
    site.files = {f"/train/{name}": content for name, content in IMAGES.items()}
    return site


def fetch_images(site: Site, root: Path, names: list[str] | None = None) -> list[str]:
    return fetch_coco(root, names or sorted(IMAGES), workers=3, retries=QUICK, url=f"{site.url}/train/")


@pytest.mark.parametrize("faults", BAD_FAULTS, ids=str)
def test_images_survive_a_bad_server(coco: Site, tmp_path: Path, faults: list[str]) -> None:
    coco.faults = {f"/train/{name}": list(faults) for name in IMAGES}
    assert fetch_images(coco, tmp_path) == []
    assert held(tmp_path / COCO_FOLDER) == IMAGES
    assert missing_coco(tmp_path, sorted(IMAGES)) == []
    if faults == ["drop"]:
        assert all(coco.gets(f"/train/{name}")[1].startswith("bytes=") for name in IMAGES)
    if "no range" in faults:  # the whole file that came was not put behind the half that was there
        assert all(len(coco.gets(f"/train/{name}")) == 2 for name in IMAGES)


def test_image_is_gone_on_with_where_it_stopped(coco: Site, tmp_path: Path) -> None:
    name, content = next(iter(IMAGES.items()))
    part = tmp_path / COCO_FOLDER / f"{name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:1000])
    assert fetch_images(coco, tmp_path, [name]) == []
    assert coco.gets(f"/train/{name}") == ["bytes=1000-"]
    assert held(tmp_path / COCO_FOLDER) == {name: content}
    # All of it was there, only not yet under its name.
    (tmp_path / COCO_FOLDER / name).rename(part)
    assert fetch_images(coco, tmp_path, [name]) == []
    assert held(tmp_path / COCO_FOLDER) == {name: content}


def test_failed_images_are_named_and_the_others_come(coco: Site, tmp_path: Path) -> None:
    first, second, third = sorted(IMAGES)
    coco.faults = {f"/train/{first}": ["missing"], f"/train/{second}": ["garbage"] * 20}
    failed = fetch_images(coco, tmp_path)
    assert [line.partition(":")[0] for line in failed] == [first, second]
    assert "404" in failed[0]
    assert "no JPEG" in failed[1]
    assert held(tmp_path / COCO_FOLDER) == {third: IMAGES[third]}
    assert len(coco.gets(f"/train/{first}")) == 1  # a missing one is not asked for again
    assert missing_coco(tmp_path, sorted(IMAGES)) == [first, second]


def test_dead_server_is_given_up(tmp_path: Path) -> None:
    names = [f"{number:012d}.jpg" for number in range(500)]
    with pytest.raises(MMRoleError, match="one after the other") as error:
        fetch_coco(tmp_path, names, workers=4, retries=Retries(1, 0), url="http://127.0.0.1:9/x")
    assert "COCO_URL" in str(error.value)


def test_endless_image_is_stopped(coco: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_coco, "LARGEST_IMAGE", 1000)
    name = next(iter(IMAGES))
    assert fetch_images(coco, tmp_path, [name]) == [f"{name}: over 1,000 bytes"]
    assert held(tmp_path) == {}


def test_broken_images_are_seen(tmp_path: Path) -> None:
    content, path = jpeg(1), tmp_path / "image.jpg"
    cases = {"end": content[:-2], "no JPEG": b"", "decoded": content[:300] + content[-2:], "JPEG": b"\x89PNG" + content}
    for words, broken in cases.items():
        path.write_bytes(broken)
        assert words in (jpeg_problem(path) or "")
    path.write_bytes(content + b"\0\0")  # some of MS-COCO's have something behind
    assert jpeg_problem(path) is None


def test_referenced_images(tmp_path: Path) -> None:
    rows = [
        {"image": "COCO/train2017/000000000009.jpg"},
        {"image": "Friends/01.jpg", "value": "COCO/train2017/000000000010.jpg"},
        {"image": "COCO/train2017/../../x.jpg"},
    ]
    for place, indent in (("dialogues/in-distribution/comment/A.json", None), ("data/test/out/x_test.json", 4)):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(json.dumps(rows, indent=indent))
    assert referenced_coco(tmp_path) == ["000000000009.jpg"]
    with pytest.raises(MMRoleError, match="no dialogues"):
        referenced_coco(tmp_path / "elsewhere")


def test_all_referenced_images_of_the_snapshot(shared: Path) -> None:
    assert len(referenced_coco(shared / "mmrole_data")) == download.REFERENCED_COCO


def put_data(site: Site) -> dict[str, bytes]:
    dialogue = [{"id": "A_comment_COCO_0", "image": f"COCO/train2017/{name}", "conversations": []} for name in IMAGES]
    files = {
        "README.md": b"the data set's own",
        "dialogues/in-distribution/comment/A.json": json.dumps(dialogue).encode(),
        "profiles/in-distribution/profiles.json": b"{}",
        "images/Friends/01.jpg": jpeg(77),
    }
    put_repo(site, download.DATASET, "dataset", files)
    site.files |= {f"/train/{name}": content for name, content in IMAGES.items()}
    coco = {f"{COCO_FOLDER}/{name}": content for name, content in IMAGES.items()}
    return {name: content for name, content in files.items() if name != "README.md"} | coco


def test_data_script(site: Site, tmp_path: Path) -> None:
    expected = put_data(site)
    environment = {"HF_ENDPOINT": site.url, "COCO_URL": f"{site.url}/train", "DATA_ROOT": "root"}
    result = run_script("download_data.sh", tmp_path, environment)
    assert result.returncode == 0, result.stderr
    assert held(tmp_path / "root") == expected
    assert "3 of 3 files are there and verified, 3 fetched now" in result.stdout
    counts = Counter(path for method, path, _ in site.asked if method == "GET")
    assert all(counts[f"/train/{name}"] == 1 for name in IMAGES)


def test_weights_script_leaves_out_code(site: Site, tmp_path: Path) -> None:
    for name, folder in download.WEIGHTS.values():
        code = {"modeling_qwen.py": b"print()", "training_args.bin": b"pickle"}
        put_repo(site, name, "model", {"config.json": folder.encode(), "pytorch_model.bin": b"w" * 5000, **code})
    environment = {"HF_ENDPOINT": site.url, "WEIGHTS_DIR": "weights"}
    result = run_script("download_weights.sh", tmp_path, environment, "reward-model")
    assert result.returncode == 0, result.stderr
    folder = "MMRole-Eval_RM"
    assert held(tmp_path / "weights") == {
        f"{folder}/config.json": folder.encode(),
        f"{folder}/pytorch_model.bin": b"w" * 5000,
    }


def test_failure_gives_status_1_and_user_errors_2(site: Site, tmp_path: Path) -> None:
    put_data(site)
    site.faults[f"/train/{min(IMAGES)}"] = ["missing"] * 9
    environment = {"HF_ENDPOINT": site.url, "COCO_URL": f"{site.url}/train", "DATA_ROOT": "root"}
    result = run_script("download_data.sh", tmp_path, environment, "--attempts", "1")
    assert result.returncode == 1
    assert f"failed: {min(IMAGES)}: status 404" in result.stdout
    result = run_script("download_weights.sh", tmp_path, environment, "qwen")
    assert result.returncode == 2
    assert "no such weights" in result.stderr


def test_safetensors_are_preferred() -> None:
    names = [
        "model-00001-of-00002.safetensors",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "x.json",
    ]
    repo = download.HubRepo("a/b", "model", COMMIT, tuple(HubFile(name, 1, "") for name in names))
    assert [file.path for file in download._without_twins(repo).files] == [names[0], names[3]]


def run_script(name: str, folder: Path, environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    import os
    import sys

    environ = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environ |= {"HF_HOME": str(folder / "hf"), "VIRTUAL_ENV": sys.prefix, **environment}
    command = ["bash", str(ROOT / "scripts" / name), *flags]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=100)
