"""The checks of scripts/parity.sh before anything runs, and its report."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from data_utils.errors import MMRoleError
from tests.scripts import stand_in

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))  # where a script finds the ones beside it
import parity


def never(*_: object) -> None:
    raise AssertionError("nothing may run")


def assert_four_parts(error: BaseException, *texts: str) -> None:
    for part in ("problem:", "value:", "where:", "to do:", *texts):
        assert part in str(error)


def test_folder_without_code_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "run", never)
    folder = stand_in.write(tmp_path / "bare", code=False)
    with pytest.raises(MMRoleError, match="problem") as caught:
        parity.main([str(folder), parity.TRUST])
    assert "modeling_qwen.py" in str(caught.value)
    assert "Qwen/Qwen-VL-Chat" in str(caught.value)
    with pytest.raises(MMRoleError, match="problem") as caught:
        parity.main([str(tmp_path / "nowhere")])
    assert_four_parts(caught.value, "checkpoint")


BROKEN = ["[]", "5", "{", '"text"', '{"auto_map": []}', '{"auto_map": {"AutoTokenizer": []}}', '{"auto_map": null}']


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", BROKEN)
def test_file_that_names_no_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str
) -> None:
    monkeypatch.setattr(parity, "run", never)
    folder = stand_in.write(tmp_path / "odd")
    (folder / file).write_text(content)
    with pytest.raises(MMRoleError) as caught:
        parity.main([str(folder), parity.TRUST])
    assert_four_parts(caught.value, file, "Qwen/Qwen-VL-Chat")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "adapter"),
        ('{"base_model_name_or_path": 5}', "adapter"),
        ('{"base_model_name_or_path": "/gone"}', "/gone"),
    ],
)
def test_adapter_without_its_base_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(MMRoleError) as caught:
        parity.main([str(tmp_path), parity.TRUST])
    assert expected in str(caught.value)


def test_report_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "run", never)
    folder = stand_in.write(tmp_path / "same")
    closed = tmp_path / "closed"
    closed.mkdir()
    reports = [tmp_path / "nowhere" / "report.json", folder / "config.json" / "report.json", closed, closed / "r.json"]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)  # root may write anywhere
    for report in reports:
        with pytest.raises(MMRoleError) as caught:
            parity.main([str(folder), "--report", str(report)])
        assert_four_parts(caught.value, "--report", str(report))
    with pytest.raises(MMRoleError) as caught:  # all at once
        parity.main([str(tmp_path / "bare"), "--report", str(reports[0])])
    assert "2 problem(s)" in caught.value.what


def test_report_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = parity.Row("logits", "short", "(16, 492)", "0", "0", "same")
    monkeypatch.setattr(parity, "run", lambda *_: ([row], {"ours": parity.Side({"device": "cpu"}, {}, {})}))
    report, kept = tmp_path / "report.json", tmp_path / "kept.json"
    report.write_text("before")
    os.link(report, kept)
    assert parity.main([str(stand_in.write(tmp_path / "same")), "--report", str(report)]) == 0
    assert json.loads(report.read_text())["rows"][0]["verdict"] == "same"
    assert kept.read_text() == "before"  # another file took its place, and none was written over
