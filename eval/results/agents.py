"""The reviewed agents under an evaluation folder, and the paper's number for each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_utils.errors import MMRoleError, raise_problems
from data_utils.paths import UnreadableError, is_folder, is_there, listed
from eval.results.reviews import FileResult, read_reviews

SPLITS = ("in", "out")
KINDS = ("comment", "human-role", "inter-role")
FILES = tuple((split, kind) for split in SPLITS for kind in KINDS)
PUBLISHED_ROWS = {"in": 72, "out": 26}  # per file
IN_WEIGHT, OUT_WEIGHT = 0.75, 0.25

DISPLAY_NAMES = {
    "gpt-4-turbo": "GPT-4 Turbo",
    "gemini-pro-vision": "Gemini Pro Vision",
    "claude-3-opus": "Claude 3 Opus",
    "qwen-vl-max": "QWen-VL-Max",
    "llava-next-yi-34b": "LLaVA-NeXT-34B",
    "yi-vl-34b": "Yi-VL-34B",
    "internvl-chat-v1-5": "InternVL-Chat-V1.5",
    "qwen-vl-chat": "QWen-VL-Chat",
    "llava-next-mistral-7b": "LLaVA-NeXT-Mistral-7B",
    "yi-vl-6b": "Yi-VL-6B",
    "mmrole-agent": "MMRole-Agent",
}


@dataclass
class AgentResult:
    """All that is known of one agent.

    Attributes:
        folder: Its folder's name under `{in,out}-test_reviews`.
        files: What each of its six files holds; a missing or unreadable one is not there.
        unreadable: Which of them are there, but could not be read.
        problems: What kept files from being read or written.
    """

    folder: str
    files: dict[tuple[str, str], FileResult] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    problems: list[MMRoleError] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The paper's name for a known folder, else the folder's with what cannot be printed escaped."""
        plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in self.folder)
        return DISPLAY_NAMES.get(self.folder, plain)

    @property
    def complete(self) -> bool:
        """Whether all six files could be read and no answer in them still waits for its review."""
        return len(self.files) == len(FILES) and not any(result.not_reviewed for result in self.files.values())

    @property
    def status(self) -> str:
        """`complete`, or what is missing for the paper's number, and whether the rows are the published ones."""
        missing = [f"{split}-test/{kind}" for split, kind in FILES if (split, kind) not in self.files]
        waiting = sum(len(result.not_reviewed) for result in self.files.values())
        notes = [f"no readable {', '.join(missing)}"] if missing else []
        notes += [f"answers not reviewed: {waiting}"] if waiting else []
        status = f"incomplete: {'; '.join(notes)}" if notes else "complete"
        rows = sum(result.rows for result in self.files.values())
        published = sum(PUBLISHED_ROWS[split] for split, _ in self.files)
        return status if rows == published else f"{status}; {rows} rows where the published files have {published}"

    def results(self, split: str | None = None) -> list[FileResult]:
        """The files of one split, or of both, in a fixed order."""
        return [self.files[key] for key in FILES if key in self.files and split in (None, key[0])]

    def ratios(self, split: str | None = None) -> np.ndarray:
        """(reviewed rows, 8) of one split, or of both."""
        return np.concatenate([np.empty((0, 8)), *(result.ratios for result in self.results(split))])

    def paper_scores(self, split: str | None = None) -> np.ndarray:
        """The paper's number: (9,), the eight metrics and Overall; nan where anything is missing for it.

        Per split the plain mean of its three files' means; then 0.75 In + 0.25 Out; Overall is the mean of the eight.
        """
        if split is None:
            # published: the caption speaks of the samples' mean, but the table weighs the two test sets 3 : 1.
            metrics = IN_WEIGHT * self._split_means("in") + OUT_WEIGHT * self._split_means("out")
        else:
            metrics = self._split_means(split)
        return np.append(metrics, metrics.mean())

    def _split_means(self, split: str) -> np.ndarray:
        results = self.results(split)
        if len(results) < len(KINDS) or any(result.not_reviewed for result in results):
            return np.full(8, math.nan)
        return sum(result.means for result in results) / len(KINDS)


