# ruff: noqa: N999 - the released file name
"""Turns reviews into the published CSVs, and the reviews of all agents into one table and a radar chart.

    python eval/RM_result.py                                                  every agent under eval/, and the report
    python eval/RM_result.py --input_dir eval/in-test_reviews/mmrole-agent --output_dir OUT      one folder, CSVs only

Exit status: 0; 1 if a file could not be read or written (everything else is done); 2 if nothing could be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_utils.console import ignore_lost_output
from data_utils.errors import MMRoleError, run_main
from data_utils.files import make_folder, write_bytes
from data_utils.flag_types import natural
from data_utils.layout import (
    RELEASED_JUDGE,
    check_folder_name,
    judge_folder,
    repeated_judges,
    results_folder,
    swapped_judge,
)
from data_utils.paths import is_file, is_folder, listed
from eval.results.judges import PositionBias, Spread, position_bias, spread
from eval.results.origins import origins
from eval.results.report import build_report
from eval.results.reviews import (
    Agent,
    Record,
    csv_bytes,
    csv_path,
    describe,
    nested_reviews,
    read_agents,
    read_reviews,
    unexplained_csvs,
)
from eval.results.tables import markdown, records_csv, report_json, statistics_csv, table_csv, terminal_table

ROOT = Path(__file__).resolve().parents[1]
REPORT_FILES = ("table.md", "table.csv", "statistics.csv", "records.csv", "report.json", "radar.png", "report.html")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; the first three flags are the released ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", type=Path, help="one folder of review files (*.json); needs --output_dir")
    parser.add_argument("--input_file", help="one file in --input_dir instead of all")
    parser.add_argument("--output_dir", type=Path, help="where its CSVs go")
    parser.add_argument(
        "--eval_dir", type=Path, default=ROOT / "eval", help="holds {in,out}-test_reviews (%(default)s)"
    )
    parser.add_argument(
        "--judge",
        default=RELEASED_JUDGE,
        help="whose reviews: a folder's name below EVAL_DIR/judges (default: the released reward model's, in EVAL_DIR)",
    )
    parser.add_argument("--report_dir", type=Path, help="where table and chart go (default: EVAL_DIR/report)")
    parser.add_argument("--data_root", type=Path, default=ROOT, help="holds images/, for the page (%(default)s)")
    parser.add_argument("--no_html", action="store_true", help="skip report.html, which takes the longest")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the permutation tests (default: 0)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Raises:
        MMRoleError: If nothing could be done at all, or the report could not be written.
    """
    options = build_parser().parse_args(arguments)
    if options.input_dir or options.input_file or options.output_dir:
        problems = _one_folder(options)
    else:
        problems = _all_agents(options)
    for problem in problems:
        print(f"error\n{problem}", file=sys.stderr)
    return 1 if problems else 0


def _one_folder(options: argparse.Namespace) -> list[MMRoleError]:
    files = _input_files(options)
    problems = []
    for path in files:
        table = options.output_dir / f"{path.stem}.csv"
        try:
            result = read_reviews(path)
        except MMRoleError as error:
            problems.append(error)
            print(f"{path.name}: not counted, see the error below")
            _set_aside(table, problems)
            continue
        try:
            _write(table, csv_bytes(result))
        except MMRoleError as error:
            problems.append(error)
        _print_lines(path.name, describe(result))
    print(f"results: {options.output_dir}")
    return problems


def _input_files(options: argparse.Namespace) -> list[Path]:
    """Return the requested review files.

    Raises:
        MMRoleError: If one of the two folders is not given, or there is no such file.
    """
    if not (options.input_dir and options.output_dir):
        raise MMRoleError(
            "--input_dir and --output_dir must be given together",
            f"--input_dir {options.input_dir}, --output_dir {options.output_dir}, --input_file {options.input_file}",
            "command line",
            "give both, or none of the three to read every agent under --eval_dir",
        )
    if options.input_file is not None:
        return [options.input_dir / options.input_file]
    files = listed(options.input_dir, "*.json")
    if not files:
        raise MMRoleError(
            "no review files (*.json) here",
            options.input_dir,
            "--input_dir",
            "check the path, or run eval/RM_review.sh",
        )
    return files


