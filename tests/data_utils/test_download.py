"""Downloads from a server on loopback that drops the line, sends garbage, is busy, and stalls."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter, namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_utils.download import run as download
from data_utils.download.coco import COCO_FOLDER, fetch_coco, jpeg_problem, missing_coco, referenced_coco
from data_utils.download.hub import STAGING, HubFile, HubRepo, content_problem, fetch_repo, list_repo
from data_utils.errors import MMRoleError
from tests.conftest import ROOT
from tests.data_utils.loopback import COMMIT, Site, git_id, held, put_repo

SMALL = {"config.json": b'{"a": 1}', "deep/er/成龙 [01].json": "成龙".encode(), "weights.bin": bytes(range(256)) * 4001}
Fetch = Callable[[], tuple[int, list[str]]]

pytestmark = pytest.mark.usefixtures("at_home")


def jpeg(seed: int, size: int = 240) -> bytes:
    pixels = Image.effect_noise((size, size), 40 + seed).convert("RGB")
    content = io.BytesIO()
    pixels.save(content, "JPEG")
    return content.getvalue()


@pytest.fixture
def repo(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, str], Fetch, Path]:
    """A repository of three files: their paths on the server, a function that fetches them, and the target."""
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    paths = put_repo(site, "someone/thing", "model", SMALL)
    target = tmp_path / "target"

    def fetch() -> tuple[int, list[str]]:
        found = list_repo("someone/thing", "model", "main", lambda _: True)
        assert found.commit == COMMIT
        return fetch_repo(found, target, workers=2, attempts=3)

    return paths, fetch, target


def test_second_run_fetches_only_what_is_missing_or_broken(site: Site, repo) -> None:
    paths, fetch, target = repo
    assert fetch() == (3, [])
    assert held(target) == SMALL  # and nothing else: no staging, no notes of the hub's client
    content = bytearray(SMALL["weights.bin"])
    content[1234] ^= 1
    (target / "weights.bin").write_bytes(content)
    (target / "config.json").unlink()
    site.requests.clear()
    assert fetch() == (2, [])
    assert held(target) == SMALL
    assert site.gets(paths["deep/er/成龙 [01].json"]) == []
    site.requests.clear()
    assert fetch() == (0, [])
    assert not any("/resolve/" in path for _, path, _ in site.requests)


@pytest.mark.parametrize("fault", ["drop", "busy", "garbage", "missing"])
def test_hub_file_survives_a_bad_server(site: Site, repo, fault: str) -> None:
    paths, fetch, target = repo
    site.faults[paths["weights.bin"]] = [fault]
    assert fetch() == (3, [])
    assert held(target) == SMALL
    assert len(site.gets(paths["weights.bin"])) == 2


def test_hub_file_that_never_fits_is_reported_and_does_not_appear(site: Site, repo) -> None:
    paths, fetch, target = repo
    site.faults[paths["weights.bin"]] = ["garbage"] * 20
    fetched, failed = fetch()
    assert fetched == 2
    assert failed == ["weights.bin: its sha256 differs"]
    assert held(target) == {name: content for name, content in SMALL.items() if name != "weights.bin"}
    assert len(site.gets(paths["weights.bin"])) == 3


def test_files_that_a_killed_run_finished_are_taken(site: Site, repo) -> None:
    paths, fetch, target = repo
    cache = target / STAGING / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    (cache / "abc.def.incomplete").write_bytes(b"half of it")
    (target / STAGING / "weights.bin").write_bytes(SMALL["weights.bin"])
    (target / STAGING / "config.json").write_bytes(b"half")
    assert fetch() == (3, [])
    assert held(target) == SMALL
    assert site.gets(paths["weights.bin"]) == []


def test_what_somebody_changed_is_kept(repo, capsys: pytest.CaptureFixture[str]) -> None:
    """As after adding characters to a published root, and then fetching the rest of it."""
    _, fetch, target = repo
    fetch()
    (target / "config.json").write_bytes(b'{"a": 2}')
    assert fetch() == (1, [])
    assert "it is kept as config.json.before" in capsys.readouterr().out
    assert held(target) == {**SMALL, "config.json.before": b'{"a": 2}'}
    assert fetch() == (0, [])


def test_what_is_there_stays_until_the_hub_sends_better(site: Site, repo) -> None:
    paths, fetch, target = repo
    fetch()
    (target / "config.json").write_bytes(b'{"a": 2}')
    site.faults[paths["config.json"]] = ["missing"] * 20
    [failed] = fetch()[1]
    assert "404" in failed
    assert held(target) == {**SMALL, "config.json": b'{"a": 2}'}


def test_ctrl_c_ends_a_download_at_once(site: Site, tmp_path: Path) -> None:
    """Even while the server stalls."""
    name, folder = download.WEIGHTS["reward-model"]
    weights = put_repo(site, name, "model", SMALL)["weights.bin"]
    site.faults[weights] = ["stall"]
    command = [sys.executable, str(ROOT / "data_utils/download"), "weights", "reward-model", "--out_dir", str(tmp_path)]
    environ = {**os.environ, "HF_ENDPOINT": site.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=environ, **streams) as process:
        while not site.stalled.wait(0.1):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
    assert process.returncode == 130
    assert "finished files are kept" in errors
    assert not site.over.is_set()
    assert not (tmp_path / folder / "weights.bin").exists()


def test_hub_without_the_repository(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    with pytest.raises(MMRoleError, match="does not list") as error:
        list_repo("someone/other", "model", "main", lambda _: True)
    assert "HF_ENDPOINT" in str(error.value)
    assert "HF_TOKEN" in str(error.value)


@pytest.mark.parametrize("path", ["../out.json", "/etc/out.json", "a/../../out.json"])
def test_hub_cannot_write_elsewhere(site: Site, repo, path: str) -> None:
    tree = [{"type": "file", "path": path, "size": 1, "oid": git_id(b"x")}]
    site.files[f"/api/models/someone/thing/tree/{COMMIT}"] = json.dumps(tree).encode()
    with pytest.raises(MMRoleError, match="outside of the repository"):
        repo[1]()


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


def test_full_disk_is_named_before_anything_is_fetched(site: Site, repo, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fetch, target = repo
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(MMRoleError, match="not enough room") as error:
        fetch()
    assert "0.0 GB free" in str(error.value)
    assert not target.exists()
    assert not any("/resolve/" in path for _, path, _ in site.requests)


def test_what_is_wanted_of_the_repositories() -> None:
    wanted = [
        *("config.json", "qwen.tiktoken", "pytorch_model-00001-of-00010.bin", "LICENSE", "assets/logo.jpg"),
        "SimSun.ttf",
    ]
    unwanted = ["modeling_qwen.py", "training_args.bin", "global_step100/x.pt", "rng_state_0.pth", ".gitattributes"]
    assert [name for name in wanted + unwanted if download.is_weight(name)] == wanted
    assert download.is_data("images/annotations.json")
    assert download.is_data("data/train/train_85k.json")
    assert not download.is_data("README.md")  # would be written over this repository's own


def test_safetensors_are_preferred() -> None:
    names = [
        "model-00001-of-00002.safetensors",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "x",
    ]
    repo = HubRepo("a/b", "model", COMMIT, tuple(HubFile(name, 1, "") for name in names))
    assert [file.path for file in download.without_twins(repo).files] == [names[0], names[3]]


IMAGES = {f"{number:012d}.jpg": jpeg(number) for number in (9, 25, 30)}


@pytest.fixture
def coco(site: Site) -> Site:
    site.files = {f"/train/{name}": content for name, content in IMAGES.items()}
    return site


def fetch_images(site: Site, root: Path) -> list[str]:
    return fetch_coco(root, sorted(IMAGES), workers=3, attempts=3, url=f"{site.url}/train/")


@pytest.mark.parametrize("faults", [["drop"], ["short"], ["busy", "garbage"]], ids=str)
def test_images_survive_a_bad_server(coco: Site, tmp_path: Path, faults: list[str]) -> None:
    coco.faults = {f"/train/{name}": list(faults) for name in IMAGES}
    assert fetch_images(coco, tmp_path) == []
    assert held(tmp_path / COCO_FOLDER) == IMAGES
    assert missing_coco(tmp_path, sorted(IMAGES)) == []


def test_failed_images_are_named_and_the_others_come(coco: Site, tmp_path: Path) -> None:
    first, second, third = sorted(IMAGES)
    coco.faults = {f"/train/{first}": ["missing"], f"/train/{second}": ["garbage"] * 20}
    failed = fetch_images(coco, tmp_path)
    assert [line.partition(":")[0] for line in failed] == [first, second]
    assert "404" in failed[0]
    assert "not a JPEG" in failed[1]
    assert held(tmp_path / COCO_FOLDER) == {third: IMAGES[third]}
    assert len(coco.gets(f"/train/{first}")) == 1  # a missing one is not retried
    assert missing_coco(tmp_path, sorted(IMAGES)) == [first, second]


def test_dead_image_server_is_given_up(tmp_path: Path) -> None:
    names = [f"{number:012d}.jpg" for number in range(500)]
    with pytest.raises(MMRoleError, match="in a row failed") as error:
        fetch_coco(tmp_path, names, workers=4, attempts=1, url="http://127.0.0.1:9/x")
    assert "COCO_URL" in str(error.value)


def test_disk_that_takes_no_images_ends_it(coco: Site, tmp_path: Path) -> None:
    (tmp_path / COCO_FOLDER / f"{min(IMAGES)}.part").mkdir(parents=True)
    with pytest.raises(MMRoleError, match="cannot write") as error:
        fetch_images(coco, tmp_path)
    assert "run the same command again" in str(error.value)


def test_broken_images_are_seen() -> None:
    content = jpeg(1)
    cases = {
        "end": content[:-2],
        "not a JPEG": b"",
        "decoded": content[:300] + content[-2:],
        "JPEG": b"\x89PNG" + content,
    }
    for words, broken in cases.items():
        assert words in (jpeg_problem(broken) or "")
    assert jpeg_problem(content + b"\0\0") is None  # some of MS-COCO's have data after their end


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
    assert "3 of 3 files verified, 3 fetched now" in result.stdout
    counts = Counter(path for method, path, _ in site.requests if method == "GET")
    assert all(counts[f"/train/{name}"] == 1 for name in IMAGES)


def test_weights_script_leaves_out_code(site: Site, tmp_path: Path) -> None:
    name, folder = download.WEIGHTS["reward-model"]
    weights = {"config.json": b"{}", "pytorch_model.bin": b"w" * 5000}
    put_repo(site, name, "model", {**weights, "modeling_qwen.py": b"print()", "training_args.bin": b"pickle"})
    environment = {"HF_ENDPOINT": site.url, "WEIGHTS_DIR": "weights"}
    result = run_script("download_weights.sh", tmp_path, environment, "reward-model")
    assert result.returncode == 0, result.stderr
    assert held(tmp_path / "weights") == {f"{folder}/{name}": content for name, content in weights.items()}


def test_failure_gives_status_1_and_user_errors_2(site: Site, tmp_path: Path) -> None:
    put_data(site)
    site.faults[f"/train/{min(IMAGES)}"] = ["missing"] * 9
    environment = {"HF_ENDPOINT": site.url, "COCO_URL": f"{site.url}/train", "DATA_ROOT": "root"}
    result = run_script("download_data.sh", tmp_path, environment, "--attempts", "1")
    assert result.returncode == 1
    assert f"failed: {min(IMAGES)}: status 404" in result.stdout
    result = run_script("download_weights.sh", tmp_path, {"HF_ENDPOINT": "hf-mirror.com"}, "reward-model")
    assert result.returncode == 2
    assert "HF_ENDPOINT=https://" in result.stderr


def run_script(name: str, folder: Path, environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HF_HOME": str(folder / "hf"), "VIRTUAL_ENV": sys.prefix, **environment}
    command = ["bash", str(ROOT / "scripts" / name), *flags]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
