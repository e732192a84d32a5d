"""The rules of the repository: its layout, its imports, no side effects on import, no remote code."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    *("finetune", "eval", "inference.py", "inference.sh", "qwen_vl", "data_utils", "scripts", "web", "model_weights"),
    *("requirements.txt", "README.md", "LICENSE", "tests", "pyproject.toml", ".ci", ".gitignore", ".gitattributes"),
}
MAY_BE_THERE = {"docs", "requirements-reference.txt"}
MAY_IMPORT = {
    "qwen_vl": set(),
    "data_utils": {"qwen_vl"},
    "finetune": {"qwen_vl", "data_utils"},
    "eval": {"qwen_vl", "data_utils"},
    "web": {"qwen_vl", "data_utils"},
}
# A script may import the ones beside it: Python looks into a script's own folder first.
SIBLINGS = {path.stem for path in (ROOT / "scripts").glob("*.py")} | {"reference"}  # what scripts import
LEAVES = {"inference", "scripts", "tests"}
ONLY_WHERE_USED = {"deepspeed", "peft", "gradio", "openai", "wandb", "bitsandbytes", "flash_attn", "vllm"}
NEVER = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "transformers_stream_generator",
    "torchvision",
}
PACKAGE_OF = {"PIL": "pillow"}
# vLLM runs in a separate environment and finds this folder by its entry point; nothing else imports it.
PLUGIN = ROOT / "qwen_vl" / "vllm_plugin"
PAGE = ROOT / "web" / "page.py"  # imported when a page is made

SOURCES = sorted(
    [
        path
        for folder in [*MAY_IMPORT, "scripts", "inference.py"]
        for path in ([ROOT / folder] if folder.endswith(".py") else (ROOT / folder).rglob("*.py"))
    ]
)
SHELL = sorted([*ROOT.glob("*.sh"), *(p for d in [*MAY_IMPORT, "scripts"] for p in (ROOT / d).rglob("*.sh"))])
SHELL.append(ROOT / ".ci" / "run")
SOURCED = ("basics.sh", "environment.sh", "launch.sh")  # read by the other scripts, not run


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """The top-level names of all modules imported anywhere in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def imports_at_load(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run when the file is imported: those inside functions are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_at_load(child)


def not_ours(node: ast.Import | ast.ImportFrom) -> bool:
    return getattr(node, "level", 0) == 0 and not set(imports(node)) & (MAY_IMPORT.keys() | LEAVES | SIBLINGS)


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, str], int]]:
    """Each call's dotted name, its keyword arguments as source, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
            yield ast.unparse(node.func), keywords, node.lineno


def test_top_level() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("!")]
    names = {path.name for path in ROOT.iterdir()} - {".git"}
    there = {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert there - MAY_BE_THERE == TOP_LEVEL


def test_every_folder_of_a_package_gets_installed() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    for package in MAY_IMPORT:
        assert f'"{package}*"' in settings
        assert all(
            (path.parent / "__init__.py").is_file() for path in SOURCES if name_of(path).startswith(f"{package}/")
        )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    forbidden = LEAVES | (MAY_IMPORT.keys() - MAY_IMPORT.get(package, MAY_IMPORT.keys()) - {package})
    found = set(imports(parsed(path)))
    assert not found & forbidden
    assert not found & NEVER
    needed = {"vllm"} if path.parent == PLUGIN and path.name != "__init__.py" else {"gradio"} if path == PAGE else set()
    at_load = {name for node in imports_at_load(parsed(path)) for name in imports(node)}
    assert not at_load & (ONLY_WHERE_USED - needed)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent != PLUGIN], ids=name_of)
def test_nobody_imports_the_vllm_plugin(path: Path) -> None:
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [ast.unparse(node) for node in nodes if "vllm_plugin" in ast.unparse(node)]


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_modules(path: Path) -> set[str]:
    """The modules of this project that a file imports, anywhere in it; for `from package import name`, the package."""
    modules = {module_of(source) for source in SOURCES}
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= below or {node.module}
    return found & modules - {module_of(path)}


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


TOOLS = {f"data_utils.{path.parent.name}" for path in (ROOT / "data_utils").glob("*/__init__.py")}
# What a room of `eval` may import of `eval`, besides itself. Entry scripts and faces may import all of them.
EVAL_ROOMS = {
    "eval.judging": (),
    "eval.backends": (),
    "eval.running": ("eval.backends.backend",),
    "eval.results": ("eval.judging.",),
}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_rooms_import_only_what_is_below(path: Path) -> None:
    own = room(module_of(path))
    for module in imported_modules(path):
        if room(module) in TOOLS and room(module) != own:
            assert (own, room(module)) == ("data_utils.demo", "data_utils.build") or own in LEAVES, (
                f"{name_of(path)} imports {module}: a tool is imported by no other part of the packages"
            )
        if own in EVAL_ROOMS and module.startswith("eval.") and room(module) != own:
            assert module.startswith(EVAL_ROOMS[own]), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_main_files_hold_flags_only(path: Path) -> None:
    """Modules that others import have a descriptive name."""
    assert not [module for module in imported_modules(path) if module.endswith(".__main__")]


def test_one_file_reads_profiles_and_roles() -> None:
    readers = set()
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "data_utils.schema":
                readers |= {name_of(path) for alias in node.names if alias.name in {"Profiles", "Roles", "Annotation"}}
    assert readers == {"data_utils/roots.py", "data_utils/check/dialogues.py"}  # the latter checks annotations by row


def test_imports_make_no_circle() -> None:
    arrows = {module_of(path): imported_modules(path) for path in SOURCES}
    while free := {module for module, below in arrows.items() if not below & arrows.keys()}:
        arrows = {module: below for module, below in arrows.items() if module not in free}
    assert not arrows, f"these import each other in a circle, or one that does: {sorted(arrows)}"


def requirements() -> dict[str, str]:
    """The packages of pyproject.toml, extras included, and their versions."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = text[text.index("dependencies = [") : text.index("[project.entry-points")]
    return dict(re.findall(r'"([a-z0-9_-]+)([<>=][^"]+)"', project))


def test_imported_packages_are_required() -> None:
    found = {name for path in SOURCES for name in imports(parsed(path))}
    others = found - sys.stdlib_module_names - MAY_IMPORT.keys() - LEAVES - SIBLINGS
    assert {PACKAGE_OF.get(name, name) for name in others} <= requirements().keys()


def test_every_requirement_has_both_ends() -> None:
    versions = requirements()
    assert {"torch", "deepspeed", "openai", "pytest"} <= versions.keys()
    tools = ("ruff", "setuptools")  # one exact version formats; any setuptools builds
    assert all(re.match(r">=[\d.]+,<[\d.]+$", version) for name, version in versions.items() if name not in tools)
    assert "torchvision" not in versions


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_remote_code_and_no_pickles(path: Path) -> None:
    for function, keywords, line in calls(parsed(path)):
        assert keywords.get("trust_remote_code", "False") == "False", f"{name_of(path)}:{line}"
        assert keywords.get("allow_pickle", "False") == "False", f"{name_of(path)}:{line}"
        if function == "torch.load":
            assert keywords.get("weights_only") == "True", f"{name_of(path)}:{line}"
        assert function not in {"eval", "exec", "os.system"}, f"{name_of(path)}:{line}"


@pytest.mark.parametrize("path", SHELL, ids=name_of)
def test_shell_scripts(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# ")
    start = lines.index("set -euo pipefail")
    if path.name not in SOURCED:  # `sh script`: the first command, before what only bash can read
        assert lines[start - 1] == '[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # under sh too'
        assert all(line.startswith("#") or not line for line in lines[: start - 1])
    subprocess.run(["bash", "-n", path], check=True)


def test_ci_script_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_architecture_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = "|".join(MAY_IMPORT)
    named = set(re.findall(rf"`((?:{packages}|scripts|tests)/[\w./]*)`", text))
    assert len(named) > 20
    assert not {name for name in named if not (ROOT / name).exists()}


# Run in a separate process: imports every module and reports side effects. Other packages are imported before, because
# their side effects are not ours.
WATCH = """
    import importlib, json, os, random, sys
    import numpy, torch
    for statement in json.loads(sys.argv[2]):
        exec(statement, {})
    done, watching = [], True
    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event, arguments):
        if not watching:
            return
        if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
            done.append([event, repr(arguments)])
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.system", "subprocess.Popen"):
            done.append([event, repr(arguments)])
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            done.append([event, repr(arguments)])

    def state():
        numbers = numpy.random.get_state()
        return {
            "random": hash(random.getstate()),
            "numpy": hash(numbers[1].tobytes()),
            "torch": hash(bytes(torch.get_rng_state().tolist())),
            "cuda": torch.cuda.is_initialized(),
            "grad": torch.is_grad_enabled(),
            "dtype": str(torch.get_default_dtype()),
            "environment": dict(os.environ),
        }

    sys.addaudithook(hook)
    before = state()
    for module in json.loads(sys.argv[1]):
        importlib.import_module(module)
    watching = False
    after = state()
    done += [[name, f"{before[name]} became {after[name]}"] for name in before if before[name] != after[name]]
    print(json.dumps(done))
"""


def test_nothing_happens_on_import(tmp_path: Path) -> None:
    installed_apart = {path for path in SOURCES if path.parent == PLUGIN and path.name != "__init__.py"} | {PAGE}
    paths = [path for path in SOURCES if path not in installed_apart]
    modules = [name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]
    nodes = [node for path in paths for node in imports_at_load(parsed(path))]
    others = {ast.unparse(node) for node in nodes if not_ours(node)}
    command = [sys.executable, "-B", "-c", textwrap.dedent(WATCH), json.dumps(modules), json.dumps(sorted(others))]
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o555)
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    environ = {**os.environ, **offline, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}", "HOME": str(tmp_path)}
    result = subprocess.run(command, cwd=empty, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == []
    assert list(empty.iterdir()) == []
