"""Prints that nobody reads."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

WORK = """
import sys
from tqdm import tqdm
from data_utils.console import ignore_lost_output
ignore_lost_output()
for number in range(3):
    print("told", number, "\\udcff", flush=number == 1)
list(tqdm(range(3)))
print("warned", file=sys.stderr)
open(sys.argv[1], "w").close()
"""


def run(path, **streams):
    return subprocess.run([sys.executable, "-c", WORK, path], cwd=ROOT, **streams)


def test_a_full_disk_stops_nothing(tmp_path):
    with Path("/dev/full").open("wb") as full:
        assert run(tmp_path / "made", stdout=full, stderr=full).returncode == 0
    assert (tmp_path / "made").exists()


def test_a_reader_that_has_gone_stops_nothing(tmp_path):
    work = subprocess.Popen(
        [sys.executable, "-u", "-c", WORK, tmp_path / "made"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    work.stdout.close()
    assert work.wait() == 0
    assert (tmp_path / "made").exists()


def test_a_closed_stdout_stops_nothing(tmp_path):
    command = f"exec '{sys.executable}' -c '{WORK}' '{tmp_path}/made' >&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True).returncode == 0
    assert (tmp_path / "made").exists()


def test_what_is_read_comes_in_order(tmp_path):
    done = run(tmp_path / "made", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout == b"".join(b"told %d \\udcff\n" % number for number in range(3))
    assert done.stderr.endswith(b"warned\n")
