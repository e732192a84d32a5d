"""The client of chat endpoints against a scripted server on loopback: every fault becomes data."""

import threading
from types import SimpleNamespace

import pytest

from data_utils import endpoint as module
from data_utils.endpoint import BudgetSpentError, ChatReply, ChatRequest, Endpoint, without_thinking
from data_utils.errors import MMRoleError
from tests.data_utils.loopback import SECRET, Reply, Site, completion, refusal, scripted, serving


def ask(site: Site, *requests: ChatRequest, **settings: object) -> list[ChatReply]:
    with Endpoint([f"{site.url}/v1"], "m", first_wait=0.001, **settings) as endpoint:
        futures = [endpoint.submit(request) for request in requests or [ChatRequest("hello", system="be kind")]]
        replies = [future.result() for future in futures]
        site.endpoint = endpoint  # type: ignore[attr-defined]
        return replies


def test_a_request_and_its_reply(site: Site) -> None:
    request = ChatRequest(
        "hello", "be kind", "data:image/png;base64,AA", 0.5, 0.9, 3, 20, extra={"return_token_ids": True}
    )
    assert ask(site, request) == [ChatReply("fine", tokens=100, model="m")]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    assert site.chats == [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": [picture, {"type": "text", "text": "hello"}]},
            ],
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
            "max_tokens": 20,
            "return_token_ids": True,
        }
    ]
    assert site.keys == [f"Bearer {SECRET}"]


@pytest.mark.parametrize(
    "fault",
    [
        refusal(429, "slow down"),
        refusal(429, "slow down", headers={"Retry-After": "0"}),
        refusal(429, "slow down", headers={"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "5ms"}),
        refusal(500, "broken"),
        refusal(503, "loading"),
        Reply(fault="hang up"),
        Reply(body=b"<html>busy</html>"),
        Reply(body={"object": "list", "data": []}),
    ],
    ids=["429", "retry-after", "rate limit", "500", "503", "hang up", "garbage", "no completion"],
)
def test_what_may_pass_is_tried_again(site: Site, fault: Reply) -> None:
    site.chat = scripted(fault, fault, "fine")
    assert [reply.text for reply in ask(site)] == ["fine"]
    assert len(site.chats) == 3


def test_what_does_not_pass_is_an_error_of_one_request(site: Site) -> None:
    site.chat = lambda body, number: refusal(500, "broken") if "bad" in str(body) else "fine"
    good, bad = ask(site, ChatRequest("good"), ChatRequest("bad"), attempts=3)
    assert good.text == "fine"
    assert bad.text == "" and "status 500" in bad.error
    assert len(site.chats) == 1 + 3


def test_a_trickle_ends_at_the_deadline_of_the_whole_request(site: Site) -> None:
    site.chat = scripted(Reply(body=b"", fault="trickle"))
    assert ask(site, timeout=0.3, attempts=1) == [ChatReply(error="no complete answer within 0.3 s")]


def test_the_four_ends_are_kept_apart(site: Site) -> None:
    site.chat = scripted(
        completion("as far as", finish="length"),
        completion("I", refusal="I cannot say that."),
        completion("half of", finish="content_filter"),
        refusal(400, "The prompt was filtered.", code="content_filter"),
        refusal(400, "no such thing"),
    )
    replies = [ask(site)[0] for _ in range(5)]
    assert replies[0] == ChatReply("as far as", cut=True, tokens=100, model="m")
    assert replies[1] == ChatReply(refusal="I cannot say that.", tokens=100, model="m")
    assert replies[2] == ChatReply(refusal="content filter", tokens=100, model="m")
    assert "filtered" in replies[3].refusal and replies[3].error is None
    assert "status 400" in replies[4].error and replies[4].refusal is None


@pytest.mark.parametrize(
    ("name", "message", "more"),
    [
        ("max_tokens", "Unsupported parameter: use 'max_completion_tokens' instead.", {"param": "max_tokens"}),
        ("temperature", "'temperature' does not support 0.5 with this model. Only the default (1) is supported.", {}),
        ("top_p", "Unknown field: top_p", {}),
        ("seed", "Extra inputs are not permitted", {"param": "seed"}),
        ("system", "This model does not support the system role.", {}),
    ],
)
def test_what_a_model_refuses_is_learned_once(site: Site, name: str, message: str, more: dict) -> None:
    def chat(body, number):
        sent = "system" in [m["role"] for m in body["messages"]] if name == "system" else name in body
        return refusal(400, message, **more) if sent else "fine"

    site.chat = chat
    request = ChatRequest("hello", "be kind", None, 0.5, 0.9, 3, 20)
    with Endpoint([f"{site.url}/v1"], "m", first_wait=0.001) as endpoint:
        assert [endpoint.submit(request).result().text for _ in range(3)] == ["fine"] * 3
        assert list(endpoint.learned) == [name]
        assert f"{name} refused" in endpoint.summary()
    assert len(site.chats) == 4
    if name == "max_tokens":
        assert site.chats[-1]["max_completion_tokens"] == 20
    if name == "system":
        assert site.chats[-1]["messages"] == [{"role": "user", "content": "be kind\n\nhello"}]


def test_a_limit_that_is_too_large_is_no_unknown_parameter(site: Site) -> None:
    site.chat = scripted(
        refusal(400, "max_tokens is too large: 9000. This model's maximum context length is not supported")
    )
    (reply,) = ask(site, ChatRequest("hello", max_tokens=9000))
    assert "too large" in reply.error
    assert len(site.chats) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refusal(401, "wrong key"), "the endpoint refuses"),
        (refusal(404, "no such model"), "the endpoint refuses"),
        (refusal(429, "spent", code="insufficient_quota"), "the endpoint refuses"),
        (refusal(500, "image input is not supported - hint: you may need to provide the mmproj"), "takes no pictures"),
        (refusal(400, "At most 0 image(s) may be provided in one prompt."), "takes no pictures"),
    ],
)
def test_what_no_request_can_pass_ends_all_of_them(site: Site, reply: Reply, message: str) -> None:
    site.chat = scripted(reply)
    with pytest.raises(MMRoleError, match=message) as caught:
        ask(site, *[ChatRequest("hello", image="data:image/png;base64,AA")] * 50)
    assert caught.value.fix
    assert len(site.chats) <= Endpoint([f"{site.url}/v1"], "m").limit  # at once, at first


