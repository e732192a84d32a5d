import pytest

from data_utils.errors import MMRoleError
from finetune.batch_size import accumulation_steps


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "processes", "steps"), [(256, 2, 8, 16), (256, 1, 1, 256), (4, 2, 2, 1)]
)
def test_accumulation(global_batch: int, micro_batch: int, processes: int, steps: int) -> None:
    assert accumulation_steps(global_batch, micro_batch, processes) == steps


def test_what_cannot_divide_lists_what_can() -> None:
    with pytest.raises(MMRoleError) as caught:
        accumulation_steps(256, 3, 8)
    told = str(caught.value)
    assert "global batch 256, micro-batch 3, 8 process(es)" in told
    assert "micro-batch 1, 2, 4, 8, 16, 32 with these 8 process(es)" in told
    assert "global batch 240 or 264" in told
    with pytest.raises(MMRoleError, match="does not divide") as caught:
        accumulation_steps(256, 2, 6)
    assert "1, 2, 4, 8, 16, 32, 64, 128 process(es) with this micro-batch" in str(caught.value)
    assert "with these 6 process(es)" not in str(caught.value)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (8, 0, 1), (-8, 2, 1)])
def test_numbers_must_be_positive(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(MMRoleError, match="does not divide"):
        accumulation_steps(*numbers)
