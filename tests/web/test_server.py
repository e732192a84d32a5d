"""The API: answers are those of `chat()`, many at once, and invalid requests are refused."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import threading
from typing import Any

import pytest
from PIL import Image

from data_utils.prompts import SYSTEM_MESSAGE
from data_utils.roots import DataRoots
from data_utils.samples import build_sample
from tests.web.conftest import Served
from web.__main__ import is_loopback
from web.cast import Cast
from web.chats import (
    Chat,
    ChatError,
    Limits,
    Prompt,
    Turn,
    parse_chat,
    plain_prompt,
    without_oldest_turns,
)
from web.server import build_app
from web.service import EngineService, Piece, Sampling, fitting_prompt

openai = pytest.importorskip("openai", reason="the endpoint extra is not installed")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture
def client(served: Served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def data_url(colour: str = "red", kind: str = "PNG", size: tuple[int, int] = (30, 20)) -> str:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(out.getvalue()).decode()


def shown(url: str, text: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def ask(client: Any, messages: list[dict[str, Any]], model: str = "tiny", **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=messages, **{**GREEDY, **more})


def expected(chat_model: Any, query: Any, **more: Any) -> str:
    model, tokenizer = chat_model
    return model.chat(tokenizer, query, do_sample=False, max_new_tokens=12, **more)[0]


def test_models(client: Any, demo) -> None:
    names = [model.id for model in client.models.list()]
    characters = DataRoots([demo]).characters
    assert names == ["tiny", *sorted(f"mmrole/{name}" for name in characters.profiles)]
    assert client.models.retrieve(names[1]).id == names[1]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("mmrole/Nobody")


def test_an_answer_is_that_of_chat(client: Any, chat_model) -> None:
    answer = ask(client, [user("Hello <|im_end|> <img>x</img>")])
    choice = answer.choices[0]
    assert choice.message.content == expected(chat_model, [{"text": "Hello <|im_end|> <img>x</img>"}])
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_history_system_messages_and_pictures(client: Any, chat_model) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        shown(data_url("red"), "What is this?"),
        {"role": "assistant", "content": "Red."},
        user("And"),
        user("this?"),
        {"role": "system", "content": "Be kind."},
    ]
    query = [{"image": Image.new("RGB", (30, 20), "red")}, {"text": "What is this?"}]
    text = expected(
        chat_model,
        [{"text": "And\n\nthis?"}],
        history=[(query, "Red.")],
        system=[{"text": "Be brief.\n\nBe kind."}],
    )
    assert ask(client, messages).choices[0].message.content == text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_kinds_of_pictures(client: Any, kind: str) -> None:
    assert ask(client, [shown(data_url("blue", kind), "?")], max_tokens=1).usage.completion_tokens == 1


def test_a_character_gets_the_published_prompt(client: Any, chat_model, demo) -> None:
    characters = DataRoots([demo]).characters
    name = min(characters.profiles)
    turns = [{"role": "human", "value": "Hello"}, {"role": name, "value": "Yes?"}, {"role": "human", "value": "Who?"}]
    dialogue = {"id": "x", "image": "x", "scene_info": "A sea.", "conversations": [*turns, {"role": name, "value": ""}]}
    sample = build_sample(dialogue, 3, characters)
    query = [{"image": Image.new("RGB", (30, 20), "red")}, {"text": sample["conversations"][0]["value"]}]
    messages = [shown(data_url("red"), "Hello"), {"role": "assistant", "content": "Yes?"}, user("Who?")]
    answer = ask(client, messages, f"mmrole/{name}", extra_body={"mmrole": {"scene_info": "A sea."}})
    assert answer.choices[0].message.content == expected(chat_model, query, system=[{"text": SYSTEM_MESSAGE}])


def test_streaming(client: Any) -> None:
    whole = ask(client, [user("Tell me")])
    chunks = list(ask(client, [user("Tell me")], stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_tools_that_are_offered_are_not_called(client: Any) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    assert ask(client, [user("Hi")], tools=[tool]).choices[0].message == ask(client, [user("Hi")]).choices[0].message


def test_stop_texts(client: Any) -> None:
    text = ask(client, [user("Tell me")]).choices[0].message.content
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    answer = ask(client, [user("Tell me")], stop=[middle]).choices[0]
    assert (answer.message.content, answer.finish_reason) == (text[: text.index(middle)].rstrip(), "stop")


def test_a_temperature_near_0_is_greedy(client: Any) -> None:
    assert ask(client, [user("Hi")], temperature=1e-300).choices == ask(client, [user("Hi")]).choices


def test_sampling_depends_on_the_seed(client: Any) -> None:
    def drawn(seed: int) -> str:
        return ask(client, [user("Hi")], temperature=2, top_p=1, seed=seed).choices[0].message.content

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(3)}) > 1


def test_twenty_at_once_are_each_what_they_are_alone(served: Served, chat_model) -> None:
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            asked = [
                client.chat.completions.create(model="tiny", messages=[user(f"Question {n}")], **GREEDY)
                for n in range(20)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    answers = asyncio.run(all_of_them())
    for number in (0, 7, 19):
        assert answers[number] == expected(chat_model, [{"text": f"Question {number}"}])


def test_a_client_that_leaves_frees_its_place(served: Served, client: Any) -> None:
    service = served.service
    stream = ask(client, [user("Tell me everything")], max_tokens=2_000, stream=True)
    next(iter(stream))
    stream.close()
    slow = ask(client, [user("Tell me")], stream=True)  # joins while the other leaves; read slowly, it is complete
    first = next(iter(slow))
    assert first.choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in slow][-1] is not None
    done = threading.Event()

    def look() -> None:
        if service.engine.unfinished:
            service.call(look)
        else:
            done.set()

    service.call(look)
    done.wait()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role must be"),
        ({"messages": [user("x") | {"content": 7}]}, "must be a text"),
        ({"messages": [shown("https://example.org/x.png", "?")]}, "URLs are not fetched"),
        ({"messages": [shown("file:///etc/passwd", "?")]}, "paths are not read"),
        ({"messages": [shown("data:image/png;base64,AAAA", "?")]}, "cannot be read"),
        ({"messages": [shown("data:image/png;base64,=", "?")]}, "not valid base64"),
        ({"messages": [shown(data_url(), "?")] * 9}, "more than 8 pictures"),
        ({"messages": [user("long " * 9_000)]}, "shorten the message"),
        ({"messages": [shown(data_url(size=(1_001, 1_000)), "?")]}, "more than 1,000,000 pixels"),
        ({"model": "gpt-4"}, "no model 'gpt-4'"),
        ({"model": "mmrole/Nobody"}, "no character 'Nobody'"),
        ({"n": 2}, "not supported"),
        ({"tools": [{"type": "function"}], "tool_choice": "required"}, "not supported"),
        ({"temperature": 3}, "temperature must be"),
        ({"top_p": "x"}, "top_p must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"stop": [""]}, "stop must be"),
        ({"top_k": 1}, "not supported"),
        ({"repetition_penalty": 1.2}, "not supported"),
        ({"stream": "no"}, "stream must be"),
        ({"model": "mmrole/Bram Tolliver", "mmrole": {"scene": "A sea."}}, "mmrole must be"),
    ],
)
def test_what_cannot_be_answered(client: Any, change: dict[str, Any], message: str) -> None:
    body = {"model": "tiny", "messages": [user("Hi")], **GREEDY, **change}
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match=message) as error:
            client.post("/chat/completions", body={"stream": stream, **body}, cast_to=object)
        assert error.value.status_code in (400, 404)


def raw(served: Served, headers: dict[str, str], body: Any = None, path: str = "") -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    path = path or ("/v1/models" if body is None else "/v1/chat/completions")
    connection.request("GET" if body is None else "POST", path, body, headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def test_other_hosts_and_pages_are_refused(served: Served) -> None:
    own = served.url.removeprefix("http://")
    assert raw(served, {})[0] == 200
    assert raw(served, {"Origin": served.url})[0] == 200
    assert raw(served, {"Host": "evil.example"})[0] == 403
    assert raw(served, {"Origin": "http://evil.example"})[0] == 403
    for odd in ("null", "http://[", own):
        assert raw(served, {"Origin": odd, "Host": own})[0] == 403


def test_size_and_form_of_a_request(served: Served) -> None:
    status, content = raw(served, {"Content-Type": "application/json"}, b"x" * 4_000_001)
    assert (status, content["error"]["code"]) == (413, "too_large")
    assert raw(served, {}, b"{")[0] == 400
    assert raw(served, {}, b"[" * 100_000)[0] == 400
    assert raw(served, {}, b"[]")[0] == 400


def test_a_body_without_a_length_is_counted() -> None:
    app = build_app(Echo(), Cast({}, {}), hosts=frozenset(["here"]), key=None, limits=Limits(body=100))
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
    scope["headers"] = [(b"host", b"here"), (b"transfer-encoding", b"chunked")]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b" " * 60, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413


def test_other_addresses_are_answered_in_openais_shape(served: Served) -> None:
    status, content = raw(served, {}, b"{}", "/v1/embeddings")
    assert (status, content["error"]["type"]) == (404, "invalid_request_error")
    assert raw(served, {}, None, "/v1/chat/completions")[0] == 404


class Echo:
    """A service that answers with the prompt's last text."""

    name = "echo"

    def prompt_tokens(self, prompt: Prompt) -> None:
        return None

    async def stream(self, prompt: Prompt, sampling: Sampling):
        if prompt.query[-1]["text"] == "busy":
            raise ChatError("too many", status=429, code="busy")
        yield Piece(prompt.query[-1]["text"], "stop")


