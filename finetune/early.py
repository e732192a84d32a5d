"""What can be known in the first second, before anything slow is imported: packages, and where curves are sent."""

from __future__ import annotations

import importlib.util
import netrc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from data_utils.errors import MMRoleError, raise_problems

FLAG = "--report_to"
# Packages that training needs beyond answering and judging, and the flag that asks for each.
PACKAGES = {"accelerate": None, "peft": "--use_lora", "deepspeed": "--deepspeed"}
_PATIENCE = 30  # seconds
_LOST = ("Connection closed by peer", "Connection reset by peer")
_WANDB_HOST = "api.wandb.ai"
_WANDB_NEEDS_NO_KEY = {"offline", "disabled", "dryrun"}


def check_early(argv: Sequence[str]) -> None:
    """Refuses what would fail, or wait at a prompt, once the weights are loaded.

    Args:
        argv: The command line.

    Raises:
        ProblemsError: A package is not installed; a reporter is unknown, not installed, or has no key.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # the first process tells it once
    found = [_package_problem(package, flag, argv) for package, flag in PACKAGES.items()]
    found += [_reporter_problem(reporter) for reporter in given_values(argv, FLAG)]
    raise_problems(problem for problem in found if problem)


@contextmanager
def told_once() -> Iterator[None]:
    """For problems that all processes find alike: only the first one of them tells.

    The others wait until the launcher ends them, which it does once the first has ended.
    """
    try:
        yield
    except MMRoleError:
        if os.environ.get("RANK", "0") == "0":
            raise
        time.sleep(_PATIENCE)
        raise SystemExit(2) from None


@contextmanager
def quiet_followers() -> Iterator[None]:
    """For what the processes do in step: where the first one ends with an error that it tells, the others say nothing.

    They lose the connection then, and wait until the launcher ends them.
    """
    try:
        yield
    except RuntimeError as error:
        if os.environ.get("RANK", "0") == "0" or not any(sign in str(error) for sign in _LOST):
            raise
        time.sleep(_PATIENCE)
        raise SystemExit(2) from None


def given_values(argv: Sequence[str], flag: str) -> list[str]:
    """The values of a flag on a command line; what is given last counts."""
    values: list[str] = []
    for place, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            values = [word.partition("=")[2]]
        elif word == flag:
            rest = list(argv[place + 1 :])
            values = rest[: next((i for i, value in enumerate(rest) if value.startswith("--")), len(rest))]
    return values


def _package_problem(package: str, flag: str | None, argv: Sequence[str]) -> MMRoleError | None:
    asked = flag is None or any(word.partition("=")[0] == flag for word in argv)
    if not asked or importlib.util.find_spec(package):
        return None
    return MMRoleError("training needs a package that is not installed", package, flag, "run: bash scripts/setup.sh")


def _reporter_problem(reporter: str) -> MMRoleError | None:
    if reporter == "none":
        return None
    if reporter not in ("tensorboard", "wandb"):
        return MMRoleError("no such reporter", reporter, FLAG, "use none, tensorboard or wandb")
    if importlib.util.find_spec(reporter) is None:
        return MMRoleError(
            f"{reporter} is not installed", reporter, FLAG, f"pip install {reporter}, or give {FLAG} none"
        )
    if reporter == "wandb" and not _wandb_can_log_in():
        fix = f"run `wandb login`, set WANDB_API_KEY, set WANDB_MODE=offline, or give {FLAG} none"
        return MMRoleError("wandb has no key, and would stop to ask for one", reporter, FLAG, fix)
    return None


def _wandb_can_log_in() -> bool:
    if os.environ.get("WANDB_MODE") in _WANDB_NEEDS_NO_KEY or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
