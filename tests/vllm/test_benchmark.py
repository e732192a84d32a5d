"""`scripts/benchmark.py vllm` gives both engines the same work; how fast they are is nothing for a test."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.eval.made_reviews import made_row, write_rows
from tests.vllm.conftest import needs_vllm

pytestmark = needs_vllm


def test_the_same_requests(own_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_vl import QwenVLTokenizer

    rows = [{**made_row(i), "system": "You are Ada."} for i in range(2)]
    write_rows(tmp_path / "published/in-test_reviews/ada/comment_test.json", rows)
    (tmp_path / "images").mkdir()
    Image.radial_gradient("L").save(tmp_path / "images" / "a.jpg")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    from benchmark import main

    given = ["--data_root", tmp_path, "--checkpoint", own_checkpoint, "--agent", "ada", "--rows", 1, "--rounds", 1]
    out = tmp_path / "figures.json"
    main([str(word) for word in ("vllm", *given, "--device", "cpu", "--dtype", "float32", "--eager", "--json", out)])
    [turn] = json.loads(out.read_text())["rounds"]
    encode = QwenVLTokenizer.from_pretrained(own_checkpoint).encode_plain
    written = sum(len(encode(record["review"])) + 1 for record in rows[0]["rm_review"].values())
    for engine in ("ours", "vLLM"):
        assert turn[engine]["requests"] == 8
        assert turn[engine]["written tokens per second"] * turn[engine]["seconds"] == pytest.approx(written)
        assert turn[engine]["prefill saved"] > 0
