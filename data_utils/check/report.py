"""The findings that a check can report, how severe each is, and the report as text and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_utils.errors import shown
from data_utils.images import FORMS

ERROR, MISSING, WARNING, NOTE = SEVERITIES = ("error", "missing", "warning", "note")
_EXIT_STATUS = {ERROR: 1, MISSING: 3}
_MOST_SHOWN = 160  # characters of an example's value


@dataclass(frozen=True)
class Kind:
    """A kind of finding: its severity, what is counted, and what to do about it."""

    severity: str
    title: str
    fix: str


_TRAIN_FIX = "build the file again with python -m data_utils.build"
KINDS: dict[str, Kind] = {
    # What stops training or evaluation, or makes their results wrong.
    "unreadable_file": Kind(ERROR, "files that are missing or broken", "correct the file, or download it again"),
    "wrong_field": Kind(ERROR, "fields that are missing or wrong", "correct the field, or download the file again"),
    "duplicate_id": Kind(ERROR, "ids that occur more than once", "give each a different id"),
    "unknown_speaker": Kind(ERROR, "speakers that no roles.json lists", "list the character under its script"),
    "missing_profile": Kind(ERROR, "characters without a profile", "add the profile to profiles.json"),
    "broken_alternation": Kind(ERROR, "dialogues in which someone speaks twice in a row", "merge or split the turns"),
    "missing_image": Kind(ERROR, "images that are missing", "put them below images/, or correct the name"),
    "broken_image": Kind(ERROR, "images that cannot be decoded", "download or make the file again"),
    "clashing_image": Kind(
        ERROR,
        "images that share their name with a different picture of another data root",
        "rename one of them, also in annotations, dialogues and samples, or rename its script",
    ),
    "wrong_turns": Kind(ERROR, "samples whose turns are not user and assistant in turn", _TRAIN_FIX),
    "broken_image_tag": Kind(ERROR, "samples with a broken image tag", _TRAIN_FIX),
    "test_in_train": Kind(ERROR, "training samples of a dialogue that a test sample was drawn from", _TRAIN_FIX),
    "test_differs": Kind(ERROR, "test samples that differ from their dialogue", "download the test file again"),
    "review_in_both": Kind(ERROR, "reviews that both train and validate the reward model", _TRAIN_FIX),
    # Files to be downloaded.
    "missing_coco": Kind(MISSING, "MS-COCO images that are missing", "download them: bash scripts/download_data.sh"),
    # The published data has these too; they do little or no harm.
    "image_outside": Kind(
        WARNING,
        "images outside of the image folder, behind a link",
        "give --follow_links when answering and reviewing if that link is yours; training follows it",
    ),
    **{
        form: Kind(
            WARNING, f"images with {what}", "none needed: as published; data_utils.characters stores a plain copy"
        )
        for form, what in FORMS.items()
    },
    "lost_answer": Kind(WARNING, "samples whose whole answer is cut off", "raise --max_length"),
    "cut_answer": Kind(WARNING, "samples whose answer is partly cut off", "raise --max_length"),
    "cut_end": Kind(NOTE, "samples whose end token after the answer is cut off", "raise --max_length"),
    "other_image_tag": Kind(WARNING, "samples with image tags besides their picture line", "reword the text"),
    "special_token": Kind(WARNING, "texts with a special token, which training interprets", "reword the text"),
    "empty_dialogue": Kind(WARNING, "dialogues without turns", "none needed: they give no samples"),
    "no_answer": Kind(WARNING, "comments without an answer", "none needed: they give no samples"),
    "ends_on_human": Kind(
        WARNING, "human-role dialogues that end with the human's turn", "none needed: that turn trains nothing"
    ),
    "odd_inter_role": Kind(
        WARNING,
        "inter-role dialogues of odd length, whose last turn has the speaker as its own partner",
        "as published; python -m data_utils.build --sane_partner avoids it",
    ),
    "misnamed_image": Kind(WARNING, "annotations whose image name differs in case", "correct the name"),
    "unknown_image": Kind(ERROR, "annotations whose image is missing", "correct the name, or add the image"),
    "scene_blanks": Kind(WARNING, "annotations with leading or trailing blanks", "none needed: prompts strip scenes"),
    "turn_blanks": Kind(WARNING, "turns with leading or trailing blanks", "none needed: used verbatim, as published"),
    "empty_turn": Kind(WARNING, "turns without text", "remove the dialogue, or write the turn"),
    "template_leftover": Kind(WARNING, "texts with an unfilled template field", "reword the text"),
    "test_image_trains": Kind(
        WARNING,
        "script images of in-distribution tests that also appear in training dialogues",
        "none needed: as published",
    ),
    "unlisted_profile": Kind(NOTE, "profiles of characters that no roles.json lists", "list them under their script"),
    "unused_image": Kind(NOTE, "unreferenced images", "none needed"),
    "duplicate_answer": Kind(NOTE, "identical answers in several dialogues", "none needed"),
}


@dataclass
class Finding:
    """All findings of one kind: how many, in which files, and the first examples.

    `remark` adds to the count.
    """

    count: int = 0
    files: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)
    remark: str = ""


class Report:
    """What was checked and what was found.

    Args:
        examples: How many examples of each kind to keep.
    """

    def __init__(self, examples: int = 5) -> None:
        self._most = examples
        self.findings: dict[str, Finding] = {}
        self.checked: Counter[str] = Counter()
        self.absent: list[str] = []
        self.remarks: list[str] = []

    def add(self, kind: str, file: object, name: object = "", detail: object = "", count: int = 1) -> None:
        """Count a finding.

        Args:
            kind: A key of `KINDS`.
            file: The file it was found in.
            name: The id, image or character, and the field.
            detail: The offending value, or what is wrong with it.
            count: How many it counts for.
        """
        assert kind in KINDS, kind
        found = self.findings.setdefault(kind, Finding())
        found.count += count
        found.files[str(file)] += count
        if len(found.examples) < self._most:
            text = shown(detail if isinstance(detail, str) else repr(detail)) if detail != "" else ""
            if len(text) > _MOST_SHOWN:
                text = f"{text[:_MOST_SHOWN]} …"
            found.examples.append({"file": str(file), "name": str(name), "detail": text})

    def remark(self, kind: str, text: str) -> None:
        """Add a remark to a kind of finding, if there is any."""
        if kind in self.findings:
            self.findings[kind].remark = text

    def count(self, kind: str) -> int:
        """Return the number of findings of a kind."""
        return self.findings[kind].count if kind in self.findings else 0

    def counts(self) -> dict[str, int]:
        """Return the number of findings of each kind, the worst first."""
        return {kind: self.findings[kind].count for kind in KINDS if kind in self.findings}

    def exit_status(self) -> int:
        """Return 1 if there are errors, 3 if only images have to be downloaded, else 0."""
        found = {KINDS[kind].severity for kind in self.findings}
        return next((status for severity, status in _EXIT_STATUS.items() if severity in found), 0)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "exit_status": self.exit_status(),
            "checked": dict(self.checked),
            "absent": self.absent,
            "remarks": self.remarks,
            "findings": [
                {
                    "kind": kind, "severity": KINDS[kind].severity, "title": KINDS[kind].title, "count": count,
                    "remark": self.findings[kind].remark, "fix": KINDS[kind].fix,
                    "files": dict(self.findings[kind].files), "examples": self.findings[kind].examples,
                }
                for kind, count in self.counts().items()
            ],
        }  # fmt: skip

    def as_text(self) -> str:
        """Return the report as text: the worst first, each kind with its examples."""
        lines = ["checked: " + (", ".join(f"{n:,} {what}" for what, n in self.checked.items()) or "nothing")]
        if self.absent:
            lines.append("not here: " + ", ".join(self.absent))
        lines += self.remarks
        for severity in SEVERITIES:
            of_it = [kind for kind in self.counts() if KINDS[kind].severity == severity]
            for kind in of_it:
                lines += ["", *self._of_kind(kind)]
        total = Counter(dict.fromkeys(SEVERITIES, 0))
        for kind, count in self.counts().items():
            total[KINDS[kind].severity] += count
        return "\n".join([*lines, "", _total(total.items())])

    def _of_kind(self, kind: str) -> list[str]:
        found, form = self.findings[kind], KINDS[kind]
        remark = f" ({found.remark})" if found.remark else ""
        lines = [f"{form.severity}: {found.count:,} {form.title}{remark} [{kind}]"]
        for example in found.examples:
            parts = [example["file"], example["name"], example["detail"].replace("\n", " ")]
            lines.append("    " + ": ".join(filter(None, parts)))
        if found.count > len(found.examples):
            more = found.count - len(found.examples)
            and_more = "… and {:,} more" if found.examples else "{:,}"
            lines.append(f"    {and_more.format(more)} in {len(found.files):,} file(s)")
        return [*lines, f"    to do: {form.fix}"]


def _total(counts: Iterable[tuple[str, int]]) -> str:
    found = [f"{count:,} {severity}{'' if severity == MISSING or count == 1 else 's'}" for severity, count in counts]
    return "in all: " + ", ".join(found)
