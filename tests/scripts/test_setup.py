"""scripts/setup.sh and scripts/environment.sh, run by real pip on stub wheels, or with shims in place of Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scripts import stub_wheels

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = "torch>=2.11,<2.14\nstubby>=1,<2\nstubtrain>=1,<2  # on demand\n-e .\n"
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "stub_wheels"\nbackend-path = ["."]\n'


class Project:
    """A copy of the set-up scripts with stub requirements, and how to run them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "scripts").mkdir(parents=True)
        for script in ("setup.sh", "environment.sh"):
            shutil.copy(ROOT / "scripts" / script, root / "scripts" / script)
        shutil.copy(stub_wheels.__file__, root / "stub_wheels.py")
        (root / "requirements.txt").write_text(REQUIREMENTS)
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

    @property
    def site(self) -> Path:
        return next((self.root / ".venv").glob("lib/python3*/site-packages"))

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
    """A project set up once from nothing; the tests that use it leave it set up."""
    project = Project(tmp_path_factory.mktemp("setup") / "project")
    result = project.setup()
    assert result.returncode == 0, result.stderr
    assert result.stderr.index("torch first: 2.13.0") < result.stderr.index("the rest of requirements.txt")
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
def test_quick_when_nothing_changed(made: Project) -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert "nothing to do" in made.setup().stderr
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1
    assert made.source("true").stderr == ""


@pytest.mark.slow
def test_activated_own_environment_is_the_same_one(made: Project) -> None:
    assert "nothing to do" in made.setup(VIRTUAL_ENV=str(made.root / ".venv")).stderr


@pytest.mark.slow
def test_changed_requirements_are_installed_by_any_script(made: Project) -> None:
    (made.root / "requirements.txt").write_text(REQUIREMENTS.replace("-e .", "stubnew>=1\n-e ."))
    assert made.source('"$PYTHON" -c "import stubnew"').returncode == 0
    assert "nothing to do" in made.setup().stderr


@pytest.mark.slow
def test_extra_for_tests_stays(made: Project) -> None:
    assert made.setup("--test").returncode == 0
    assert "stubtest" in made.versions()
    assert "nothing to do" in made.setup().stderr


@pytest.mark.slow
def test_removed_package_is_put_back(made: Project) -> None:
    shutil.rmtree(made.site / "stubby-1.0.dist-info")
    assert made.setup().returncode == 0
    assert "stubby" in made.versions()


@pytest.mark.slow
def test_package_cut_short_by_a_kill_is_installed_anew(made: Project) -> None:
    """pip killed before RECORD leaves a package that it takes for installed; here its module is missing too."""
    (made.site / "stubby.py").unlink()
    (made.site / "stubby-1.0.dist-info" / "RECORD").unlink()
    made.stamp.unlink()
    assert made.setup().returncode == 0
    assert (made.site / "stubby.py").exists()


@pytest.mark.slow
def test_half_made_environment_is_mended(made: Project) -> None:
    made.stamp.unlink()
    shutil.rmtree(made.site / "pip")
    result = made.setup()
    assert result.returncode == 0, result.stderr
    assert "making " in result.stderr
    assert {"torch", "stubby"} <= set(made.versions())