def test_no_server_listens(site: Site) -> None:
    site.url = "http://127.0.0.1:9"
    with pytest.raises(MMRoleError, match="cannot be reached"):
        ask(site)


def test_a_server_that_dies_in_the_middle_ends_the_run(site: Site) -> None:
    site.chat = scripted("fine", Reply(fault="hang up"))
    with Endpoint([f"{site.url}/v1"], "m", first_wait=0.001) as endpoint:
        assert endpoint.submit(ChatRequest("hello")).result().text == "fine"
        errors = [future.exception() for future in [endpoint.submit(ChatRequest("hello")) for _ in range(9)]]
    assert [error is None for error in errors].count(True) == 2  # given up one by one
    assert "the endpoint cannot be reached" in str(next(filter(None, errors)))


def test_what_a_server_said_before_it_died_is_said(site: Site) -> None:
    site.chat = scripted(refusal(500, "the engine is dead"), Reply(fault="hang up"))
    with pytest.raises(MMRoleError, match="cannot be reached") as caught:
        ask(site)
    assert "the engine is dead" in caught.value.value


def test_requests_of_a_server_that_is_down_go_to_another(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with serving() as second:
        urls = [f"{site.url}/v1", "http://127.0.0.1:9/v1", f"{second.url}/v1"]
        with Endpoint(urls, "m", first_wait=0.001) as endpoint:
            requests = [ChatRequest(f"row {number}", server=number) for number in range(12) for _ in range(4)]
            replies = [future.result() for future in [endpoint.submit(request) for request in requests]]
        assert {reply.text for reply in replies} == {"fine"}
        rows = [{body["messages"][0]["content"] for body in one.chats} for one in (site, second)]
        assert len(site.chats) + len(second.chats) == 48 and len(rows[0]) + len(rows[1]) == 12
        assert len(caplog.records) == 1 and "127.0.0.1:9/v1 cannot be reached" in caplog.text


def test_a_server_that_was_down_is_asked_again_when_the_last_one_is(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    first_is_down = threading.Event()
    first_is_down.set()
    site.chat = lambda body, number: Reply(fault="hang up") if first_is_down.is_set() else "first"
    with serving() as second, Endpoint([f"{site.url}/v1", f"{second.url}/v1"], "m", first_wait=0.001) as endpoint:
        second.chat = lambda body, number: "second" if first_is_down.is_set() else Reply(fault="hang up")
        assert endpoint.submit(ChatRequest("hello", server=0)).result().text == "second"
        first_is_down.clear()
        assert [endpoint.submit(ChatRequest("hello", server=n)).result().text for n in (0, 1)] == ["first", "first"]
        first_is_down.set()
        site.chat = second.chat = lambda body, number: Reply(fault="hang up")
        assert "APIConnectionError" in endpoint.submit(ChatRequest("hello", server=1)).result().error
    assert len(caplog.records) == 3


def test_the_number_of_requests_under_way_falls_once_an_episode_and_grows_again(site: Site) -> None:
    """Twenty requests meet 429 together: one fall by a fifth, not twenty."""
    together = threading.Barrier(20)

    def chat(body, number):
        if number <= 20:
            together.wait()
            return refusal(429, "slow down", headers={"Retry-After": "0"})
        return "fine"

    site.chat = chat
    assert {reply.text for reply in ask(site, *[ChatRequest("hello")] * 20)} == {"fine"}
    limit = site.endpoint.concurrency
    assert 16 < limit < 18
    assert len(site.chats) == 40


def test_retry_after_is_waited_for_by_all(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the pauses move."""
    clock, pauses = [0.0], []

    async def pause(self, seconds):
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr("data_utils.endpoint.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Endpoint, "pause", pause)
    site.chat = scripted(refusal(429, "slow down", headers={"Retry-After": "40"}), "fine")
    assert [reply.text for reply in ask(site)] == ["fine"]
    assert pauses == [40]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "99999"}, 300.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2.5s"}, 62.5),
        ({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "1m"}, None),
    ],
)
def test_waits_that_headers_ask_for(headers: dict[str, str], seconds: float | None) -> None:
    assert module.wait_of(headers) == seconds


def test_budgets_stop_before_the_next_request(site: Site) -> None:
    with Endpoint([f"{site.url}/v1"], "m", max_tokens_total=2350) as endpoint:
        futures = [endpoint.submit(ChatRequest("hello", max_tokens=1000)) for _ in range(30)]
        replies = [future.exception() for future in futures]
        assert sum(error is None for error in replies) == 14  # 100 tokens each; then 1,000 more might not fit
        assert all(isinstance(error, BudgetSpentError) for error in replies if error)
        assert endpoint.tokens == 1400
    with Endpoint([f"{site.url}/v1"], "m", max_requests=2) as endpoint:
        futures = [endpoint.submit(ChatRequest("hello")) for _ in range(3)]
        assert sum(future.exception() is None for future in futures) == 2


def test_the_key_is_nowhere(site: Site, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    site.chat = scripted(
        completion(f"your key is {SECRET}"),
        completion("I", refusal=f"not with {SECRET}"),
        refusal(500, f"{SECRET} is busy"),
        refusal(401, f"wrong key: {SECRET}, sk-very***7890"),
    )
    shown = [repr(reply) for reply in (ask(site)[0], ask(site)[0], ask(site, attempts=1)[0])]
    with pytest.raises(MMRoleError) as caught:
        ask(site)
    error = caught.value
    shown += [str(error), repr(error.__cause__), repr(error.__context__), caplog.text, *capfd.readouterr()]
    assert "the answer holds the key" in shown[0]
    assert not any("verysecret" in text or "sk-very" in text for text in shown)


@pytest.mark.parametrize(
    ("url", "variable", "message"),
    [
        ("https://models.example/v1", "", "no key for the endpoint"),
        ("https://models.example/v1", "schlüssel", "invalid characters"),
        ("models.example", "k" * 20, "not the address of an endpoint"),
        ("https://me:secret@models.example/v1", "k" * 20, "not the address of an endpoint"),
    ],
)
def test_endpoints_that_cannot_be(site: Site, monkeypatch, url: str, variable: str, message: str) -> None:
    monkeypatch.setenv("OTHER_KEY", variable)
    with pytest.raises(MMRoleError, match=message) as caught:
        Endpoint([url], "m", key_env="OTHER_KEY")
    assert "secret" not in str(caught.value)


def test_a_key_in_place_of_its_variable_is_not_shown(site: Site) -> None:
    with pytest.raises(MMRoleError, match="not the name of a variable") as caught:
        ask(site, key_env=SECRET)
    assert SECRET not in str(caught.value)


def test_a_server_on_loopback_needs_no_key(site: Site, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert ask(site)[0].text == "fine"


def test_a_socks_proxy_without_its_package_is_named(site: Site, monkeypatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MMRoleError, match="SOCKS proxy"):
        Endpoint(["https://models.example/v1"], "m")


def test_a_proxy_is_not_asked_for_this_machine(site: Site, monkeypatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ask(site)[0].text == "fine"


def test_closing_gives_up_what_is_under_way(site: Site) -> None:
    began = threading.Event()

    def chat(body, number):
        began.set()
        site.over.wait()
        return "late"

    site.chat = chat
    endpoint = Endpoint([f"{site.url}/v1"], "m")
    future = endpoint.submit(ChatRequest("hello"))
    began.wait()
    endpoint.close()  # before the server answers, which it does when the test is over
    assert future.done()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" hello ", "hello"),
        ("<think>hm\n</think>\n\nhello", "hello"),
        ("hm</think>hello", "hello"),
        ("<think>and so on", ""),
        ("a <think> of it", "a <think> of it"),
    ],
)
def test_thinking_is_no_part_of_an_answer(text: str, answer: str) -> None:
    assert without_thinking(text) == answer
