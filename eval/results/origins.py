"""How answers and reviews were made: what the journals beside the files say, where there are any."""

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
    """What journals say of an agent's answers, or of a judge's reviews of them.

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
        """Take in the journal of a result file; one that does not exist or cannot be read says nothing."""
        with suppress(MMRoleError):
            content = read_journal(journal_path(path))
            if content is None:
                return
            names = content.info.get("names")
            shown = {**content.settings, **(names if isinstance(names, dict) else {})}
            versions = content.info.get("versions")
            shown |= versions if isinstance(versions, dict) else {}
            for name, value in shown.items():
                self.settings.setdefault(str(name), set()).add(str(value))
            entries = [entry for entry in content.entries.values() if isinstance(entry, dict)]
            self.refused += sum("refusal" in entry for entry in entries)
            self.cut += sum(entry.get("cut") is True for entry in entries)


def origins(eval_dir: Path, agents: Iterable[Agent]) -> list[Origin]:
    """Return what is known of the answers and reviews of some agents; nothing about files without a journal."""
    found = []
    for agent in agents:
        answers, reviews = Origin(agent.folder, "answers"), Origin(agent.folder, "reviews")
        for (split, kind), file in agent.files.items():
            answers.add(answers_folder(eval_dir, split, agent.folder) / file_of_tests(kind))
            reviews.add(file.path)
        found += [origin for origin in (answers, reviews) if origin.settings]
    return found
