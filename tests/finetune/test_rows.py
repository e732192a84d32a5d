import pytest

from finetune.rows import CompactRows


def test_rows_come_back_as_they_were() -> None:
    rows = [{"id": "a", "value": "一幅画"}, {"id": "b", "nested": [1, {"x": None}]}, {"id": "c"}]
    compact = CompactRows(rows)
    assert list(compact) == rows
    assert compact[-1] == rows[-1]
    assert len(compact) == 3
    with pytest.raises(IndexError):
        compact[3]
    assert list(CompactRows([])) == []
