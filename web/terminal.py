"""Talks with a character in the terminal."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from data_utils.errors import MMRoleError
from web.cast import Cast
from web.chats import Chat, ChatError, Limits, Scene, Turn, read_picture, role_play
from web.server import fitting_prompt
from web.service import Sampling, Service

_COMMANDS = "/again writes the last answer again, /begin lets the character begin, /prompt shows the prompt, /quit ends"


def check_terminal(options: argparse.Namespace, cast: Cast) -> None:
    """Raises an error where the character or the partner is not there."""
    for flag, name in (("--character", options.character), ("--partner", options.partner)):
        if (name or flag == "--character") and name not in cast.roles:
            names = ", ".join(list(cast.roles)[:12]) or "nobody: give --data_root"
            raise MMRoleError("there is no such character", name, flag, f"choose one of: {names}")


def talk(service: Service, cast: Cast, options: argparse.Namespace, limits: Limits) -> int:
    """Reads lines and writes answers until the input ends."""
    partner = cast.role(options.partner) if options.partner else None
    scene, picture = Scene(cast.role(options.character), partner), None
    try:
        if options.image:
            picture = read_picture(options.image.read_bytes(), limits, str(options.image))
        elif own := cast.first_picture(options.character):
            picture, scene = own[0], replace(scene, information=own[1])
    except (OSError, ChatError) as error:
        raise MMRoleError(f"the picture cannot be used: {error}", options.image, "--image", "give another") from None
    print(f"{options.character} listens. {_COMMANDS}.", file=sys.stderr)
    turns: list[Turn] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return 0
        if line == "/quit":
            return 0
        if line == "/prompt":
            print(role_play(scene, Chat("", tuple(turns))).query[-1]["text"])
            continue
        if line == "/begin":
            turns.clear()
        elif line == "/again":
            if not turns:
                print("there is no answer yet", file=sys.stderr)
                continue
            if turns[-1].by_assistant:
                turns.pop()
        elif line.startswith("/"):
            print(f"there is no command {line}: {_COMMANDS}", file=sys.stderr)
            continue
        elif line:
            turns.append(Turn(False, line))
        else:
            continue
        asyncio.run(_answer(service, scene, turns, picture, Sampling(max_tokens=limits.usual_tokens)))


async def _answer(service: Service, scene: Scene, turns: list[Turn], picture: Any, sampling: Sampling) -> None:
    text = ""
    try:
        prompt = fitting_prompt(service, lambda chat: role_play(scene, chat, picture), Chat("", tuple(turns)), sampling)
        print(f"{scene.role.name}: ", end="", flush=True)
        async with aclosing(service.stream(prompt, sampling)) as pieces:
            async for piece in pieces:
                print(piece.text, end="", flush=True)
                text += piece.text
        print()
    except ChatError as error:
        print(f"\nthat did not work: {error.message}", file=sys.stderr)
        return
    turns.append(Turn(True, text))
