"""All agents under an evaluation folder, and the paper's weighing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from data_utils.errors import MMRoleError
from eval.results.agents import FILES, ranked, read_agents, unexplained_csvs
from tests.closed import close
from tests.eval.made_reviews import link_published, made_row, review_path, write_agent, write_rows


def test_every_cell_of_the_papers_table(shared: Path, tmp_path: Path) -> None:
    table = json.loads((shared / "golden" / "paper_table_5.json").read_text(encoding="utf-8"))
    agents = {agent.folder: agent for agent in read_agents(link_published(shared, tmp_path / "eval"))}
    checked = 0
    for row in table["rows"]:
        folder, _, split = row["folder"].partition(":")
        if folder in agents:
            scores = agents[folder].paper_scores(split or None)
            assert [f"{score:.3f}" for score in scores] == [row[column] for column in table["columns"]], row["name"]
            assert split or agents[folder].name == row["name"]
            checked += 1
    assert checked == 10  # eight agents, and In-Test and Out-Test of MMRole-Agent
    assert {agent.status for agent in agents.values()} == {"complete"}


def write_uneven(eval_dir: Path) -> None:
    """Six files with a ratio each of 0.1 to 0.6, and unequal numbers of rows."""
    for i, (split, kind) in enumerate(FILES, 1):
        rows = [made_row(number, (i, 10)) for number in range(i)]
        write_rows(review_path(eval_dir, "made", split, kind), rows)


def test_published_weights_are_of_files_and_splits_not_of_samples(tmp_path: Path) -> None:
    write_uneven(tmp_path)
    (agent,) = read_agents(tmp_path)
    assert agent.paper_scores("in") == pytest.approx(np.full(9, 0.2))
    assert agent.paper_scores("out") == pytest.approx(np.full(9, 0.5))
    assert agent.paper_scores() == pytest.approx(np.full(9, 0.75 * 0.2 + 0.25 * 0.5))
    assert agent.ratios().mean() == pytest.approx(9.1 / 21)


@pytest.mark.parametrize("missing", FILES)
def test_incomplete_agent_never_has_the_papers_number(tmp_path: Path, missing: tuple[str, str]) -> None:
    write_agent(tmp_path, "made", [made_row()], skip=[missing])
    (agent,) = read_agents(tmp_path)
    assert not agent.complete
    assert f"incomplete: no readable {missing[0]}-test/{missing[1]}" in agent.status
    assert np.isnan(agent.paper_scores()).all() and np.isnan(agent.paper_scores(missing[0])).all()
    other = "out" if missing[0] == "in" else "in"
    assert np.isfinite(agent.paper_scores(other)).all()
    assert agent.ratios().shape == (5, 8)


def test_answers_that_wait_for_their_review_make_it_incomplete(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row()])
    waiting = made_row(1)
    del waiting["rm_review"]
    write_rows(review_path(tmp_path, "made", "in", "comment"), [made_row(), waiting])
    (agent,) = read_agents(tmp_path)
    assert agent.status.startswith("incomplete: answers not reviewed: 1") and np.isnan(agent.paper_scores()).all()


def test_empty_answers_do_not_make_it_incomplete(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row(), made_row(1, answer="")])
    (agent,) = read_agents(tmp_path)
    assert agent.complete and np.isfinite(agent.paper_scores()).all()
    assert agent.status == "complete; 12 rows where the published files have 294"


def test_unreadable_file_is_a_problem_of_its_agent_alone(tmp_path: Path) -> None:
    write_agent(tmp_path, "good", [made_row()])
    write_agent(tmp_path, "bad", [made_row()])
    review_path(tmp_path, "bad", "out", "comment").write_text("[{", encoding="utf-8")
    bad, good = read_agents(tmp_path)
    assert good.complete and not good.problems
    assert len(bad.problems) == 1 and "incomplete: no readable out-test/comment" in bad.status


def test_nothing_there_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "in-test_reviews" / "empty").mkdir(parents=True)
    for eval_dir in (tmp_path, tmp_path / "absent"):
        with pytest.raises(MMRoleError, match="no reviews here") as caught:
            read_agents(eval_dir)
        assert "RM_review.sh" in str(caught.value)


def test_ranked_by_overall_with_incomplete_ones_last(tmp_path: Path) -> None:
    write_agent(tmp_path, "worst", [made_row(0, (1, 10))])
    write_agent(tmp_path, "best", [made_row(0, (9, 10))])
    write_agent(tmp_path, "part_high", [made_row(0, (10, 5))], skip=[("in", "comment")])
    write_agent(tmp_path, "part_low", [made_row(0, (2, 10))], skip=[("in", "comment")])
    write_agent(tmp_path, "nothing", [made_row(0, (2, 0))])
    assert [agent.folder for agent in ranked(read_agents(tmp_path))] == [
        "best", "worst", "part_high", "part_low", "nothing",
    ]  # fmt: skip


def test_names_that_cannot_be_printed_are_escaped(tmp_path: Path) -> None:
    for folder in ("qwen-vl-chat", "我的 agent", "two\nlines"):
        write_agent(tmp_path, folder, [made_row()])
    names = {agent.folder: agent.name for agent in read_agents(tmp_path)}
    assert names == {"qwen-vl-chat": "QWen-VL-Chat", "我的 agent": "我的 agent", "two\nlines": "two\\nlines"}


def test_all_failed_has_no_number_and_does_not_crash(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row(0, (5, 0))])
    (agent,) = read_agents(tmp_path)
    assert agent.complete and math.isnan(agent.paper_scores()[-1])


def test_a_closed_folder_is_told_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_agent(tmp_path, "open", [made_row()])
    write_agent(tmp_path, "shut", [made_row()])
    close(monkeypatch, tmp_path / "in-test_reviews" / "shut")
    sound, shut = read_agents(tmp_path)
    assert sound.complete and not sound.problems
    assert [len(shut.files), len(shut.unreadable)] == [3, 3]
    (problem,) = shut.problems
    assert problem.value == tmp_path / "in-test_reviews" / "shut"
    (csv := tmp_path / "in-test_results" / "shut" / "comment_test.csv").parent.mkdir(parents=True)
    csv.write_text("")
    assert unexplained_csvs(tmp_path) == []


def test_a_closed_split_is_told_with_every_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_agent(tmp_path, "a", [made_row()])
    write_agent(tmp_path, "b", [made_row()])
    close(monkeypatch, tmp_path / "in-test_reviews")
    for agent in read_agents(tmp_path):
        assert len(agent.files) == 3 and not agent.complete
        assert [problem.value for problem in agent.problems] == [tmp_path / "in-test_reviews"]


def test_a_closed_evaluation_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_agent(tmp_path / "eval", "a", [made_row()])
    close(monkeypatch, tmp_path / "eval")
    with pytest.raises(MMRoleError, match="cannot read: Permission denied"):
        read_agents(tmp_path / "eval")