def reviews_folder(eval_dir: Path, split: str) -> Path:
    """Where the agents' folders of reviews of one split are."""
    return eval_dir / f"{split}-test_reviews"


def results_folder(eval_dir: Path, split: str) -> Path:
    """Where the agents' folders of CSVs of one split go."""
    return eval_dir / f"{split}-test_results"


def reviews_path(eval_dir: Path, split: str, folder: str, kind: str) -> Path:
    """Where one file of an agent's reviews is."""
    return reviews_folder(eval_dir, split) / folder / f"{kind}_test.json"


def csv_path(eval_dir: Path, split: str, folder: str, kind: str) -> Path:
    """Where its CSV goes."""
    return results_folder(eval_dir, split) / folder / f"{kind}_test.csv"


def unexplained_csvs(eval_dir: Path) -> list[Path]:
    """CSVs of any agent whose reviews are not there (any more), in order."""
    return [
        path
        for split, kind in FILES
        for path in sorted(results_folder(eval_dir, split).glob(f"[!.]*/{kind}_test.csv"))
        if _has_no_reviews(eval_dir, split, path.parent.name, kind)
    ]


def _has_no_reviews(eval_dir: Path, split: str, folder: str, kind: str) -> bool:
    try:
        return not is_there(reviews_path(eval_dir, split, folder, kind))
    except UnreadableError:
        return False  # who knows


def read_agents(eval_dir: Path) -> list[AgentResult]:
    """Reads the reviews of all agents; what cannot be read is kept as the agent's problem.

    Args:
        eval_dir: Holds `{in,out}-test_reviews/<agent>/{comment,human-role,inter-role}_test.json`.

    Returns:
        The agents that have at least one such file, readable or not, by folder name.

    Raises:
        MMRoleError: If there is none.
    """
    folders: set[str] = set()
    closed: list[MMRoleError] = []
    for split in SPLITS:
        try:
            folders |= {folder.name for folder in listed(reviews_folder(eval_dir, split)) if is_folder(folder)}
        except UnreadableError as error:
            closed += [error] if str(error) not in map(str, closed) else []
    agents = [_read_agent(eval_dir, folder, closed) for folder in sorted(folders)]
    agents = [agent for agent in agents if agent.files or agent.unreadable]
    if not agents:
        raise_problems(closed)
        raise MMRoleError(
            "no reviews here: no folder in-test_reviews/<agent> or out-test_reviews/<agent> has a file of reviews",
            eval_dir,
            "--eval_dir",
            "run `bash eval/RM_review.sh` first, or give the folder that holds in-test_reviews and out-test_reviews",
        )
    return agents


def _read_agent(eval_dir: Path, folder: str, closed: list[MMRoleError]) -> AgentResult:
    agent = AgentResult(folder, problems=list(closed))
    for split, kind in FILES:
        path = reviews_path(eval_dir, split, folder, kind)
        try:
            if not is_there(path):
                continue
            agent.files[split, kind] = read_reviews(path)
        except MMRoleError as error:
            if str(error) not in map(str, agent.problems):  # a closed folder is told once
                agent.problems.append(error)
            agent.unreadable.append((split, kind))
    return agent


def ranked(agents: list[AgentResult]) -> list[AgentResult]:
    """Best first: by the paper's Overall, then those without one by the plain mean of all their ratios."""

    def key(agent: AgentResult) -> tuple[bool, float, str]:
        overall, ratios = agent.paper_scores()[-1], agent.ratios()
        has_none = math.isnan(overall)
        if has_none:
            overall = np.nanmean(ratios) if not np.isnan(ratios).all() else -math.inf
        return has_none, -overall, agent.folder

    return sorted(agents, key=key)
