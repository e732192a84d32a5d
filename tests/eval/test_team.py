"""Who is of the team, and a launcher that is gone."""

import os
import signal
import time

import psutil
import pytest

from eval.running import team
from tests.processes import free_port, kill

NODE = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    for name in [*NODE, "LOCAL_RANK", "LOCAL_WORLD_SIZE", team.LAUNCHER]:
        monkeypatch.delenv(name, raising=False)
    return lambda settings: [monkeypatch.setenv(name, value) for name, value in settings.items()]


def test_what_a_cluster_sets_makes_no_team(environment):
    environment(NODE)
    assert (team.local_rank(), team.local_size(), team.is_first(), team.join_team()) == (None, 1, True, None)


def test_what_torchrun_sets_does(environment):
    environment({**NODE, "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert (team.local_rank(), team.local_size(), team.is_first()) == (1, 2, False)


def test_who_waits_for_the_others_ends_with_the_launcher(environment, monkeypatch):
    environment({**NODE, "RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": free_port()})
    monkeypatch.setattr(team, "_BEAT", 0.1)
    launcher = os.fork()
    if not launcher:
        if not os.fork():
            try:
                team.join_team()  # the first process never comes
            finally:
                os._exit(70)
        time.sleep(300)
        os._exit(0)
    end = time.monotonic() + 60
    while not (waiting := psutil.Process(launcher).children()) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.5)  # it may look at its launcher before that is gone, or only afterwards: see the next test
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    _, left = psutil.wait_procs(waiting, timeout=60)
    for process in left:
        kill(process.pid)
    assert waiting and not left


def test_a_launcher_that_was_gone_before_anybody_looked(environment):
    environment({team.LAUNCHER: str(os.getpid())})
    assert not team._is_gone(os.getppid())
    gone = os.fork()
    if not gone:
        os._exit(0)
    os.waitpid(gone, 0)
    environment({team.LAUNCHER: str(gone)})
    assert team._is_gone(os.getppid())
