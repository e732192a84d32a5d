"""Files of a checkpoint folder: JSON that says where it is broken, and code files that are carried but never run."""

import json
import shutil
from pathlib import Path
from typing import Any


def read_json_file(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        ValueError: It is not JSON, or not an object; names the file and the place.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a JSON file: {path} ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a JSON {type(content).__name__} where an object is expected. Download it again."
        )
    return content


def code_files(folder: str | Path) -> list[Path]:
    """The `.py` files of a checkpoint folder: remote code, which nothing here runs."""
    path = Path(folder)
    return sorted(path.glob("*.py")) if str(folder) and path.is_dir() else []


def copy_code_files(source: str | Path, target: str | Path) -> list[Path]:
    """Carries the released code files along with a saved checkpoint, for those who still use them; runs nothing."""
    copied = []
    for file in code_files(source):
        destination = Path(target) / file.name
        if destination.resolve() != file.resolve():
            shutil.copyfile(file, destination)
            copied.append(destination)
    return copied
