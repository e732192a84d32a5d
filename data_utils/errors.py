"""Errors for users in four parts: what is wrong, the value, where, and what to do."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from qwen_vl.checkpoint import CheckpointError

_MAX_VALUE = 300
_MOST_PROBLEMS = 100  # that are printed
_INDENT = " " * 9


class MMRoleError(Exception):
    """A problem that the user can fix.

    Args:
        what: What is wrong, one sentence.
        value: The offending value; shown as text, cut when it is very long. A list is shown one item a line.
        where: The file, sample id, field or option it was found at.
        fix: What to do about it.
    """

    def __init__(self, what: str, value: object = None, where: object = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.value = value
        self.where = where
        self.fix = fix

    def __reduce__(self) -> tuple[type[MMRoleError], tuple[object, ...]]:
        """Keep all four parts when the error crosses a process boundary."""
        return type(self), (self.what, self.value, self.where, self.fix)

    def __str__(self) -> str:
        parts = [
            ("problem", self.what),
            ("value", shown(self.value)),
            ("where", shown(self.where)),
            ("to do", self.fix),
        ]
        lines = [f"{name + ':':<9}{_indented(text)}" for name, text in parts if text]
        return "\n".join(lines)


class ProblemsError(MMRoleError):
    """All problems that were found before anything expensive starts, reported together.

    Args:
        problems: The single problems, in the order they were found; at least one.
    """

    def __init__(self, problems: Iterable[MMRoleError]) -> None:
        self.problems = list(problems)
        super().__init__(f"{len(self.problems)} problem(s) found")

    def __reduce__(self) -> tuple[type[MMRoleError], tuple[object, ...]]:
        return type(self), (self.problems,)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        total = len(self.problems)
        blocks = [f"[{number}/{total}]\n{problem}" for number, problem in enumerate(self.problems[:_MOST_PROBLEMS], 1)]
        more = [f"… and {total - _MOST_PROBLEMS:,} more problems"] if total > _MOST_PROBLEMS else []
        return "\n".join([f"{total} problems:", *blocks, *more])


def four_parts(errors: Iterable[MMRoleError | CheckpointError]) -> list[MMRoleError]:
    """Turn problems of a checkpoint's files into four-part errors; others stay as they are."""
    return [
        MMRoleError(error.what, error.value, error.where, error.fix) if isinstance(error, CheckpointError) else error
        for error in errors
    ]


def raise_problems(problems: Iterable[MMRoleError]) -> None:
    """Raise all problems at once; do nothing if there are none.

    Raises:
        ProblemsError: If there is at least one problem.
    """
    found = list(problems)
    if found:
        raise ProblemsError(found)


def run_main(main: Callable[[], int | None]) -> int:
    """Run an entry script's main; user errors are printed without a traceback.

    Args:
        main: The script's work; its return value is the exit status (None counts as 0).

    Returns:
        The exit status: main's own, 2 after a user error, 130 after Ctrl-C.
    """
    os.environ["MPLBACKEND"] = "agg"  # charts are files; a notebook hands down a backend that only it has
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold what it cannot show; stderr does so anyway
    try:
        return main() or 0
    except (MMRoleError, CheckpointError) as error:
        _print_error(f"error\n{four_parts([error])[0]}")
        return 2
    except KeyboardInterrupt:
        _print_error("interrupted; what was finished is kept, run the same command again to go on")
        return 130


def shown(value: object) -> str:
    """Return a value as short, printable text: control characters escaped, the middle of a long one left out.

    A list or tuple is shown whole, one item a line.
    """
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "\n".join(shown(item) for item in value)
    text = value if isinstance(value, str) else str(value)
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text) if text else "(empty)"
    if len(text) <= _MAX_VALUE:
        return text
    half = _MAX_VALUE // 2
    return f"{text[:half]} … ({len(text) - 2 * half} characters left out) … {text[-half:]}"


def first_of(names: Sequence[str], most: int = 10) -> list[str]:
    """Return the first of many names for a message, and how many more there are."""
    return [*names[:most], *([f"… and {len(names) - most:,} more"] if len(names) > most else [])]


def _indented(text: str) -> str:
    return text.replace("\n", "\n" + _INDENT)


def _print_error(text: str) -> None:
    encoding = sys.stderr.encoding or "utf-8"
    print(text.encode(encoding, errors="backslashreplace").decode(encoding), file=sys.stderr, flush=True)
