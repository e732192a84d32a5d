"""Downloads that are killed, stopped, refused by the disk or the hub, and gone on with: nothing that came is lost."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from data_utils.download import downloads as download
from data_utils.download import transfer
from data_utils.download.coco import COCO_FOLDER, fetch_coco
from data_utils.download.downloads import content_problem, fetch_repo, list_repo
from data_utils.download.transfer import Retries, Source, StoppedError, fetch_file, in_parallel
from data_utils.errors import MMRoleError
from tests.conftest import ROOT
from tests.data_utils.loopback import Site, git_id, held, put_repo, serving

NAME, FOLDER = download.WEIGHTS["reward-model"]
WEIGHTS = os.urandom(100) * 10_007
FILES = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS}
PART = f"model.safetensors.{hashlib.sha256(WEIGHTS).hexdigest()[:12]}.part"
QUICK = Retries(attempts=3, first_wait=0.01)

pytestmark = pytest.mark.usefixtures("hub_at_home")


@pytest.fixture
def weights(site: Site) -> str:
    """The path on the server of the one large file of a repository."""
    return put_repo(site, NAME, "model", FILES)["model.safetensors"]


def fetch(site: Site, target: Path, retries: Retries = QUICK, workers: int = 2) -> tuple[int, list[str]]:
    return fetch_repo(list_repo(NAME, "model", "main", lambda _: True, site.url), target, workers, retries)


def started(site: Site, out_dir: Path) -> subprocess.Popen[str]:
    """The command that downloads the repository, in a process that can be interrupted as in a terminal."""
    command = [sys.executable, "-m", "data_utils.download", "weights", "reward-model", "--out_dir", str(out_dir)]
    environ = {**os.environ, "HF_ENDPOINT": site.url, "HF_HOME": str(out_dir / "hf")}
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not get that far"
        time.sleep(0.01)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def half_way(site: Site, out_dir: Path, fault: str, weights: str) -> subprocess.Popen[str]:
    """A download of which the small file is there, and almost half of the large one."""
    site.faults[weights] = [fault]
    process = started(site, out_dir)
    folder = out_dir / FOLDER
    wait_for(lambda: size_of(folder / PART) > 450_000 and (folder / "config.json").exists(), process)
    return process


def test_killed_download_goes_on_where_it_stopped(site: Site, tmp_path: Path, weights: str) -> None:
    folder = tmp_path / FOLDER
    process = half_way(site, tmp_path, "stall", weights)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert set(held(folder)) == {"config.json", PART}
    there = size_of(folder / PART)
    assert 0 < there < len(WEIGHTS)
    site.asked.clear()
    again = started(site, tmp_path)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert site.gets(weights) == [f"bytes={there}-"]
    assert held(folder) == FILES
    assert "2 of 2 files are there and verified, 1 fetched now" in output


@pytest.mark.parametrize("fault", ["stall", "trickle"])
def test_interrupted_download_ends_at_once_and_keeps_what_came(
    site: Site, tmp_path: Path, weights: str, fault: str
) -> None:
    process = half_way(site, tmp_path, fault, weights)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 30  # a second, or what a busy machine takes to end a process; the server's is 120
    assert process.returncode == 130
    assert "what was finished is kept" in errors
    there = size_of(tmp_path / FOLDER / PART)
    assert WEIGHTS.startswith((tmp_path / FOLDER / PART).read_bytes())
    site.asked.clear()
    assert fetch(site, tmp_path / FOLDER) == (1, [])
    assert site.gets(weights) == [f"bytes={there}-"]


@pytest.mark.parametrize(("fault", "least"), [("trickle", 450_000), ("busy", 0)])
def test_file_is_left_soon_after_the_stop(site: Site, tmp_path: Path, weights: str, fault: str, least: int) -> None:
    site.faults[weights] = [fault] * 9
    stop, part, slowly = threading.Event(), tmp_path / PART, Retries(attempts=5, first_wait=60)
    raised = []

    def work() -> None:
        source = Source(site.url + weights, size=len(WEIGHTS))
        with pytest.raises(StoppedError) as error:
            fetch_file(source, tmp_path / "file", part, lambda _: None, retries=slowly, stop=stop)
        raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not site.gets(weights) or size_of(part) < least:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stop.set()
    thread.join(30)  # the server goes on for minutes, and the wait before the next try takes one
    assert raised
    assert part.exists() == bool(least)  # without anything in it, it is not kept


def test_checking_is_stopped_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(WEIGHTS)
    stop = threading.Event()
    stop.set()
    file = download.HubFile("file", len(WEIGHTS), git_id(WEIGHTS))
    with pytest.raises(StoppedError):
        content_problem(tmp_path / "file", file, stop)


def test_range_that_is_ignored_starts_over(site: Site, tmp_path: Path, weights: str) -> None:
    (tmp_path / PART).write_bytes(WEIGHTS[:300_000])
    site.faults[weights] = ["no range"]
    assert fetch(site, tmp_path) == (2, [])
    assert site.gets(weights) == ["bytes=300000-"]
    assert held(tmp_path) == FILES


def test_whole_part_is_not_asked_for(site: Site, tmp_path: Path, weights: str) -> None:
    (tmp_path / PART).write_bytes(WEIGHTS)
    assert fetch(site, tmp_path) == (2, [])
    assert site.gets(weights) == []
    assert held(tmp_path) == FILES


@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * len(WEIGHTS), WEIGHTS + b"x"], ids=["start", "all", "too long"])
def test_part_that_is_wrong_is_thrown_away(site: Site, tmp_path: Path, weights: str, part: bytes) -> None:
    (tmp_path / PART).write_bytes(part)
    assert fetch(site, tmp_path) == (2, [])
    assert site.gets(weights)[-1] is None
    assert held(tmp_path) == FILES


def test_file_that_lies_does_not_stay(site: Site, tmp_path: Path, weights: str) -> None:
    site.faults[weights] = ["garbage"] * 20
    fetched, failed = fetch(site, tmp_path)
    assert fetched == 1
    assert failed == ["model.safetensors: what came is not what the hub lists: its sha256 is another"]
    assert site.gets(weights) == [None] * QUICK.attempts
    assert set(held(tmp_path)) == {"config.json"}


def test_line_that_drops_again_and_again_gets_there(site: Site, tmp_path: Path, weights: str) -> None:
    site.faults[weights] = ["drop"] * 5  # more often than it is tried without progress
    assert fetch(site, tmp_path) == (2, [])
    assert len(site.gets(weights)) == 6
    assert held(tmp_path) == FILES


def test_part_outlives_a_refusal(site: Site, tmp_path: Path, weights: str) -> None:
    (tmp_path / PART).write_bytes(WEIGHTS[:300_000])
    site.faults[weights] = ["missing"]
    assert fetch(site, tmp_path) == (1, ["model.safetensors: status 404"])
    assert fetch(site, tmp_path) == (1, [])
    assert site.gets(weights) == ["bytes=300000-"] * 2


def test_leftovers_are_removed(site: Site, tmp_path: Path, weights: str) -> None:
    other = tmp_path / f"model.safetensors.{'0' * 12}.part"  # of another version of the file
    orphan = tmp_path / ".download" / ".cache" / "huggingface" / "download" / "abc.def.incomplete"
    orphan.parent.mkdir(parents=True)
    mine = tmp_path / "my own.part"
    for path in (other, orphan, mine):
        path.write_bytes(b"x" * 1000)
    assert fetch(site, tmp_path) == (2, [])
    assert held(tmp_path) == {**FILES, mine.name: b"x" * 1000}
    assert not (tmp_path / ".download").exists()


def test_room_is_reckoned_without_what_is_there(
    site: Site, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    free = download.MARGIN + len(WEIGHTS) - 200_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - free, free))
    with pytest.raises(MMRoleError, match="not enough room"):
        fetch(site, tmp_path)
    (tmp_path / PART).write_bytes(WEIGHTS[:300_000])
    repo = list_repo(NAME, "model", "main", lambda _: True, site.url)
    assert download.bytes_to_come(repo, tmp_path) == len(FILES["config.json"]) + len(WEIGHTS) - 300_000
    assert fetch(site, tmp_path) == (2, [])


def assert_told_in_four_parts(error: MMRoleError, what: str, path: Path) -> None:
    assert what in error.what
    assert str(path) in str(error)
    assert "run the same command again" in (error.fix or "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_stops_at_once(site: Site, tmp_path: Path, weights: str) -> None:
    (tmp_path / PART).symlink_to("/dev/full")  # takes nothing: no space left on the device
    with pytest.raises(MMRoleError) as error:
        fetch(site, tmp_path)
    assert_told_in_four_parts(error.value, os.strerror(errno.ENOSPC), tmp_path / PART)
    assert "free some space" in error.value.fix
    assert site.gets(weights) == [None]  # not tried again


@pytest.mark.parametrize("number", [errno.EROFS, errno.EDQUOT, errno.EACCES], ids=errno.errorcode.get)
def test_disk_that_cannot_be_written_stops_at_once(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    put_repo(site, NAME, "model", {f"{index}.json": b"%d" % index for index in range(100)})
    opened = Path.open

    def refused(path: Path, mode: str = "r", *rest: int, **more: int) -> object:
        if "a" in mode:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(MMRoleError) as error:
        fetch(site, tmp_path)
    assert_told_in_four_parts(error.value, os.strerror(number), tmp_path)
    assert not any("/resolve/" in path for _, path, _ in site.asked)


def test_full_disk_stops_the_images_too(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / COCO_FOLDER
    folder.mkdir(parents=True)
    (folder / "000000000009.jpg.part").symlink_to("/dev/full")
    site.files["/000000000009.jpg"] = WEIGHTS
    with pytest.raises(MMRoleError, match=os.strerror(errno.ENOSPC)):
        fetch_coco(tmp_path, ["000000000009.jpg"], workers=1, retries=QUICK, url=site.url)
    assert site.gets("/000000000009.jpg") == [None]


def test_dead_hub_is_given_up(site: Site, tmp_path: Path) -> None:
    paths = put_repo(site, NAME, "model", {f"{index}.json": b"%d" % index for index in range(300)})
    site.faults = {path: ["busy"] * 9 for path in paths.values()}
    with pytest.raises(MMRoleError, match="8 files failed one after the other") as error:
        fetch(site, tmp_path, workers=4)
    assert error.value.value == "status 503"
    assert NAME in str(error.value)
    assert "HF_ENDPOINT" in str(error.value)
    asked = {path for _, path, _ in site.asked if "/resolve/" in path}
    assert download.GIVE_UP_AFTER <= len(asked) < download.GIVE_UP_AFTER + 2 * 4  # and what was under way
    assert held(tmp_path) == {}


def test_good_files_between_keep_a_poor_hub_alive(site: Site, tmp_path: Path) -> None:
    paths = put_repo(site, NAME, "model", {f"{index:02}.json": b"%d" % index for index in range(40)})
    site.faults = {path: ["missing"] for path in list(paths.values())[::2]}
    fetched, failed = fetch(site, tmp_path, workers=1)
    assert (fetched, len(failed)) == (20, 20)


def test_two_processes_do_not_write_one_file(site: Site, tmp_path: Path, weights: str) -> None:
    (tmp_path / PART).write_bytes(WEIGHTS[:300_000])
    with (tmp_path / PART).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(MMRoleError, match="another process"):
            fetch(site, tmp_path)
        assert size_of(tmp_path / PART) == 300_000
    assert fetch(site, tmp_path)[1] == []


def test_part_that_another_process_just_finished_is_left_alone(
    site: Site, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def too_late(file: object, how: int) -> None:
        if Path(file.name).name == PART:
            (tmp_path / PART).replace(tmp_path / "model.safetensors")
        lock(file, how)

    (tmp_path / PART).write_bytes(WEIGHTS)
    monkeypatch.setattr(fcntl, "flock", too_late)
    with pytest.raises(MMRoleError, match="another process"):
        fetch(site, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_file_system_without_locks(site: Site, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert fetch(site, tmp_path) == (2, [])
    assert held(tmp_path) == FILES


def test_token_goes_to_the_hub_and_not_where_it_redirects(
    site: Site, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PART).write_bytes(WEIGHTS[:300_000])
    with serving() as store:
        store.files["/blob"] = WEIGHTS
        site.moved[weights] = store.url.replace("127.0.0.1", "localhost") + "/blob?signature=1"
        assert fetch(site, tmp_path / "out") == (2, [])
    assert site.tokens[weights] == "Bearer hf_secret"
    assert store.tokens["/blob"] is None
    assert store.gets("/blob") == ["bytes=300000-"]
    assert held(tmp_path / "out") == FILES


def test_work_that_heeds_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PATIENCE", 0.2)
    over = threading.Event()

    def work(number: int, _: threading.Event) -> int:
        if number:
            over.wait(60)
        return number

    begun = time.monotonic()
    ended = in_parallel(work, [0, 1, 2, 3], workers=2)
    assert next(ended) == (0, 0)
    ended.close()
    assert 0.15 < time.monotonic() - begun < 30
    over.set()


def test_first_error_of_the_work_stops_the_rest() -> None:
    done = []

    def work(number: int, stop: threading.Event) -> None:
        if number == 0:
            raise MMRoleError("no more")
        done.append(number)
        stop.wait(60)

    with pytest.raises(MMRoleError, match="no more"):
        list(in_parallel(work, range(100), workers=2))
    assert len(done) <= 2
