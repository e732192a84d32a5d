"""How answers and reviews were made, by the journals beside the files, where there are any."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from data_utils.errors import MMRoleError
from data_utils.journal import read_journal
from data_utils.layout import answers_folder, file_of_tests, journal_path
from eval.results.reviews import Agent


@dataclass
class Origin:
    """How an agent's answers, or a judge's reviews of them, were made, by their journals.

    Attributes:
        agent: The agent's folder.
        made: "answers" or "reviews".
        settings: The values of each setting and version, over all files.
        refused: How many texts the model refused to write.
        cut: How many texts end at the limit of their length.
    """

    agent: str
    made: str
    settings: dict[str, set[str]] = field(default_factory=dict)
    refused: int = 0
    cut: int = 0

    def add(self, path: Path) -> None:
        """Add the facts of a result file's journal; a missing or unreadable one adds nothing."""
        with suppress(MMRoleError):
            content = read_journal(journal_path(path))
            if content is None:
                return
            shown = {**content.settings, **content.info.get("names", {}), **content.info.get("versions", {})}
            for name, value in shown.items():
                self.settings.setdefault(name, set()).add(str(value))
            self.refused += sum("refusal" in entry for entry in content.entries.values())
            self.cut += sum("cut" in entry for entry in content.entries.values())


def origins(eval_dir: Path, agents: Iterable[Agent]) -> list[Origin]:
    """Return how the answers and reviews of some agents were made; nothing for files without a journal."""
    found = []
    for agent in agents:
        answers, reviews = Origin(agent.folder, "answers"), Origin(agent.folder, "reviews")
        for (split, kind), file in agent.files.items():
            answers.add(answers_folder(eval_dir, split, agent.folder) / file_of_tests(kind))
            reviews.add(file.path)
        found += [origin for origin in (answers, reviews) if origin.settings]
    return found
