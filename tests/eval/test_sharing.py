"""Texts dealt to processes: all of them, rows together, about the same to each."""

import random
from pathlib import Path

import pytest

from eval.running.result_files import ResultFile, Unit
from eval.running.sharing import Missing, deal, expected_cost


def made(texts, *, reviews=8):
    """A file whose rows have a prompt of so many characters and `reviews` units each."""
    units = [
        Unit(f"{metric}: {row}", Path("x.png"), "x.png", "system", "p" * length + f" metric {metric}", row=str(row))
        for row, length in enumerate(texts)
        for metric in range(reviews)
    ]
    return ResultFile(Path("x.json"), units, len(texts), lambda outcomes: [])


def all_missing(files):
    return [Missing(number, unit, 0) for number, file in files.items() for unit in range(len(file.units))]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_text_is_dealt_once_and_rows_stay_together(processes):
    files = {2: made([5, 900, 70, 3000]), 5: made([10, 20])}
    shares = deal(all_missing(files), files, processes)
    assert len(shares) == processes
    assert sorted(text for share in shares for text in share) == sorted(all_missing(files))
    owners = {}
    for process, share in enumerate(shares):
        for text in share:
            owners.setdefault((text.file, files[text.file].units[text.unit].row), set()).add(process)
    assert len(owners) == 6
    assert all(len(processes) == 1 for processes in owners.values())


def test_the_same_row_id_in_two_files_is_two_rows():
    files = {0: made([1000]), 1: made([1000])}
    assert [{text.file for text in share} for share in deal(all_missing(files), files, 2)] == [{0}, {1}]


def test_loads_are_even_and_the_longest_come_first():
    chance = random.Random(0)
    files = {0: made([int(chance.lognormvariate(8, 0.7)) for _ in range(294)])}
    shares = deal(all_missing(files), files, 8)
    cost_of = {row: expected_cost([u for u in files[0].units if u.row == row]) for row in map(str, range(294))}
    costs = [[cost_of[row] for row in dict.fromkeys(files[0].units[t.unit].row for t in share)] for share in shares]
    assert all(row_costs == sorted(row_costs, reverse=True) for row_costs in costs)
    loads = [sum(row_costs) for row_costs in costs]
    assert max(loads) / min(loads) < 1.02


def test_only_what_is_missing_is_dealt():
    files = {0: made([100] * 4)}
    missing = [Missing(0, 3, 1), Missing(0, 17, 0)]
    assert sorted(len(share) for share in deal(missing, files, 3)) == [0, 1, 1]


def test_a_shared_beginning_counts_once():
    (one, *_), eight = made([4000], reviews=1).units, made([4000]).units
    assert expected_cost([one]) < expected_cost(eight) < 2 * expected_cost([one])


def test_texts_that_no_file_can_hold_have_a_cost_too():
    assert expected_cost([Unit("a", Path("x.png"), "x.png", "s", "\ud83d")]) > 0