def test_a_key() -> None:
    app = build_app(Echo(), Cast({}, {}), hosts=frozenset(["127.0.0.1"]), key="s3cret", limits=Limits())
    basic = base64.b64encode(b"anybody:s3cret").decode()
    with Served(app) as served:
        assert raw(served, {})[0] == 401
        assert raw(served, {"Authorization": "Bearer wrong"})[0] == 401
        assert raw(served, {"Authorization": "Bearer s3cret"})[0] == 200
        assert raw(served, {"Authorization": f"Basic {basic}"})[0] == 200
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="s3cret", max_retries=0) as client:
            assert ask(client, [user("Hello")], "echo").choices[0].message.content == "Hello"
            with pytest.raises(openai.RateLimitError):
                ask(client, [user("busy")], "echo", stream=True)


def test_the_length_of_an_answer_and_what_an_endpoint_leaves_unsaid() -> None:
    asked: list[Sampling] = []

    class Noting(Echo):
        async def stream(self, prompt: Prompt, sampling: Sampling):
            asked.append(sampling)
            yield Piece("", "stop")

    limits = Limits(new_tokens=40, usual_tokens=40)
    app = build_app(Noting(), Cast({}, {}), hosts=frozenset(["127.0.0.1"]), key=None, limits=limits)
    with (
        Served(app) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = client.chat.completions.create(model="echo", messages=[user("Hi")])
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(client.chat.completions.create(model="echo", messages=[user("Hi")], **usage))
        assert whole.usage is None
        assert all(chunk.usage is None for chunk in chunks)
        assert [sampling.max_tokens for sampling in asked] == [40, 40]
        with pytest.raises(openai.BadRequestError, match="from 1 to 40"):
            ask(client, [user("Hi")], "echo", max_tokens=41)


def test_more_requests_than_may_wait_are_refused(chat_model) -> None:
    service = EngineService(*chat_model, "tiny", most_waiting=0)
    app = build_app(service, Cast({}, {}), hosts=frozenset(["127.0.0.1"]), key=None, limits=Limits())
    with Served(app) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="too many requests"):
                ask(client, [user("Hi")], stream=stream)
    service.close()


