"""The report as one HTML file that needs no network: tables, figures, and a browser of single rows.

Answers and reviews are untrusted text. They are embedded as compressed data that a script puts into text nodes only,
the template escapes its values, and the page's content policy allows no other script and no loading.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import platform
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from data_utils.errors import MMRoleError
from data_utils.images import find_image
from eval.judging.metrics import METRICS
from eval.results.figures import drawings
from eval.results.report import Report
from eval.results.reviews import Record, ReviewFile, text_of
from eval.results.tables import Strong, tables

PAGE = Path(__file__).parent / "page"
THUMBNAIL = 256  # pixels, the longer side
_QUALITY = 60


def report_html(report: Report, settings: Mapping[str, object], image_dir: Path | None = None) -> bytes:
    """Make the page.

    Args:
        report: All numbers.
        settings: Facts about the run, shown at the top.
        image_dir: The image folder; pictures that are not in it are left out.

    Returns:
        The file, in UTF-8.
    """
    script = (PAGE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["strong"] = lambda cell: isinstance(cell, Strong)
    content = browser_content(report, image_dir)
    page = environment.from_string((PAGE / "report.html").read_text(encoding="utf-8")).render(
        digest=digest,
        style=(PAGE / "report.css").read_text(encoding="utf-8"),
        script=script,
        data=_packed(content),
        agents=report.agents,
        settings={**settings, **_versions()},
        rows=sum(one.counts[None]["reviewed"] for one in report.agents),
        tables=tables(report),
        drawings=drawings(report),
        pictures=sum(picture is not None for picture in content["pictures"].values()),
        named_pictures=len(content["pictures"]),
    )
    return page.encode("utf-8", errors="backslashreplace")  # paths need not be UTF-8


def browser_content(report: Report, image_dir: Path | None) -> dict[str, Any]:
    """Return the data of the row browser: rows, and for each agent its answers and reviews in the rows' order."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    found: dict[tuple[str, tuple[str, str, str]], list[Any]] = {}
    for one in report.agents:
        for file in one.agent.files.values():
            for number, raw in enumerate(file.rows):
                records = file.records[number * len(METRICS) : (number + 1) * len(METRICS)]
                key = (records[0].split, records[0].kind, records[0].row)
                rows.setdefault(key, _row(raw, records[0]))
                found[one.agent.folder, key] = [text_of(raw, 1, "answer"), _reviews(file, number, records)]
    names = dict.fromkeys(row["picture"] for row in rows.values())
    return {
        "metrics": [metric.name for metric in METRICS],
        "agents": [{"folder": one.agent.folder, "name": one.agent.name} for one in report.agents],
        "rows": list(rows.values()),
        "answers": [[found.get((one.agent.folder, key)) for key in rows] for one in report.agents],
        "pictures": {name: thumbnail(image_dir, name) for name in names},
    }


def _row(raw: Mapping[str, Any], record: Record) -> dict[str, Any]:
    about = {name: getattr(record, name) for name in ("split", "kind", "character", "script", "category", "language")}
    texts = {"prompt": text_of(raw, 0, "value"), "reference": text_of(raw, 1, "value")}
    return {"id": record.row, "picture": record.picture, **about, **texts}


def _reviews(file: ReviewFile, number: int, records: list[Record]) -> list[list[Any]]:
    """Return for each metric the scores of answer and reference (null without), the review, and notes."""
    stored = file.rows[number].get("rm_review")
    reviews = []
    for record in records:
        review = stored.get(record.metric) if isinstance(stored, Mapping) else None
        text = review.get("review") if isinstance(review, Mapping) else None
        notes = [record.reason] if record.reason else []
        notes += ["read by the forgiving reader"] if record.reader == "forgiving" else []
        notes += [f"{record.attempts} attempts"] if record.attempts != 1 else []
        scores = [None if score != score else score for score in (record.a, record.b)]
        reviews.append([*scores, str(text or ""), "; ".join(notes)])
    return reviews


def thumbnail(image_dir: Path | None, name: str) -> str | None:
    """Return a small copy of a picture as a data URL, or None if it is missing or unreadable."""
    if image_dir is None:
        return None
    try:
        path = find_image(image_dir, name)
        if path is None:
            return None
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            file = io.BytesIO()
            small.save(file, "WEBP", quality=_QUALITY, method=3)
    except (
        MMRoleError,
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
    ):
        return None  # the report is about the texts; scripts/check_data.sh finds such pictures
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _packed(content: dict[str, Any]) -> str:
    plain = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
    return base64.b64encode(gzip.compress(plain, 6, mtime=0)).decode("ascii")


def _versions() -> dict[str, str]:
    packages = []
    for name in ("mmrole", "numpy", "scipy", "matplotlib"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {"report made with": ", ".join([f"Python {platform.python_version()}", *packages])}
