"""Where the files of MMRole are: splits, kinds, and every path below a data root or an evaluation folder."""

from __future__ import annotations

from itertools import count, takewhile
from pathlib import Path

from data_utils.errors import MMRoleError
from data_utils.paths import is_folder

SHORT_SPLITS = {"in": "in-distribution", "out": "out-of-distribution"}  # as folders of eval/ and the paper name them
SPLITS = tuple(SHORT_SPLITS.values())
KINDS = ("comment", "human-role", "inter-role")
# What the ids of a kind's dialogues hold: "<character>_<this>_<COCO or script>_<number>".
KIND_IN_ID = {"comment": "comment", "human-role": "human-role-dialogue", "inter-role": "role-role-dialogue"}
TRAIN_FILE = "data/train/train_85k.json"
RM_TRAIN_FILE = "RM_data/train/RM-train_23k.json"
RM_TEST_FILE = "RM_data/test/RM-test_320.json"
COCO = "COCO/"  # how the names of MS-COCO's images begin
PLAIN_IMAGE = "play/plain.png"  # made for characters without pictures, in any data root
RELEASED_JUDGE = "reward-model"  # its reviews and results have the published place


def file_name(name: str) -> str:
    """Return a character's or a script's name as files and folders are named after it."""
    return name.replace(" ", "_")


def profiles_folder(data_root: str | Path, split: str) -> Path:
    """Return the folder of `profiles.json` and `roles.json` of a split."""
    return Path(data_root) / "profiles" / split


def card_path(data_root: str | Path, split: str, name: str, suffix: str) -> Path:
    """Return the path of the card that a character was imported from, kept word for word."""
    return profiles_folder(data_root, split) / "cards" / f"{file_name(name)}{suffix}"


def annotations_path(data_root: str | Path) -> Path:
    """Return the path of the image annotations."""
    return Path(data_root) / "images" / "annotations.json"


def dialogues_folder(data_root: str | Path, split: str, kind: str) -> Path:
    """Return the folder of a kind's dialogue files; the published single file has the same name and `.json`."""
    return Path(data_root) / "dialogues" / split / kind


def play_path(data_root: str | Path, name: str) -> Path:
    """Return the path of the test input with the questions for a new character."""
    return Path(data_root) / "data" / "play" / f"{file_name(name)}.json"


def file_of_tests(kind: str) -> str:
    """Return the name of a kind's test file; its answers, reviews and (with .csv) results have the same name."""
    return f"{kind}_test.json"


def paths_of_tests(data_root: str | Path) -> list[Path]:
    """Return the paths of the six test files of a data root, whether they exist or not."""
    return [Path(data_root) / "data" / "test" / split / file_of_tests(kind) for split in SPLITS for kind in KINDS]


def answers_folder(eval_dir: Path, split: str, agent: str = "") -> Path:
    """Return the folder of an agent's answers.

    Args:
        eval_dir: The evaluation folder.
        split: `in` or `out`.
        agent: The agent's folder name; without it the folder of all agents.
    """
    return eval_dir / f"{split}-test_answers" / agent


def reviews_folder(eval_dir: Path, split: str, agent: str = "", *, judge: str = RELEASED_JUDGE) -> Path:
    """Return the folder of a judge's reviews of an agent; arguments as for `answers_folder`."""
    return judge_folder(eval_dir, judge) / f"{split}-test_reviews" / agent


def results_folder(eval_dir: Path, split: str, agent: str = "", *, judge: str = RELEASED_JUDGE) -> Path:
    """Return the folder of the CSV files made from a judge's reviews of an agent."""
    return judge_folder(eval_dir, judge) / f"{split}-test_results" / agent


def judge_folder(eval_dir: Path, judge: str = RELEASED_JUDGE) -> Path:
    """Return the folder of a judge's reviews and results; for the released judge the evaluation folder itself."""
    return eval_dir if judge == RELEASED_JUDGE else eval_dir / "judges" / judge


def journal_path(target: Path) -> Path:
    """Return where a result file's journal lies; not a `.json`, which the released scripts would take for a result."""
    return target.with_suffix(".journal")


def swapped_judge(judge: str) -> str:
    """Return the name for a judge's reviews with the two answers exchanged."""
    return f"{judge}-swapped"


def repeated_judge(judge: str, number: int) -> str:
    """Return the name for a judge's `number`th repetition of its reviews, from 2 on."""
    return f"{judge}-repeat-{number}"


def repeated_judges(eval_dir: Path, judge: str) -> list[str]:
    """Return the names of a judge's repeated reviews that exist, in order."""
    numbers = count(2)
    return list(
        takewhile(lambda name: is_folder(judge_folder(eval_dir, name)), (repeated_judge(judge, i) for i in numbers))
    )


def nested_agents(folder: Path) -> list[MMRoleError]:
    """Return a problem for each agent whose files lie a folder too deep, as a name with a slash would have them.

    Args:
        folder: That of all agents' answers or reviews.
    """
    try:
        files = sorted(folder.glob("*/*/*.json"))
    except OSError:  # reported by whoever lists the folder
        return []
    found = dict.fromkeys(path.parent for path in files if not path.name.startswith("."))
    nested = [path for path in found if not any(path.parent.glob("*.json"))]
    what = "files lie a folder too deep and are left out: an agent's name is that of one folder"
    return [
        MMRoleError(what, path, folder, f"move them to {folder / '-'.join(path.relative_to(folder).parts)}")
        for path in nested
    ]


def check_folder_name(name: str, flag: str) -> None:
    """Refuse an agent's or a judge's name that is not the name of one folder.

    Args:
        name: The name that the user gave.
        flag: Its flag, for the message.

    Raises:
        MMRoleError: It holds a slash, begins with a dot, or is empty.
    """
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise MMRoleError("this must be the name of one folder", name, flag, "choose a plain name, without slashes")
