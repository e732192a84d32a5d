"""The prompt templates, all checked before the first request."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from string import Template

from data_utils.errors import MMRoleError, raise_problems
from data_utils.grow.validation import text_problem
from data_utils.layout import KINDS

_SEPARATOR = re.compile(r"^---$", re.MULTILINE)
_OF_PROFILES = ("character", "script", "language")
_OF_DIALOGUES = (
    *_OF_PROFILES, "profile", "partner", "partner_profile", "image_information", "question", "turns",
)  # fmt: skip
PROMPTS = Path(__file__).parent / "prompts"
VALUES = {
    "profile_from_text": (*_OF_PROFILES, "text", "facts"),
    "profile_from_facts": (*_OF_PROFILES, "text", "facts"),
    "profile_summary": (*_OF_PROFILES, "detailed"),
    **dict.fromkeys(KINDS, _OF_DIALOGUES),
}


class Templates:
    """The prompt templates of a folder: system message and text, separated by a line of three hyphens.

    Raises:
        ProblemsError: Files are missing, have a wrong form, or name unknown values; every problem is reported.
    """

    NAMES = tuple(VALUES)
    QUESTIONS = ("questions_English", "questions_Chinese")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._problems: list[MMRoleError] = []
        texts = {name: self._read(name) for name in (*self.NAMES, *self.QUESTIONS)}
        raise_problems(self._problems)
        self.hash = hashlib.sha256(repr(texts).encode()).hexdigest()[:16]
        self.questions = {name.partition("_")[2]: self._questions(name, texts[name]) for name in self.QUESTIONS}
        self._parts = {name: self._split(name, texts[name]) for name in self.NAMES}
        raise_problems(self._problems)

    def fill(self, name: str, values: dict[str, str]) -> tuple[str, str]:
        """Return system message and text of a template, with the values filled in."""
        system, text = self._parts[name]
        return Template(system).substitute(values), Template(text).substitute(values)

    def _read(self, name: str) -> str:
        path = self._path(name)
        try:
            return path.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            self._problem("a template cannot be read", str(error), name, "copy it from data_utils/grow/prompts")
            return ""

    def _questions(self, name: str, text: str) -> list[str]:
        """Return the questions, one per line, and report those that would make every dialogue unusable."""
        questions = [line.strip() for line in text.split("\n") if line.strip()]
        if not questions:
            self._problem("there are no questions", None, name, "write one per line")
        for question in questions:
            problem = text_problem(question)
            if problem:
                self._problem(f"a question cannot be used: {problem}", question, name, "reword it")
        return questions

    def _split(self, name: str, text: str) -> tuple[str, str]:
        parts = _SEPARATOR.split(text, maxsplit=1)
        if len(parts) == 1:
            self._problem("a template has no line ---", None, name, "put one before the text")
            return "", ""
        system, text = parts[0].removesuffix("\n"), parts[1].removeprefix("\n")
        for part, where in ((system, "before"), (text, "after")):
            if not part.strip():
                self._problem(f"a template has nothing {where} its line ---", None, name, f"write something {where} it")
        values = dict.fromkeys(VALUES[name], "")
        try:
            Template(system).substitute(values)
            Template(text).substitute(values)
        except (KeyError, ValueError) as error:
            fix = f"use these: {', '.join('$' + value for value in sorted(values))}; write a dollar sign as $$"
            self._problem("a template cannot be filled", str(error), name, fix)
        return system, text

    def _problem(self, what: str, value: str | None, name: str, fix: str) -> None:
        self._problems.append(MMRoleError(what, value, self._path(name), fix))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.txt"
