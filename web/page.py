"""The page: choose a character, show it pictures, talk with it, save the chat as a dialogue."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio import processing_utils
from PIL import Image

from data_utils.errors import MMRoleError
from data_utils.prompts import CURIOUS_HUMAN, ImageInformation
from web.cast import Cast
from web.chats import (
    PLAIN_PICTURE,
    Chat,
    ChatError,
    Limits,
    Prompt,
    Scene,
    Turn,
    read_picture,
    role_play,
)
from web.dialogues import save_dialogue
from web.service import Sampling, Service, fitting_prompt

_TITLE = "MMRole"
_LONGEST_PROFILE = 1_500  # characters that are shown
_KNOWN = ("who is in it", "where it is", "what happens")
_MOST_TALK = 12  # turns of two characters between themselves
_CSS = """
#chat { min-height: 55vh; }
#chat img { max-height: 260px; width: auto; }
#chat button[title="Share"], #chat button[aria-label="Share"] { display: none; }
.status, .status * { color: #b91c1c; font-weight: 600; }
@media (prefers-color-scheme: dark) { .status, .status * { color: #fca5a5; } }
@media (max-width: 640px) { #chat { min-height: 45vh; } button.sm { min-height: 2.5rem; } }
"""
# The margin of the page; Gradio applies the styles above to its content only.
_HEAD = "<style>@media (max-width: 640px) { .gradio-container .app { padding: 8px !important; } }</style>"


class Visit:
    """The state of one person's page, in the server's memory for the time of the visit.

    Attributes:
        turns: The turns, with the chosen character as the assistant.
        files: The pictures by their ids, each with the file that shows it. It holds them, so that no other gets the id.
        folder: The folder of these files, deleted after the visit.
    """

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.files: dict[int, tuple[Image.Image, str]] = {}
        self.folder: Path | None = None

    def file_of(self, picture: Image.Image, people: Path) -> str:
        """Return the file that shows a picture."""
        if id(picture) not in self.files:
            self.folder = self.folder or people / secrets.token_hex(16)
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{secrets.token_hex(8)}.png"
            picture.save(path)
            self.files[id(picture)] = picture, str(path)
        return self.files[id(picture)][1]

    def show(self, turn: Turn, by: str, people: Path) -> list[dict[str, Any]]:
        """Return a turn as messages of the chat window."""
        files = [self.file_of(picture, people) for picture in turn.pictures]
        contents: list[Any] = [{"path": file, "alt_text": f"shown by {by}"} for file in files]
        if turn.text:
            contents.append(turn.text)
        return [{"role": "assistant" if turn.by_assistant else "user", "content": content} for content in contents]

    def clear(self) -> None:
        """Begins a new chat; the pictures of this one go."""
        self.turns.clear()
        self.files.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class Page:
    """The behaviour of the page, without its layout.

    Args:
        service: Writes the answers.
        cast: The characters.
        uploads: A private folder for the pictures of all visits.
        save_to: The data root into which chats are saved, or None.
        limits: The limits of a message.
    """

    def __init__(
        self,
        service: Service,
        cast: Cast,
        uploads: Path,
        save_to: Path | None,
        limits: Limits,
    ) -> None:
        self.service, self.cast, self.uploads, self.limits = service, cast, uploads, limits
        self.save_to = save_to

    def scene(self, character: str, partner: str, *information: str) -> Scene:
        """Return the scene; `information` is what is known about the picture: who, where, and what happens."""
        other = None if partner == CURIOUS_HUMAN else self.cast.role(partner)
        return Scene(self.cast.role(character), other, ImageInformation(*(text or "" for text in information)))

    def window(self, visit: Visit, character: str, partner: str) -> list[dict[str, Any]]:
        """Return the messages of the chat window."""
        return [
            message
            for turn in visit.turns
            for message in visit.show(turn, character if turn.by_assistant else partner, self.uploads)
        ]

    def prompt(self, turns: Sequence[Turn], scene: Scene, sampling: Sampling | None = None) -> Prompt:
        """Return the prompt of the next answer."""
        picture = self.first_picture(scene)
        chat = Chat("", tuple(turns))
        return fitting_prompt(
            self.service, lambda shorter: role_play(scene, shorter, picture), chat, sampling or Sampling()
        )

    def first_picture(self, scene: Scene) -> Image.Image:
        """Return what the character sees until the chat shows a picture."""
        found = self.cast.first_picture(scene.role.name)
        return found[0] if found else PLAIN_PICTURE

    def gallery(self, character: str) -> list[tuple[Image.Image, str]]:
        """Return a character's pictures with their names; a grey one for each that cannot be read."""
        shown = []
        for picture in self.cast.pictures_of(character):
            try:
                shown.append((picture.open(), picture.name))
            except ChatError as error:
                shown.append((PLAIN_PICTURE, error.message))
        return shown

    def take(self, visit: Visit, message: dict[str, Any], picture: Any) -> None:
        """Add a person's message, with uploaded pictures and a chosen one.

        Raises:
            ChatError: An upload is not a picture. Uploads are deleted in any case.
        """
        pictures = [picture] if picture is not None else []
        for upload in message.get("files") or []:
            path = Path(upload if isinstance(upload, str) else upload["path"])
            try:
                pictures.append(read_picture(path.read_bytes(), self.limits, "upload"))
            except OSError as error:
                raise ChatError(f"the upload cannot be read: {error.strerror}", "upload") from None
            finally:
                path.unlink(missing_ok=True)
        visit.turns.append(Turn(False, (message.get("text") or "").strip(), tuple(pictures)))

    async def answer(self, visit: Visit, scene: Scene, *, by_assistant: bool = True) -> AsyncIterator[None]:
        """Let the scene's role speak; the visit's last turn grows by one piece of text per step.

        Args:
            visit: The visit, with turns from the chosen character's side.
            scene: The scene, whose role speaks.
            by_assistant: False if the partner, another character, speaks.
        """
        turns = visit.turns if by_assistant else [_swapped(turn) for turn in visit.turns]
        if turns and turns[-1].by_assistant:
            turns = [*turns, Turn(False, "")]
        sampling = Sampling(max_tokens=self.limits.usual_tokens)
        prompt = await asyncio.to_thread(self.prompt, turns, scene, sampling)
        said = Turn(by_assistant, "")
        visit.turns.append(said)
        try:
            async with aclosing(self.service.stream(prompt, sampling)) as pieces:
                async for piece in pieces:
                    if not visit.turns or visit.turns[-1] is not said:
                        return  # the turn was taken back or cleared meanwhile
                    visit.turns[-1] = said = replace(said, text=said.text + piece.text)
                    yield
        finally:
            if visit.turns and visit.turns[-1] is said and not said.text:
                visit.turns.pop()  # stopped before the first word


def _swapped(turn: Turn) -> Turn:
    return replace(turn, by_assistant=not turn.by_assistant)


def mount_page(app: FastAPI, page: Page) -> FastAPI:
    """Mount the page at `/` of the API's app."""
    names = list(page.cast.roles)
    first = names[0] if names else None

    with gr.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        visit = gr.State(Visit(), time_to_live=24 * 3600, delete_callback=Visit.clear)
        chosen = gr.State(None)  # number of the character's picture to show with the next message
        filled = gr.State(("", "", ""))  # the annotation of the character's picture, unless it was changed
        with gr.Row():
            character = gr.Dropdown(names, value=first, label="Character", filterable=True, min_width=240)
            partner = gr.Dropdown(
                [CURIOUS_HUMAN, *names], value=CURIOUS_HUMAN, label="talks with", filterable=True, min_width=240
            )
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                chat = gr.Chatbot(
                    elem_id="chat", label="Chat", buttons=["copy"], allow_tags=False, render_markdown=False,
                    placeholder="Say something, or let the character begin.", height="60vh",
                )  # fmt: skip
                status = gr.Markdown("", elem_classes="status", visible=False)
                message = gr.MultimodalTextbox(
                    placeholder="Write a message; add or paste a picture", show_label=False, label="Message",
                    sources=["upload"], file_types=["image"], file_count="multiple", autofocus=True,
                )  # fmt: skip
                with gr.Row():
                    begin = gr.Button("Let it begin", min_width=100, size="sm")
                    stop = gr.Button("Stop", variant="stop", min_width=60, size="sm")
                    again = gr.Button("Again", min_width=60, size="sm")
                    edit = gr.Button("Edit last", min_width=80, size="sm")
                    clear = gr.Button("New chat", min_width=80, size="sm")
                    talk = gr.Button("Let both talk", min_width=110, size="sm", visible=False)
            with gr.Column(scale=1, min_width=260):
                portrait = gr.Image(
                    show_label=False, height=180, interactive=False, buttons=[], label="Portrait", type="pil"
                )
                with gr.Accordion("Pictures of this character", open=False):
                    gallery = gr.Gallery(
                        columns=2, height=220, label="Choose one to show it next", allow_preview=False,
                        interactive=False, type="pil",
                    )  # fmt: skip
                    next_picture = gr.Markdown()
                    known = [gr.Textbox(label=f"Known about the picture: {what}") for what in _KNOWN]
                about = gr.Markdown()
                with gr.Accordion("The exact prompt", open=False):
                    look = gr.Button("Show the prompt of the next answer", size="sm")
                    exact = gr.Textbox(show_label=False, label="Prompt", lines=8, max_lines=20, interactive=False)
                with gr.Accordion("Save as a dialogue", open=False, visible=page.save_to is not None):
                    save = gr.Button("Save this chat", size="sm")
                    saved = gr.Markdown()

        people = [visit, character, partner, *known]
        window = [chat, status]

        def drawn(state: Visit, who: str, other: str, error: str = "") -> tuple[Any, Any]:
            return page.window(state, who, other), gr.Markdown(error, visible=bool(error))

        async def spoken(
            state: Visit, who: str, other: str, *about_picture: str, turns: Sequence[bool] = (True,)
        ) -> AsyncIterator[tuple[Any, Any]]:
            """Yield the chat window while one answer, or several in turn, are written."""
            try:
                scene = page.scene(who, other, *about_picture)
                for by_assistant in turns:
                    side = scene if by_assistant else scene.swapped()
                    async with aclosing(page.answer(state, side, by_assistant=by_assistant)) as steps:
                        async for _ in steps:
                            yield drawn(state, who, other)
                yield drawn(state, who, other)
            except ChatError as error:
                yield drawn(state, who, other, f"That did not work: {error.message}")

        async def send(state: Visit, who: str, other: str, *given: Any) -> AsyncIterator[tuple[Any, ...]]:
            *about_picture, said, number, known_of_own = given
            same = (gr.skip(),) * (3 + len(known))
            if not (said.get("text") or "").strip() and not said.get("files") and number is None:
                yield *drawn(state, who, other, "The message is empty."), *same
                return
            if said.get("files") and number is None and tuple(about_picture) == tuple(known_of_own):
                about_picture = [""] * len(known)  # that was another picture
            try:
                picture = None if number is None else page.cast.pictures_of(who)[number].open()
                await asyncio.to_thread(page.take, state, said, picture)
            except ChatError as error:
                yield *drawn(state, who, other, error.message), *same
                return
            yield *drawn(state, who, other), gr.MultimodalTextbox(value=None), None, "", *about_picture
            async for seen in spoken(state, who, other, *about_picture):
                yield *seen, *same

        async def start(*given: Any) -> AsyncIterator[tuple[Any, ...]]:
            given[0].clear()
            async for seen in spoken(*given):
                yield seen

        async def repeat(state: Visit, *given: Any) -> AsyncIterator[tuple[Any, ...]]:
            if state.turns and state.turns[-1].by_assistant:
                before, rest = state.turns.pop(), list(state.turns)
                try:
                    async for seen in spoken(state, *given):
                        yield seen
                finally:
                    if state.turns == rest:
                        state.turns.append(before)  # stopped before the first word
            else:
                yield drawn(state, *given[:2], "There is no answer to rewrite.")

        async def both(state: Visit, *given: Any) -> AsyncIterator[tuple[Any, ...]]:
            last = state.turns[-1].by_assistant if state.turns else False
            turns = [bool((number + last) % 2) for number in range(1, _MOST_TALK + 1)]
            async for seen in spoken(state, *given, turns=turns):
                yield seen

        def take_back(state: Visit, who: str, other: str, *_: str) -> tuple[Any, ...]:
            while state.turns and state.turns[-1].by_assistant:
                state.turns.pop()
            last = state.turns.pop() if state.turns else Turn(False, "")
            files = [state.file_of(picture, page.uploads) for picture in last.pictures]
            return *drawn(state, who, other), gr.MultimodalTextbox(value={"text": last.text, "files": files})

        def choose(state: Visit, who: str, other: str, *_: str) -> tuple[Any, ...]:
            state.clear()
            first = page.cast.first_picture(who) if who else None
            texts = _texts(first[1]) if first else ("", "", "")
            return (
                *drawn(state, who, other), first[0] if first else None, _about(page, who), page.gallery(who),
                None, gr.Button(visible=other != CURIOUS_HUMAN), "", "", texts, *texts,
            )  # fmt: skip

        def choose_picture(who: str, event: gr.SelectData) -> tuple[Any, ...]:
            texts = _texts(page.cast.pictures_of(who)[event.index].information)
            return event.index, "This picture is shown with your next message.", texts, *texts

        def show_prompt(state: Visit, who: str, other: str, *about_picture: str) -> str:
            try:
                prompt = page.prompt(state.turns, page.scene(who, other, *about_picture))
            except ChatError as error:
                return error.message
            words = "\n".join(element.get("text", "Picture 1: (the picture)") for element in prompt.query)
            return f"{prompt.system}\n\n{words}"

        def keep(state: Visit, who: str, other: str, *about_picture: str) -> str:
            assert page.save_to is not None
            try:
                scene = page.scene(who, other, *about_picture)
                path = save_dialogue(page.save_to, scene, state.turns, page.first_picture(scene))
            except (ChatError, MMRoleError) as error:
                return f"Not saved: {error}"
            return f"Saved to `{path}`. `python -m data_utils.check {page.save_to}` checks it."

        of_picture = [chosen, next_picture, filled, *known]
        chosen_outputs = [*window, portrait, about, gallery, chosen, talk, exact, next_picture, filled, *known]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([character.change, partner.change, blocks.load], choose, people, chosen_outputs, **quiet)
        writing = [
            message.submit(
                send, [*people, message, chosen, filled], [*window, message, chosen, next_picture, *known], **quiet
            ),
            begin.click(start, people, window, **quiet),
            again.click(repeat, people, window, **quiet),
            talk.click(both, people, window, **quiet),
        ]
        stop.click(None, cancels=writing, **quiet)
        edit.click(take_back, people, [*window, message], cancels=writing, **quiet)
        gr.on([clear.click, chat.clear], choose, people, chosen_outputs, cancels=writing, **quiet)
        gallery.select(choose_picture, [character], of_picture, **quiet)
        look.click(show_prompt, people, exact, **quiet)
        save.click(keep, people, saved, **quiet)
    blocks.queue(default_concurrency_limit=None)
    # Mounted, Gradio would take any path that a client names for an upload, and fetch any URL.
    blocks.has_launched = True
    processing_utils.async_ssrf_protected_download = _no_download
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        app, blocks, path="/", footer_links=[], theme=theme, css=_CSS, head=_HEAD, ssr_mode=False,
        enable_monitoring=False, max_file_size=page.limits.body, show_error=True, pwa=False,
    )  # fmt: skip


async def _no_download(url: str, cache_dir: str) -> str:
    raise gr.Error("URLs are not fetched: upload the picture itself")


def _about(page: Page, who: str | None) -> str:
    if not who:
        return "There is no character here: give a data root (`DATA_ROOT`)."
    role = page.cast.role(who)
    profile = role.profile[:_LONGEST_PROFILE] + ("…" if len(role.profile) > _LONGEST_PROFILE else "")
    return f"**{_escaped(role.name)}** · {_escaped(role.script)}\n\n{_escaped(profile)}"


def _texts(information: ImageInformation) -> tuple[str, str, str]:
    return information.role, information.place, information.scene


def _escaped(text: str) -> str:
    """Escape HTML: profiles are plain text."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