@pytest.mark.slow
def test_two_at_once_install_once(made: Project) -> None:
    made.stamp.unlink()
    command = ["bash", str(made.root / "scripts" / "setup.sh")]
    both = [
        subprocess.Popen(command, env=made.environ(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    texts = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert sum("[setup] done in" in text for text in texts) == 1
    if shutil.which("flock"):
        assert sum("waiting for it" in text for text in texts) == 1


@pytest.mark.slow
def test_torch_version_asked_for_once_is_kept(made: Project) -> None:
    assert made.setup(TORCH_VERSION="2.11.0").returncode == 0
    assert made.versions()["torch"] == "2.11.0"
    assert "nothing to do" in made.setup().stderr
    made.stamp.unlink()
    assert made.setup().returncode == 0
    assert made.versions()["torch"] == "2.11.0"


@pytest.mark.slow
def test_torch_out_of_range_is_refused(made: Project) -> None:
    before = made.versions()["torch"]
    assert_four_parts(made.setup(TORCH_VERSION="2.14.0"), "torch==2.14.0")
    assert made.versions()["torch"] == before


@pytest.mark.slow
def test_no_network(made: Project, tmp_path: Path) -> None:
    before = (made.root / "requirements.txt").read_text()
    (made.root / "requirements.txt").write_text(before + "nowhere>=1\n")
    assert_four_parts(made.setup(PIP_FIND_LINKS=str(tmp_path)), "network", "bash scripts/setup.sh")
    assert_four_parts(made.source("echo on", PIP_FIND_LINKS=str(tmp_path)))
    (made.root / "requirements.txt").write_text(before)
    assert made.setup().returncode == 0


def test_no_fitting_python(bare: Project) -> None:
    assert_four_parts(
        bare.setup(PYTHON_FOR_VENV="no-such-python"), "3.10 to 3.12", "no-such-python", "PYTHON_FOR_VENV="
    )
    assert not (bare.root / ".venv").exists()


def test_python_that_does_not_run_is_passed_over(bare: Project, tmp_path: Path) -> None:
    """pyenv leaves a python3.12 on the PATH that only says that there is none."""
    shim(tmp_path / "bin", "python3.12", "exit 127")
    shim(tmp_path / "bin", "python3.11", f'[ "$2" = venv ] && exit 1; exec "{sys.executable}" "$@"')
    result = bare.setup(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", PYTHON_FOR_VENV="")
    assert_four_parts(result, "python3.11 -m venv", "python3-venv")


def active_environment(folder: Path) -> Path:
    """An environment whose Python is this one and whose pip only writes down what it was asked for."""
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
    (bare.root / "requirements.txt").write_text("pytest>=1,<2\nstubtrain>=1  # on demand\n")
    active = active_environment(tmp_path / "env")
    started = time.perf_counter()
    result = bare.source('echo "$PYTHON"', **{variable: str(active)})
    assert time.perf_counter() - started < 2
    assert result.stdout.strip() == str(active / "bin" / "python")
    assert "not tested with these versions: pytest>=1,<2" in result.stderr
    assert not (bare.root / ".venv").exists()


def test_conda_base_is_left_alone(bare: Project, tmp_path: Path) -> None:
    active = active_environment(tmp_path / "env")
    extra = {"CONDA_PREFIX": str(active), "CONDA_DEFAULT_ENV": "base", "PYTHON_FOR_VENV": "no-such-python"}
    assert_four_parts(bare.setup(**extra), "no-such-python")


@pytest.mark.parametrize(("asked", "first"), [("", "-r requirements.txt"), ("2.13.1", "torch>=2,<4 torch==2.13.1")])
def test_fitting_torch_of_an_active_environment_is_kept(bare: Project, tmp_path: Path, asked: str, first: str) -> None:
    (bare.root / "requirements.txt").write_text("torch>=2,<4\n")
    active = active_environment(tmp_path / "env")
    bare.setup(VIRTUAL_ENV=str(active), TORCH_VERSION=asked)
    calls = [line.partition("check ")[2] for line in (active / "pip.txt").read_text().splitlines() if "install" in line]
    assert calls[0] == first


def test_python_of_an_active_environment_must_fit(bare: Project, tmp_path: Path) -> None:
    shim(tmp_path / "env" / "bin", "python", "[ $1 = --version ] && echo Python 3.9.1; exit 1")
    assert_four_parts(bare.setup(VIRTUAL_ENV=str(tmp_path / "env")), "Python 3.9.1", "deactivate")


def test_unknown_option(bare: Project) -> None:
    assert_four_parts(bare.setup("--tests"), "--tests")


def test_help_names_the_settings(bare: Project) -> None:
    help_text = bare.setup("--help").stdout
    assert {"--test", "TORCH_VERSION", "PYTHON_FOR_VENV"} <= set(help_text.replace("[", " ").replace("]", " ").split())