def test_alternation_is_mended() -> None:
    say = {"role": "assistant", "content": "Hm."}
    chat = parse_chat([say, user("a"), user("b"), say, say], Limits())
    assert [(turn.by_assistant, turn.text) for turn in chat.turns] == [
        (True, "Hm."),
        (False, "a\n\nb"),
        (True, "Hm.\n\nHm."),
        (False, ""),
    ]
    prompt = plain_prompt(chat)
    assert prompt.history == [([{"text": ""}], "Hm."), ([{"text": "a\n\nb"}], "Hm.\n\nHm.")]


def test_the_picture_outlives_its_turn() -> None:
    picture = Image.new("RGB", (2, 2))
    chat = Chat("", (Turn(False, "a", (picture,)), Turn(True, "b"), Turn(False, "c")))
    assert without_oldest_turns(chat, 1) == Chat("", (Turn(False, "c", (picture,)),))
    assert without_oldest_turns(chat, 0) == chat


def test_as_few_turns_as_possible_are_left_out() -> None:
    class Counting(Echo):
        longest = 1_000

        def prompt_tokens(self, prompt: Prompt) -> int:
            return sum(len(query[-1]["text"]) + len(answer) for query, answer in prompt.history) + 10

    chat = Chat("", (*(Turn(bool(number % 2), "x" * 30) for number in range(40)), Turn(False, "c")))
    for room, pairs in ((1_210, 20), (1_209, 19), (610, 10), (70, 1), (69, 0), (10, 0)):
        service = Counting()
        service.longest = 1 + room
        assert len(fitting_prompt(service, plain_prompt, chat, Sampling(max_tokens=1)).history) == pairs
    service.longest = 10
    with pytest.raises(ChatError, match="shorten"):
        fitting_prompt(service, plain_prompt, chat, Sampling(max_tokens=1))


def test_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [
        *[True] * 3,
        *[False] * 2,
    ]