def _all_agents(options: argparse.Namespace) -> list[MMRoleError]:
    check_folder_name(options.judge, "--judge")
    report_dir = options.report_dir or judge_folder(options.eval_dir, options.judge) / "report"
    agents = read_agents(options.eval_dir, options.judge)
    for agent in agents:
        print(f"{agent.name} ({agent.status})")
        _write_csvs(agent, options)
        for (split, kind), result in agent.files.items():
            _print_lines(f"  {split}-test/{kind}", describe(result))
    _write_report(agents, report_dir, options)
    for path in unexplained_csvs(options.eval_dir, options.judge):
        print(f"stale: {path} has no reviews; it was left unchanged")
    print(f"\nresults: {results_folder(options.eval_dir, '{in,out}', judge=options.judge)}/<agent>/*.csv")
    made = [name for name in REPORT_FILES if (report_dir / name).is_file()]
    print(f"report:  {report_dir}/{', '.join(made)}")
    problems = [problem for agent in agents for problem in agent.problems]
    problems += nested_reviews(options.eval_dir, options.judge)
    return list({str(problem): problem for problem in problems}.values())


def _write_csvs(agent: Agent, options: argparse.Namespace) -> None:
    for (split, kind), result in agent.files.items():
        try:
            _write(csv_path(options.eval_dir, split, agent.folder, kind, options.judge), csv_bytes(result))
        except MMRoleError as error:
            agent.problems.append(error)
    for split, kind in agent.unreadable:
        _set_aside(csv_path(options.eval_dir, split, agent.folder, kind, options.judge), agent.problems)


def _set_aside(path: Path, problems: list[MMRoleError]) -> None:
    """Rename a CSV of earlier reviews, because the present ones are unreadable."""
    try:
        if not is_file(path):
            return
    except MMRoleError as error:
        problems.append(error)
        return
    aside = path.with_name(f"{path.name}.stale")
    try:
        path.replace(aside)
    except OSError as error:
        fix = "remove it: its numbers come from earlier reviews"
        problems.append(MMRoleError(f"a stale CSV cannot be set aside: {error.strerror}", path, fix=fix))
        return
    print(f"stale: {path} was computed from earlier reviews; it is {aside.name} now")


def _write_report(agents: list[Agent], report_dir: Path, options: argparse.Namespace) -> None:
    bias, repeated = _compare_with_itself(agents, options)
    report = build_report(
        agents, seed=options.seed, position_bias=bias, spread=repeated, origins=origins(options.eval_dir, agents)
    )
    print(f"\n{terminal_table(report)}", end="")
    settings = {"eval_dir": str(options.eval_dir), "judge": options.judge, "seed": options.seed}
    for name, text in (
        ("table.md", markdown(report)),
        ("table.csv", table_csv(report)),
        ("statistics.csv", statistics_csv(report)),
        ("records.csv", records_csv(report)),
        ("report.json", report_json(report, settings)),
    ):
        _write(report_dir / name, text.encode("utf-8", errors="backslashreplace"))
    # matplotlib takes a second to import, and is not needed for CSVs alone
    from eval.results.figures import radar_lines, radar_png

    chart, page = report_dir / "radar.png", report_dir / "report.html"
    picture = radar_png(radar_lines(report))
    if picture:
        _write(chart, picture)
    else:
        chart.unlink(missing_ok=True)
        print("no chart: no agent has a single readable review")
    if options.no_html:
        page.unlink(missing_ok=True)  # it would show earlier reviews
    else:
        from eval.results.html import report_html

        _write(page, report_html(report, settings, options.data_root / "images"))


def _compare_with_itself(agents: list[Agent], options: argparse.Namespace) -> tuple[PositionBias | None, list[Spread]]:
    """The judge compared with itself, where it has reviewed swapped answers, or the same ones again."""

    def records(judge: str) -> list[Record]:
        found = read_agents(options.eval_dir, judge, swapped=True)
        for agent in found:
            agents[0].problems.extend(agent.problems)
        return [record for agent in found for record in agent.records()]

    usual = [record for agent in agents for record in agent.records()]
    swapped, repeated = swapped_judge(options.judge), repeated_judges(options.eval_dir, options.judge)
    return (
        position_bias(usual, records(swapped)) if is_folder(judge_folder(options.eval_dir, swapped)) else None,
        spread(usual, *map(records, repeated)) if repeated else [],
    )


def _print_lines(name: str, lines: Sequence[str]) -> None:
    print(f"{name}: {lines[0]}")
    for line in lines[1:]:
        print(f"      {line}")


def _write(path: Path, data: bytes) -> None:
    make_folder(path.parent, "the reviews are unchanged")
    write_bytes(path, data)


if __name__ == "__main__":
    ignore_lost_output()
    sys.exit(run_main(main))
