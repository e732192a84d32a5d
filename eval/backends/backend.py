"""The interface of every backend: prompts, completions, and the methods that a backend must have.

A backend is one module of this folder with a class `Backend`. Its name is that of its flag: `endpoint` is used when
`--endpoint` is given, and `native` otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from data_utils.errors import MMRoleError
from data_utils.flag_types import above_zero, positive, share

DEFAULT = "native"


@dataclass(frozen=True)
class Decoding:
    """How a text is generated; None leaves a setting to the model.

    Attributes:
        do_sample: False is greedy.
        temperature: Above 0.
        top_p: Above 0, at most 1.
        max_new_tokens: Limit of a text in tokens.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Add the flags that every backend understands."""
        flag = parser.add_argument
        flag("--no_random", action="store_true", help="greedy decoding instead of the model's sampling")
        flag("--temperature", type=above_zero, help="for sampling (default: the model's setting)")
        flag("--top_p", type=share, help="for sampling (default: the model's setting)")
        flag("--max_new_tokens", type=positive, help="longest text in tokens (default: the model's setting)")
        flag("--seed", type=int, default=0, help="seed from which each text's seed is derived (%(default)s)")

    @classmethod
    def of(cls, options: argparse.Namespace) -> Decoding:
        """Return the decoding that the flags ask for."""
        do_sample = False if options.no_random else None
        return cls(do_sample, options.temperature, options.top_p, options.max_new_tokens)

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for two texts in one file."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p}
        return {
            "decoding": "greedy" if self.do_sample is False else "as the checkpoint says",
            "max_new_tokens": self.max_new_tokens or "as the checkpoint says",
            **{name: value for name, value in sampling.items() if value is not None},
        }


@dataclass(frozen=True)
class Prompt:
    """A prompt to be completed.

    Attributes:
        key: Its key within its result file, from which sampling is seeded.
        row: The key of its row; prompts of one row share a prefix.
        image: The picture, a checked path; None for text alone.
        image_name: The picture's name in the data.
        system: The system message.
        text: Plain text, never read as control tags.
        id: Returned with the completion; unique within a run.
        seed: The only thing that sampling depends on; 0 to 2**63 - 1.
        decoding: How its text is generated.
    """

    key: str
    row: str
    image: Path | None
    image_name: str
    system: str
    text: str
    id: str = ""
    seed: int = 0
    decoding: Decoding = field(default_factory=Decoding)

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of everything that the model reads: 16 hexadecimal digits."""
        content = json.dumps([self.image_name, self.system, self.text])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Completion:
    """The outcome of a prompt.

    Attributes:
        id: The prompt's.
        text: The generated text; beside an error the unusable text of the attempt before, or nothing.
        error: Why there is no text, or None.
        refusal: Why the model refused to answer, in which case the text is empty; or None.
        cut: Whether the text ends at the limit of its length.
        attempt: The number of texts requested before this one.
        tokens: Paid tokens of prompt and text, if the backend counts them.
        served: The served model's name as its server reports it, if it does.
        without: Names of parameters that the served model refused, which were left out or sent differently.
    """

    id: str
    text: str
    error: str | None = None
    refusal: str | None = None
    cut: bool = False
    attempt: int = 0
    tokens: int = 0
    served: str = ""
    without: str = ""


class StoppedError(Exception):
    """A backend stopped at a limit of the user; the text says which."""


class Backend(Protocol):
    """Completes prompts; made from the flags, without loading anything yet."""

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Adds the flags of this backend; `--<module's name>` chooses it."""
        ...

    def problems(self) -> list[MMRoleError]:
        """Return every problem of the backend that can be found before anything expensive starts."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return the user's choices that change texts; runs with different identities cannot share a result file."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the facts printed beside the flags; "model at" is the place of the model."""
        ...

    def devices(self, processes: int | None) -> list[str]:
        """Return the device of each worker.

        Args:
            processes: The number of workers that the user wants; None for as many as are useful.

        Raises:
            MMRoleError: There cannot be so many.
        """
        ...

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Completion]:
        """Yield one completion per prompt, in any order, as they finish; an impossible prompt fails alone.

        Raises:
            MMRoleError: Nothing can be completed.
            StoppedError: The user's limit was reached; the rest is not completed.
        """
        ...

    def summary(self) -> str:
        """Return a one-line summary after a run."""
        ...


MakeBackend = Callable[[argparse.Namespace], Backend]


def add_backend_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of decoding and those of every backend."""
    Decoding.add_flags(parser)
    for name in _names():
        _class(name).add_flags(parser)


def backend_of(options: argparse.Namespace) -> Backend:
    """Make the backend that the flags ask for."""
    return _class(_used(options))(options)


def misplaced_flags(options: argparse.Namespace) -> list[MMRoleError]:
    """Return the flags of unused backends, which would have no effect."""
    used, problems = _used(options), []
    for name in _names():
        parser = argparse.ArgumentParser()
        _class(name).add_flags(parser)
        defaults = vars(parser.parse_args([]))
        given = [f"--{flag}" for flag, value in defaults.items() if getattr(options, flag, value) != value]
        if given and name != used:
            fix = f"leave them out, or give --{name}" if name != DEFAULT else f"leave them out, or --{used}"
            where = f"backend {used}: flags, or variables of the script"
            problems.append(MMRoleError(f"flags of the backend {name} have no effect here", given, where, fix))
    return problems


def another_model(before: str, now: str, where: object) -> MMRoleError:
    """Return the error for texts of two served models in one file."""
    fix = "ask a model of a fixed version, choose another output folder, or give --overwrite to start again"
    return MMRoleError("another model is served now; its texts would be mixed in", [before, now], where, fix)


def _used(options: argparse.Namespace) -> str:
    asked = [name for name in _names() if name != DEFAULT and getattr(options, name, None)]
    return asked[0] if asked else DEFAULT


def _names() -> list[str]:
    return sorted(
        module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name != "backend"
    )


def _class(name: str) -> Any:
    return importlib.import_module(f"eval.backends.{name}").Backend
