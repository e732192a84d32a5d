import os
import pickle
import subprocess
import sys

import pytest

from data_utils.errors import MMRoleError, ProblemsError, raise_problems, run_main, shown
from tests.conftest import ROOT


def test_the_four_parts_are_labelled():
    text = str(MMRoleError("the id is missing", value="{}", where="a.json, row 3", fix="add one"))
    assert text.splitlines() == [
        "problem: the id is missing",
        "value:   {}",
        "where:   a.json, row 3",
        "to do:   add one",
    ]


def test_an_empty_value_is_shown_as_such():
    assert "value:   (empty)" in str(MMRoleError("no name", value=""))


def test_long_and_unprintable_values_stay_readable():
    text = shown("a" * 10_000 + "\x1b[31m")
    assert len(text) < 500
    assert "characters left out" in text
    assert "\x1b" not in text


def test_a_list_is_shown_whole():
    names = [f"{number}.png" for number in range(500)]
    assert shown(names).splitlines() == names


def test_all_problems_are_reported():
    problems = [MMRoleError(f"wrong {number}") for number in range(30)]
    text = str(ProblemsError(problems))
    assert all(f"[{number + 1}/30]\nproblem: wrong {number}" in text for number in range(30))


def test_raise_problems_is_silent_without_any():
    raise_problems([])
    with pytest.raises(ProblemsError):
        raise_problems([MMRoleError("wrong")])


def test_errors_cross_processes():
    error = pickle.loads(pickle.dumps(ProblemsError([MMRoleError("a", 1, "b", "c")])))
    assert "problem: a" in str(error)
    assert error.problems[0].fix == "c"


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1)])
def test_run_main_gives_the_exit_status(result, status):
    assert run_main(lambda: result) == status


def test_run_main_prints_user_errors_without_a_traceback(capsys):
    def main():
        raise MMRoleError("wrong", value="\udc80 bad", fix="mend it")

    assert run_main(main) == 2
    result = capsys.readouterr().err
    assert "problem: wrong" in result
    assert "Traceback" not in result


def test_run_main_lets_bugs_through():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_main(main)


def test_run_main_after_ctrl_c(capsys):
    def main():
        raise KeyboardInterrupt

    assert run_main(main) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_names_that_stdout_cannot_show_are_escaped(tmp_path):
    code = "from data_utils.errors import run_main; run_main(lambda: print('评测 \\udcff'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert done.stdout == b"\\u8bc4\\u6d4b \\udcff\n", done.stderr
