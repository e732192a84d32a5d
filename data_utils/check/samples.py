"""Checks test, training and reward-model files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_utils.check.checker import Checker
from data_utils.errors import MMRoleError
from data_utils.files import Row
from data_utils.layout import KINDS, SPLITS, file_of_tests
from data_utils.lengths import LengthCounter
from data_utils.paths import is_folder
from data_utils.prompts import picture_line
from data_utils.roots import dialogue_id
from data_utils.samples import build_sample
from data_utils.schema import Named, RewardSample, TestSample, TrainSample, validate_row
from qwen_vl.special_tokens import IMAGE_SPAN

if TYPE_CHECKING:
    from qwen_vl import QwenVLTokenizer

_PICTURE_LINE = re.compile(r"Picture 1: <img>images/([^<>\n]*)</img>\n")
_TAG = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_COMPARED = ("id", "system", "image", "role", "script", "other_role")


class LengthMeter:
    """Measures training samples as the trainer tokenizes them, and reports those that are cut off.

    Args:
        tokenizer: The checkpoint's.
        max_length: Tokens the trainer keeps of a sample.
    """

    def __init__(self, tokenizer: QwenVLTokenizer, max_length: int) -> None:
        from data_utils.supervised import preprocess  # torch, which the other checks do without

        self._tokenizer, self._preprocess, self.max_length = tokenizer, preprocess, max_length
        self._counter = LengthCounter(tokenizer)
        self.longest: dict[str, int] = {}
        frame = [{"from": "user", "value": picture_line("x") + "T"}, {"from": "assistant", "value": "A"}]
        self._frame = self._whole(frame) - self._counter.count("T") - self._counter.count("A")

    def measure(self, checker: Checker, file: str, row: Row) -> None:
        """Measure a sample without broken image tags."""
        turns = row["conversations"]
        total = self._length(turns)
        self.longest[file] = max(self.longest.get(file, 0), total)
        over = total - self.max_length
        if over <= 0:
            return
        answer = len(self._tokenizer.encode(turns[-1]["value"])) if turns[-1]["from"] == "assistant" else 0
        lost = over - 2  # the end token and the newline after the answer are cut first
        kind = "cut_end" if lost <= 0 or not answer else "lost_answer" if lost >= answer else "cut_answer"
        checker.report.add(kind, file, row["id"], f"{total:,} tokens, {min(max(lost, 0), answer)} of {answer} lost")

    def _length(self, turns: list[Row]) -> int:
        """Return the number of tokens of a sample; repeated lines are tokenized once where that is exact."""
        line = _PICTURE_LINE.match(turns[0]["value"])
        if len(turns) == 2 and turns[0]["from"] == "user" and line:
            prompt, answer = turns[0]["value"][line.end() :], turns[1]["value"]
            if "<" not in prompt + answer and not prompt[:1].isspace():
                return self._frame + self._counter.count(prompt) + self._counter.count(answer)
        return self._whole(turns)

    def _whole(self, turns: list[Row]) -> int:
        return len(self._preprocess(turns, self._tokenizer, max_length=2**62)[0])


def check_tests(checker: Checker) -> None:
    """Check the test files, and record the dialogues that they were drawn from."""
    root, report = checker.root, checker.report
    folders = [root / "data" / "test" / split for split in SPLITS]
    if not any(map(is_folder, folders)):
        report.absent.append("data/test")
        return
    for folder in folders:  # if there is one, all six files must be
        for path in sorted({*checker.files(checker.name(folder)), *(folder / file_of_tests(kind) for kind in KINDS)}):
            for row in checker.rows(path, TestSample, "test sample"):
                _check_test(checker, checker.name(path), row)


def check_rebuilt(checker: Checker, dialogue: Row) -> None:
    """Compare the test samples of a dialogue with what is built from it, by either rule for the partner."""
    for file, sample in checker.test_samples.get(dialogue["id"], []):
        turn = sample["id"].rpartition("_")[2]
        try:
            built = [build_sample(dialogue, int(turn), checker.characters, sane_partner=sane) for sane in (False, True)]
        except (MMRoleError, ValueError) as error:
            checker.report.add("test_differs", file, sample["id"], f"it cannot be built: {str(error)[:80]}")
            continue
        differences = [_difference(sample, one) for one in built]
        if all(differences):
            checker.report.add("test_differs", file, sample["id"], differences[0])
        else:
            checker.report.checked["test samples as built from their dialogue"] += 1


def check_training(checker: Checker, meter: LengthMeter | None) -> None:
    """Check the agent's training files."""
    report = checker.report
    for path in _files(checker, "data/train"):
        file = checker.name(path)
        # Two files may be built from the same dialogues, one with those of further roots.
        for row in checker.rows(path, TrainSample, f"training sample of {path}"):
            report.checked["training samples"] += 1
            if dialogue_id(row["id"]) in checker.tested:
                report.add("test_in_train", file, row["id"])
            _check_conversation(checker, file, row, meter)


