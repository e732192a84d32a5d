"""How prompts are divided into groups that share a prefix."""

import random

import numpy as np

from qwen_vl.engine.scheduler import common_prefix, group_by_prefix


class TestPrefixes:
    def test_reviews_of_rows(self) -> None:
        rows = [np.arange(1000 * row, 1000 * row + 300) for row in range(3)]
        prompts = [np.concatenate([rows[i % 3], [-i, 7, 7]]) for i in range(24)]
        groups = group_by_prefix(prompts, [1.0] * 24)
        assert sorted(shared for _, shared in groups) == [300] * 3
        assert sorted(i for members, _ in groups for i in members) == list(range(24))

    def test_each_prompt_once_and_prefixes_are_common(self) -> None:
        chooser = random.Random(0)
        prompts = [
            np.array(
                [0] * chooser.choice([0, 40, 80]) + [chooser.randrange(3) for _ in range(chooser.randrange(1, 60))]
            )
            for _ in range(200)
        ]
        kinds = [float(chooser.randrange(2)) for _ in prompts]
        groups = group_by_prefix(prompts, kinds)
        assert sorted(i for members, _ in groups for i in members) == list(range(200))
        for members, shared in groups:
            first = prompts[members[0]]
            assert len({kinds[i] for i in members}) == 1
            for i in members[1:]:
                assert common_prefix(first, prompts[i]) >= shared
                assert shared < len(prompts[i])

    def test_equal_prompts_leave_a_token_each(self) -> None:
        assert group_by_prefix([np.arange(100)] * 3, [1.0] * 3) == [([0, 1, 2], 99)]

    def test_little_in_common_is_not_shared(self) -> None:
        prompts = [np.array([1] * 20 + [i] * 50) for i in range(2, 5)]
        assert [members for members, _ in group_by_prefix(prompts, [1.0] * 3)] == [[0], [1], [2]]

    def test_a_small_part_of_long_prompts_is_not_shared(self) -> None:
        """As a system message: to save a little, rows of all lengths would lie beside each other."""
        prompts = [np.array([1] * 40 + [i] * 500) for i in range(2, 5)]
        assert [members for members, _ in group_by_prefix(prompts, [1.0] * 3)] == [[0], [1], [2]]

    def test_a_long_prefix_is_not_given_up_for_a_short_one(self) -> None:
        near = [np.array([1] * 90 + [2] * 500 + [i]) for i in range(3, 7)]
        far = [np.array([1] * 90 + [9] * 500 + [i]) for i in range(3, 7)]
        assert sorted(shared for _, shared in group_by_prefix(near + far, [1.0] * 8)) == [590, 590]
