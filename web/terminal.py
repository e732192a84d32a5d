"""Chat with a character in the terminal."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path

from PIL import Image

from data_utils.errors import MMRoleError
from data_utils.prompts import ImageInformation
from web.cast import Cast
from web.chats import PLAIN_PICTURE, Chat, ChatError, Limits, Scene, Turn, read_picture, role_play
from web.dialogues import save_dialogue
from web.service import Sampling, Service, fitting_prompt

_COMMANDS = (
    "Ctrl-C stops an answer, /again writes the last one again, /begin lets the character begin, /picture FILE shows "
    "another picture with the next message, /prompt shows the prompt, /save keeps the chat, /quit ends."
)


def check_terminal(options: argparse.Namespace, cast: Cast) -> None:
    """Raise an error if the character or the partner does not exist."""
    for flag, name in (("--character", options.character), ("--partner", options.partner)):
        if (name or flag == "--character") and name not in cast.roles:
            names = ", ".join(list(cast.roles)[:12]) or "none: give --data_root"
            raise MMRoleError("there is no such character", name, flag, f"choose one of: {names}")


def talk(service: Service, cast: Cast, options: argparse.Namespace, limits: Limits) -> int:
    """Read lines and write answers until the input ends."""
    partner = cast.role(options.partner) if options.partner else None
    scene, picture = Scene(cast.role(options.character), partner), PLAIN_PICTURE
    if options.image:
        try:
            picture = _picture(options.image, limits)
        except ChatError as error:
            raise MMRoleError(str(error), options.image, "--image", "give another picture") from None
    elif own := cast.first_picture(options.character):
        picture, scene = own[0], replace(scene, information=own[1])
    print(f"{options.character} listens. {_COMMANDS}", file=sys.stderr)
    turns: list[Turn] = []
    shown: tuple[Image.Image, ...] = ()  # with the next message
    sampling = Sampling(max_tokens=limits.usual_tokens)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        command, _, argument = line.partition(" ") if line.startswith("/") else ("", "", "")
        try:
            if command == "/quit":
                return 0
            if command == "/prompt":
                print(role_play(scene, Chat("", tuple(turns))).query[-1]["text"])
            elif command == "/save":
                if options.save_to is None:
                    raise ChatError("--save_to names no data root to save into")
                print(f"saved to {save_dialogue(options.save_to, scene, turns, picture)}", file=sys.stderr)
            elif command == "/picture":
                shown, scene = (_picture(Path(argument), limits),), replace(scene, information=ImageInformation())
            elif command not in ("", "/again", "/begin"):
                raise ChatError(f"there is no command {command}. {_COMMANDS}")
            elif command == "/again" and not turns:
                raise ChatError("there is no answer yet")
            elif line:
                if command == "/begin":
                    turns.clear()
                elif command == "/again":
                    turns[-1:] = [] if turns[-1].by_assistant else turns[-1:]
                else:
                    turns.append(Turn(False, line, shown))
                    shown = ()
                with suppress(KeyboardInterrupt):  # stops this answer; what it said is kept
                    asyncio.run(_answer(service, scene, turns, picture, sampling))
        except (ChatError, MMRoleError) as error:
            print(f"that did not work: {error}", file=sys.stderr)


def _picture(path: Path, limits: Limits) -> Image.Image:
    try:
        return read_picture(path.read_bytes(), limits, str(path))
    except OSError as error:
        raise ChatError(f"a picture cannot be read: {error.strerror}") from None


async def _answer(service: Service, scene: Scene, turns: list[Turn], picture: Image.Image, sampling: Sampling) -> None:
    chat = Chat("", tuple(turns))
    prompt = fitting_prompt(service, lambda shorter: role_play(scene, shorter, picture), chat, sampling)
    print(f"{scene.role.name}: ", end="", flush=True)
    text = ""
    try:
        async with aclosing(service.stream(prompt, sampling)) as pieces:
            async for piece in pieces:
                print(piece.text, end="", flush=True)
                text += piece.text
    finally:
        print()
        if text:
            turns.append(Turn(True, text))