def check_reward_model(checker: Checker, meter: LengthMeter | None) -> None:
    """Check the reward model's training and validation files."""
    report = checker.report
    trained: set[str] = set()
    for part, what in (("train", "reward-model samples"), ("test", "reward-model validation samples")):
        for path in _files(checker, f"RM_data/{part}"):
            file = checker.name(path)
            for row in checker.rows(path, RewardSample, f"review of {path}"):
                report.checked[what] += 1
                if part == "train":
                    trained.add(row["id"])
                elif row["id"] in trained:
                    report.add("review_in_both", file, row["id"])
                _check_conversation(checker, file, row, meter)


def _files(checker: Checker, folder: str) -> list[Path]:
    files = checker.files(folder)
    if not files:
        checker.report.absent.append(folder)
    return files


def _check_test(checker: Checker, file: str, row: Row) -> None:
    checker.report.checked["test samples"] += 1
    for problem in validate_row(row, Named, 0, file):
        checker.report.add("wrong_field", file, row["id"], problem.what)
    checker.tested.add(dialogue_id(row["id"]))
    checker.test_samples.setdefault(dialogue_id(row["id"]), []).append((file, row))
    checker.images.setdefault(row["image"], (file, row["id"]))
    characters = checker.characters
    if row["role"] not in characters.scripts:
        checker.report.add("unknown_speaker", file, row["id"], row["role"])
    elif characters.scripts[row["role"]] != row["script"]:
        detail = f"script: {row['script']}, roles.json says {characters.scripts[row['role']]}"
        checker.report.add("wrong_field", file, row["id"], detail)
    for turn in row["conversations"]:
        checker.check_special(file, row["id"], turn["value"])


def _difference(sample: Row, built: Row) -> str:
    names = [name for name in _COMPARED if sample[name] != built[name]]
    for number, side in enumerate(("prompt", "ground truth")):
        if sample["conversations"][number]["value"] != built["conversations"][number]["value"]:
            names.append(side)
    return f"another {', '.join(names)}" if names else ""


def _check_conversation(checker: Checker, file: str, row: Row, meter: LengthMeter | None) -> None:
    turns = row["conversations"]
    senders = [turn["from"] for turn in turns]
    expected = senders[1:] if senders[0] == "assistant" else senders  # published: the trainer drops a leading answer
    if not expected or expected != ["user", "assistant"] * (len(expected) // 2):
        checker.report.add("wrong_turns", file, row["id"], ", ".join(senders))
    sound, first = True, int(senders[0] == "assistant")
    for number, turn in enumerate(turns):
        text = turn["value"]
        line = _PICTURE_LINE.match(text) if number == first and turn["from"] == "user" else None
        if line:
            _refer(checker, file, row, line[1])
            text = text[line.end() :]
        elif number == first and row.get("image") and turn["from"] == "user":
            checker.report.add("broken_image_tag", file, row["id"], f"no picture line for {row['image']}")
        sound &= not _tag_faults(checker, file, row["id"], text)
        checker.check_special(file, f"{row['id']}, turn {number}", _TAG.sub("", text))
    if meter is not None and sound:
        meter.measure(checker, file, row)


def _refer(checker: Checker, file: str, row: Row, image: str) -> None:
    """Check that the picture line's image is the row's, and record it."""
    if row.get("image") not in (None, image):
        checker.report.add("broken_image_tag", file, row["id"], f"picture {image}, image {row['image']}")
    if len(f"images/{image}".encode()) > IMAGE_SPAN:
        checker.report.add("broken_image_tag", file, row["id"], f"a path of over {IMAGE_SPAN} bytes")
    checker.images.setdefault(image, (file, row["id"]))


def _tag_faults(checker: Checker, file: str, name: str, text: str) -> int:
    """Report image tags in a text; return how many of them cannot be tokenized."""
    paths = _TAG.findall(text)
    for path in paths:
        checker.report.add("other_image_tag", file, name, path)
        if path.startswith("images/"):
            checker.images.setdefault(path.removeprefix("images/"), (file, name))
    faults = [f"a path of over {IMAGE_SPAN} bytes" for path in paths if len(path.encode()) > IMAGE_SPAN]
    faults += list(_unclosed(_TAG.sub("", text)))
    for fault in faults:
        checker.report.add("broken_image_tag", file, name, fault)
    return len(faults)


def _unclosed(rest: str) -> Iterator[str]:
    for tag, count in Counter(re.findall(r"</?img>", rest)).items():
        yield f"{count} {tag} without its other half"
