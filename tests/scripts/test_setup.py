"""scripts/setup.sh and scripts/environment.sh, run by real pip on stub wheels, or with shims in place of Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import stub_wheels

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = """
[build-system]
requires = []
build-backend = "stub_wheels"
backend-path = ["."]

[project]
dependencies = [
    "torch>=2.11,<2.14",
    "stubby>=1,<2",
]

[project.optional-dependencies]
train = [
    "stubtrain>=1,<2",
]
test = [
    "stubtest>=1,<2",
]
"""


class Project:
    """A copy of the set-up scripts with stub requirements, and how to run them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "scripts").mkdir(parents=True)
        for script in ("setup.sh", "environment.sh", "basics.sh"):
            shutil.copy(ROOT / "scripts" / script, root / "scripts" / script)
        shutil.copy(stub_wheels.__file__, root / "stub_wheels.py")
        (root / "requirements.txt").write_text("-e .[train]\n")
        (root / "pyproject.toml").write_text(PYPROJECT)
        self.wheels = root.parent / "wheels"
        self.wheels.mkdir()
        for version in ("2.11.0", "2.13.0", "2.13.1", "2.14.0"):
            stub_wheels.write_wheel(self.wheels, "torch", version)
        for name in ("stubby", "stubtrain", "stubtest", "stubnew"):
            stub_wheels.write_wheel(self.wheels, name, "1.0")

    @property
    def python(self) -> Path:
        return self.root / ".venv" / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.root / ".venv" / "mmrole-setup.txt"

    def environ(self, **extra: str) -> dict[str, str]:
        keep = {"PATH": os.environ["PATH"], "HOME": str(self.root)}
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        return {**keep, **pip, "PYTHON_FOR_VENV": sys.executable, **extra}

    def setup(self, *flags: str, **extra: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(self.root / "scripts" / "setup.sh"), *flags]
        return subprocess.run(command, env=self.environ(**extra), cwd="/", capture_output=True, text=True)

    def source(self, script: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Runs `script` after sourcing environment.sh, as every script of ours does."""
        command = ["bash", "-c", f'set -euo pipefail; source "{self.root}/scripts/environment.sh"; {script}']
        return subprocess.run(command, env=self.environ(**extra), cwd="/", capture_output=True, text=True)

    def versions(self) -> dict[str, str]:
        code = "from importlib.metadata import distributions as d; print(*(f'{x.name}={x.version}' for x in d()))"
        listed = subprocess.run([self.python, "-I", "-c", code], check=True, capture_output=True, text=True).stdout
        return dict(entry.split("=") for entry in listed.split())


def assert_four_parts(result: subprocess.CompletedProcess[str], *mentioned: str) -> None:
    assert result.returncode == 2, result.stderr
    for part in ("problem: ", "value:   ", "where:   ", "to do:   ", *mentioned):
        assert part in result.stderr


def shim(folder: Path, name: str, body: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bare(tmp_path: Path) -> Project:
    """A project in which nothing is set up."""
    return Project(tmp_path / "project")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that is set up once; the tests that use it leave it set up."""
    project = Project(tmp_path_factory.mktemp("setup") / "project")
    result = project.setup()
    assert result.returncode == 0, result.stderr
    return project


@pytest.mark.slow
def test_from_nothing(made: Project) -> None:
    assert (
        made.versions().items() >= {"torch": "2.13.0", "stubby": "1.0", "stubtrain": "1.0", "mmrole": "0.1.0"}.items()
    )
    assert "stubtest" not in made.versions()
    result = made.source('echo "$ROOT $PYTHON $PYTHONPATH"', PYTHONPATH="/else")
    assert result.stdout.split() == [str(made.root), str(made.python), f"{made.root}:/else"]


@pytest.mark.slow
def test_nothing_is_started_when_nothing_changed(made: Project, tmp_path: Path) -> None:
    shim(tmp_path, "python3.12", "echo started >&2; exit 1")
    for environment in ({}, {"VIRTUAL_ENV": str(made.root / ".venv")}):
        assert "nothing to do" in made.setup(PYTHON_FOR_VENV=str(tmp_path / "python3.12"), **environment).stderr
    assert made.source("true").stderr == ""


@pytest.mark.slow
def test_changed_packages_are_installed_by_any_script(made: Project) -> None:
    (made.root / "pyproject.toml").write_text(PYPROJECT.replace('    "stubby', '    "stubnew>=1",\n    "stubby'))
    assert made.source('"$PYTHON" -c "import stubnew"').returncode == 0
    assert "nothing to do" in made.setup().stderr


@pytest.mark.slow
def test_extra_for_tests_stays(made: Project) -> None:
    assert made.setup("--test").returncode == 0
    assert "stubtest" in made.versions()
    assert "nothing to do" in made.setup().stderr


@pytest.mark.slow
def test_torch_version_of_the_user_is_kept(made: Project) -> None:
    assert made.setup(TORCH_VERSION="2.11.0").returncode == 0
    assert "nothing to do" in made.setup().stderr
    made.stamp.unlink()
    assert made.setup().returncode == 0
    assert made.versions()["torch"] == "2.11.0"
    assert_four_parts(made.setup(TORCH_VERSION="2.14.0"), "torch==2.14.0")
    assert made.versions()["torch"] == "2.11.0"


def test_no_network(bare: Project, tmp_path: Path) -> None:
    (bare.root / "requirements.txt").write_text("nowhere>=1\n")
    active = tmp_path / "env"
    shim(active / "bin", "python", f'exec "{sys.executable}" "$@"')
    assert_four_parts(bare.setup(VIRTUAL_ENV=str(active), TORCH_VERSION="2.13.0"), "network", "bash scripts/setup.sh")


def test_no_fitting_python(bare: Project) -> None:
    assert_four_parts(
        bare.setup(PYTHON_FOR_VENV="no-such-python"), "3.10 to 3.14", "no-such-python", "PYTHON_FOR_VENV="
    )
    assert not (bare.root / ".venv").exists()


def test_python_that_does_not_run_is_passed_over(bare: Project, tmp_path: Path) -> None:
    """pyenv leaves a python3.12 on the PATH that only says that there is none."""
    for version in ("python3.12", "python3.13"):
        shim(tmp_path / "bin", version, "exit 127")
    shim(tmp_path / "bin", "python3.11", f'[ "$2" = venv ] && exit 1; exec "{sys.executable}" "$@"')
    result = bare.setup(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", PYTHON_FOR_VENV="")
    assert_four_parts(result, "python3.11 -m venv", "python3-venv")


def active_environment(folder: Path) -> Path:
    """An environment with this Python, whose pip only records its arguments."""
    note = f'if [ "$1 $2" = "-m pip" ]; then echo "$@" >>"{folder}/pip.txt"; exit; fi'
    shim(folder / "bin", "python", f'{note}\nexec "{sys.executable}" "$@"')
    return folder


def test_active_environment_is_checked_not_changed(bare: Project, tmp_path: Path) -> None:
    active = active_environment(tmp_path / "env")
    result = bare.source("echo on", VIRTUAL_ENV=str(active))
    assert_four_parts(result, "stubby>=1,<2", "bash scripts/setup.sh")
    assert "stubtrain" not in result.stderr
    assert result.stdout == ""
    assert not (active / "pip.txt").exists()
    assert not (bare.root / ".venv").exists()


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_active_environment_is_used(bare: Project, tmp_path: Path, variable: str) -> None:
    (bare.root / "pyproject.toml").write_text('dependencies = [\n    "pytest>=1,<2",\n]\n')
    active = active_environment(tmp_path / "env")
    result = bare.source('echo "$PYTHON"', **{variable: str(active)})
    assert result.stdout.strip() == str(active / "bin" / "python")
    assert "not tested with these versions: pytest>=1,<2" in result.stderr
    assert not (bare.root / ".venv").exists()


def test_conda_base_is_left_alone(bare: Project, tmp_path: Path) -> None:
    active = active_environment(tmp_path / "env")
    extra = {"CONDA_PREFIX": str(active), "CONDA_DEFAULT_ENV": "base", "PYTHON_FOR_VENV": "no-such-python"}
    assert_four_parts(bare.setup(**extra), "no-such-python")


@pytest.mark.parametrize(("version", "first"), [("", "-r requirements.txt"), ("2.13.1", "torch==2.13.1")])
def test_torch_of_an_active_environment_is_kept(bare: Project, tmp_path: Path, version: str, first: str) -> None:
    active = active_environment(tmp_path / "env")
    (active / "lib" / "python3.11" / "site-packages" / "torch-2.12.0+cpu.dist-info").mkdir(parents=True)
    bare.setup(VIRTUAL_ENV=str(active), TORCH_VERSION=version)
    [call] = [line for line in (active / "pip.txt").read_text().splitlines() if " install " in line]
    assert call.partition("check ")[2].startswith(first)


def test_python_of_an_active_environment_must_fit(bare: Project, tmp_path: Path) -> None:
    shim(tmp_path / "env" / "bin", "python", "[ $1 = --version ] && echo Python 3.9.1; exit 1")
    assert_four_parts(bare.setup(VIRTUAL_ENV=str(tmp_path / "env")), "Python 3.9.1", "deactivate")


def test_unknown_option(bare: Project) -> None:
    assert_four_parts(bare.setup("--tests"), "--tests")


def test_help_names_the_settings(bare: Project) -> None:
    help_text = bare.setup("--help").stdout
    assert {"--test", "TORCH_VERSION", "PYTHON_FOR_VENV"} <= set(help_text.replace("[", " ").replace("]", " ").split())
