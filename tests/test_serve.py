"""The endpoint as the openai client sees it, over a batch without a model."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

import openai
import pytest
from fake_batch import EOS, NAN, FakeBatch, expected
from serve_cases import NAME, Running, serving, until

from ffjax.sampling.params import SamplingParams
from ffjax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def running():
    with serving(max_queue=8) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    return running.client()


def text_of(prompt: str | list[int], **params: Any) -> str:
    """What the batch says after a prompt, alone."""
    tokens = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    given: dict[str, Any] = {"max_tokens": 16, "seed": 0} | params
    return TOKENIZER.decode(expected(tokens, SamplingParams(**given)))


def send(
    running: Running, path: str, body: Any = None, method: str = "POST", **headers: str
) -> tuple[int, dict[str, str], Any]:
    """A request by hand: status, headers and body, which is JSON or text."""
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=20)
    given = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, given)
    response = connection.getresponse()
    text = response.read().decode()
    found = {name.lower(): value for name, value in response.getheaders()}
    connection.close()
    is_json = found.get("content-type", "").startswith("application/json")
    return response.status, found, json.loads(text) if is_json else text


# Completions


def test_a_completion(client):
    answer = client.completions.create(model=NAME, prompt="hello", max_tokens=30)
    [choice] = answer.choices
    assert choice.text == text_of("hello", max_tokens=30)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert answer.object == "text_completion" and answer.model == NAME
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 30, 35)
    assert client.completions.create(model=NAME, prompt="hello").usage.completion_tokens == 16


def test_its_end_of_text(client):
    prompt = next(f"p{i}" for i in range(999) if 2 < len(text_of(f"p{i}", max_tokens=99)) < 60)
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=99)
    [choice] = answer.choices
    assert choice.text == text_of(prompt, max_tokens=99)
    assert choice.finish_reason == "stop" and choice.stop_reason == EOS
    more = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=99, extra_body={"ignore_eos": True}
    )
    assert more.usage.completion_tokens == 99 and more.choices[0].finish_reason == "length"
    least = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=99, extra_body={"min_tokens": 80}
    )
    assert least.usage.completion_tokens >= 80


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "cd", "ab"], ["ab", "cd", "ab"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99, 100]], ["ab", "cd"]),
    ],
)
def test_prompts_of_every_form(client, prompt, texts):
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=5)
    assert [choice.text for choice in answer.choices] == [text_of(x, max_tokens=5) for x in texts]
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert answer.usage.prompt_tokens == 2 * len(texts)
    assert answer.usage.completion_tokens == 5 * len(texts)


def test_several_texts_of_a_prompt_have_seeds_of_their_own(client):
    answer = client.completions.create(
        model=NAME, prompt=["ab", "cd"], max_tokens=9, n=2, seed=7, temperature=1
    )
    own = [text_of(x, max_tokens=9, seed=s, temperature=1) for x in ("ab", "cd") for s in (7, 8)]
    assert [choice.text for choice in answer.choices] == own
    assert len(set(own)) == 4
    assert answer.usage.prompt_tokens == 4  # each prompt once
    drawn = {
        client.completions.create(model=NAME, prompt="ab", temperature=1).choices[0].text
        for _ in range(4)
    }
    assert len(drawn) > 1  # without a seed, it is another each time
    last = client.completions.create(model=NAME, prompt="ab", temperature=1, seed=-1)
    assert last.choices[0].text == text_of("ab", temperature=1, seed=2**64 - 1)


def test_a_stream_is_the_same_text_in_pieces(client):
    chunks = list(
        client.completions.create(model=NAME, prompt=["ab", "cd"], max_tokens=30, stream=True)
    )
    for i, prompt in enumerate(("ab", "cd")):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == i]
        assert "".join(choice.text for choice in mine) == text_of(prompt, max_tokens=30)
        # However many pieces: on a busy machine all of an answer may come at once.
        *before, last = [choice.finish_reason for choice in mine]
        assert (set(before) <= {None}, last) == (True, "length")
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_tells_its_usage_where_it_is_asked_to(client):
    *chunks, last = client.completions.create(
        model=NAME, prompt="ab", max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == [] and last.usage.total_tokens == 11
    assert chunks and all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_stop_strings(client):
    whole = text_of("hello", max_tokens=60)
    for stop in (whole[7:10], [whole[20:23], "never so"]):
        found = stop if isinstance(stop, str) else stop[0]
        for stream in (False, True):
            answer = client.completions.create(
                model=NAME, prompt="hello", max_tokens=60, stop=stop, stream=stream
            )
            choices = [x.choices[0] for x in answer] if stream else answer.choices
            assert "".join(x.text for x in choices) == whole[: whole.index(found)]
            assert choices[-1].finish_reason == "stop" and choices[-1].stop_reason == found
    kept = client.completions.create(
        model=NAME,
        prompt="hello",
        max_tokens=60,
        stop=whole[7:10],
        extra_body={"include_stop_str_in_output": True},
    )
    assert kept.choices[0].text.endswith(whole[7:10])
    token = ord(whole[5])
    stopped = client.completions.create(
        model=NAME, prompt="hello", max_tokens=60, extra_body={"stop_token_ids": [token]}
    )
    assert stopped.choices[0].stop_reason == token
    assert stopped.choices[0].text == whole[: whole.index(whole[5])]


def test_log_probabilities_of_a_completion(client):
    how: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": 20, "logprobs": 2}
    told = client.completions.create(**how).choices[0].logprobs
    text = text_of("hello", max_tokens=20)
    assert told.tokens == list(text) and told.text_offset == list(range(20))
    assert told.token_logprobs == [-0.5] * 20
    assert told.top_logprobs[0] == {text[0]: -0.5, "a": -0.5, "b": -1.5}
    parts = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(**how, stream=True)
        if chunk.choices[0].logprobs is not None
    ]
    assert [token for part in parts for token in part.tokens] == told.tokens
    assert [at for part in parts for at in part.text_offset] == told.text_offset
    chosen = client.completions.create(**{**how, "logprobs": 0}).choices[0].logprobs
    assert chosen.top_logprobs[0] == {text[0]: -0.5}


def test_an_echo_begins_with_the_prompt(client):
    answer = client.completions.create(model=NAME, prompt=["ab", "cd"], max_tokens=3, echo=True)
    assert [x.text for x in answer.choices] == [x + text_of(x, max_tokens=3) for x in ("ab", "cd")]
    chunks = client.completions.create(
        model=NAME, prompt=[97, 98], max_tokens=3, echo=True, stream=True
    )
    assert "".join(x.choices[0].text for x in chunks) == "ab" + text_of("ab", max_tokens=3)


def test_a_prompt_that_was_there_before_is_not_fed_again(client):
    prompt = "a prompt of some length that no other test has"
    first, second = (client.completions.create(model=NAME, prompt=prompt) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == len(prompt) - 1
    assert first.choices[0].text == second.choices[0].text


def test_what_asks_for_nothing_is_ignored(client):
    answer = client.completions.create(
        model=NAME,
        prompt="ab",
        user="me",
        best_of=1,
        suffix="",
        top_p=None,
        logit_bias=None,
        extra_body={"metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    )
    assert answer.choices[0].text == text_of("ab")


def test_parameters_reach_the_batch(client, running):
    sent: list[SamplingParams] = []
    place = running.batch.place

    def look(row, tokens, params, **how):
        sent.append(params)
        return place(row, tokens, params, **how)

    running.batch.place = look
    try:
        client.completions.create(
            model=NAME,
            prompt="ab",
            max_tokens=9,
            temperature=0.5,
            top_p=0.9,
            presence_penalty=0.1,
            frequency_penalty=-0.2,
            logit_bias={"97": -100, "98": 2.5},
            seed=5,
            logprobs=3,
            stop=["x"],
            extra_body={
                "top_k": 40,
                "min_p": 0.05,
                "repetition_penalty": 1.1,
                "min_tokens": 2,
                "ignore_eos": True,
                "stop_token_ids": [1],
                "bad_token_ids": [2],
            },
        )
    finally:
        running.batch.place = place
    assert sent == [
        SamplingParams(
            max_tokens=9,
            temperature=0.5,
            top_p=0.9,
            presence_penalty=0.1,
            frequency_penalty=-0.2,
            logit_bias={97: -100, 98: 2.5},
            seed=5,
            logprobs=3,
            top_k=40,
            min_p=0.05,
            repetition_penalty=1.1,
            min_tokens=2,
            ignore_eos=True,
            stop_token_ids=[1],
            bad_token_ids=[2],
        )
    ]


# What is refused

BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "prompt", "There is no prompt"),
    ({"prompt": ""}, "prompt", "at least one token"),
    ({"prompt": []}, "prompt", "a text, a list of texts"),
    ({"prompt": [[]]}, "prompt", "at least one token"),
    ({"prompt": {"a": 1}}, "prompt", 'got {"a": 1}'),
    ({"prompt": ["a", [98]], "n": 0}, "n", "n is from 1 to 128, got 0"),
    ({"prompt": [1, 300]}, "prompt", "Token ids .* are 0 to 256; the prompt has 300 at index 1"),
    ({"prompt": [2**70]}, "prompt", "are 0 to 256"),
    ({"prompt": "a" * 512}, None, "has 512 tokens, and a prompt and its answer have 512 positions"),
    ({"prompt": "a" * 65537}, "prompt", "up to 65536 characters here, .* this one has 65537"),
    ({"prompt": "a" * 500, "max_tokens": 13}, "max_tokens", "513 positions, and there are 512"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "from 1"),
    ({"prompt": "a", "max_tokens": "9"}, "max_tokens", 'a whole number, got "9"'),
    ({"prompt": "a", "max_tokens": 2.5}, "max_tokens", "a whole number, got 2.5"),
    ({"prompt": "a", "temperature": -1}, "temperature", "temperature must be 0"),
    ({"prompt": "a", "temperature": "hot"}, "temperature", "temperature is a number"),
    ({"prompt": "a", "top_p": 1.5}, "top_p", "top_p must be"),
    ({"prompt": "a", "top_k": -2}, "top_k", "top_k must be"),
    ({"prompt": "a", "top_k": True}, "top_k", "a whole number, got true"),
    ({"prompt": "a", "min_p": 2}, "min_p", "min_p must be"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "must be from 1e-6 to 1e6"),
    ({"prompt": "a", "presence_penalty": []}, "presence_penalty", "is a number"),
    ({"prompt": "a", "min_tokens": 20}, "min_tokens", "at most max_tokens, here 16"),
    ({"prompt": "a", "ignore_eos": 1}, "ignore_eos", "true or false, got 1"),
    ({"prompt": "a", "stop": ""}, "stop", "at least one character"),
    ({"prompt": "a", "stop": [1]}, "stop", "sequence of texts"),
    ({"prompt": "a", "stop": ["x"] * 65}, "stop", "one of up to 64 texts; stop has 65"),
    ({"prompt": "a", "stop": ["b", "x" * 1001]}, "stop", "up to 1000 characters; .* one of 1001"),
    ({"prompt": "a", "stop_token_ids": [257]}, "stop_token_ids", "stop_token_ids has 257"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "maps token ids to numbers"),
    ({"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "logit_bias", r"'9{60}\.\.\.'. A token id is"),
    ({"prompt": "a", "logit_bias": {"257": 1}}, "logit_bias", "logit_bias has 257"),
    ({"prompt": "a", "logit_bias": {"7": "x"}}, "logit_bias", "is a number"),
    ({"prompt": "a", "logit_bias": [1]}, "logit_bias", "an object"),
    ({"prompt": "a", "seed": 1.5}, "seed", "a whole number"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20, got 21"),
    ({"prompt": "a", "logprobs": 1, "echo": True}, "echo", "leave echo"),
    ({"prompt": "a", "stream": "yes"}, "stream", "true or false"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    (
        {"prompt": "a", "stream": True, "stream_options": {"usage": True}},
        "stream_options.usage",
        "no usage",
    ),
    ({"prompt": "a", "n": 17}, "n", "up to 16 texts.*asks for 17"),
    ({"prompt": "a", "best_of": 2}, "best_of", "choose one yourself"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "leave suffix out"),
    ({"prompt": "a", "temprature": 1}, "temprature", "is temperature meant"),
    ({"prompt": "a", "messages": []}, "messages", "has no such field"),
    ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format", "format"),
    ({"prompt": "a", "model": 3}, "model", "a string"),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD)
def test_what_is_wrong_with_a_request_is_a_sentence(client, body, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.post("/completions", body=body, cast_to=object)
    error: Any = refused.value
    assert error.status_code == 400 and error.type == "invalid_request_error"
    assert error.param == param
    assert error.body["message"].endswith((".", "?"))


def test_more_texts_than_can_be_queued_are_refused_before_any_is_read(running, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "encode", None)
    body = {"prompt": ["a"] * 2048, "n": 128}
    status, _, answer = send(running, "/v1/completions", body)
    message = answer["error"]["message"]
    assert status == 400 and "up to 16 texts" in message and "asks for 262144" in message


LONG = "z" * 100_000


@pytest.mark.parametrize(
    "body",
    [
        {LONG: 1},
        {"model": LONG},
        {"stream": True, "stream_options": {LONG: 1}},
        {"logit_bias": {LONG: 1}},
        {"temperature": LONG},
        {"prompt": {LONG: 1}},
    ],
)
def test_what_a_request_says_is_quoted_in_part(running, body):
    before = len(running.lines)
    _, _, answer = send(running, "/v1/completions", {"prompt": "a"} | body)
    assert "zzz" in answer["error"]["message"] and len(str(answer)) < 1200
    until(lambda: any("zzz" in line for line in running.lines[before:]))
    assert max(map(len, running.lines)) < 2000


def test_long_paths_and_bodies(running):
    for path in (f"/{LONG[:9000]}", f"/v1/models/{LONG[:9000]}"):
        status, _, answer = send(running, path, method="GET")
        assert status == 404 and len(str(answer)) < 500
    status, _, answer = send(running, "/v1/completions", b" " * (8 << 20) + b"{}")
    assert status == 413 and "up to 8388608 bytes" in answer["error"]["message"]


def test_a_files_least_tokens_yield_to_a_requests_most():
    with serving(defaults=SamplingParams(min_tokens=30)) as running:
        client = running.client()
        usage = client.completions.create(model=NAME, prompt="ab", max_tokens=5).usage
        assert usage is not None and usage.completion_tokens == 5
        with pytest.raises(openai.BadRequestError, match="min_tokens is at most"):
            client.completions.create(
                model=NAME, prompt="ab", max_tokens=5, extra_body={"min_tokens": 6}
            )


def test_too_many_requests_at_a_time_are_told_so(monkeypatch):
    monkeypatch.setattr("ffjax.serve.server._BESIDE_QUEUE", 0)
    with serving(lambda: FakeBatch(step_seconds=0.002), max_queue=1) as running:
        client = running.client()
        busy = client.completions.create(
            model=NAME, prompt="a", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        next(busy)
        status, headers, answer = send(running, "/v1/completions", {"prompt": "b"})
        assert (status, answer["error"]["code"]) == (503, "overloaded")
        assert headers["retry-after"] == "1" and "up to 1 requests" in answer["error"]["message"]
        assert send(running, "/health", method="GET")[0] == 200
        assert "".join(chunk.choices[0].text for chunk in busy)
        until(lambda: send(running, "/v1/completions", {"prompt": "b"})[0] == 200)


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match=f"This server has '{NAME}'") as refused:
        client.completions.create(model="gpt-4", prompt="a")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "cannot be read"),
        (b'{"prompt": "a"', "cannot be read"),
        (b'{"prompt": "\xff"}', "byte 12 is none"),
        (b"[1]", "a JSON object; got"),
        (b'{"prompt": "a", "temperature": NaN}', "JSON has no NaN"),
        (rb'{"prompt": "\ud800"}', "UTF-8 has no lone surrogates"),
        (rb'{"prompt": "a", "model": "\ud800"}', "does not exist"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "cannot be read"),
    ],
)
def test_a_body_that_is_no_json(running, body, words):
    status, _, answer = send(running, "/v1/completions", body)
    assert status in (400, 404) and words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_what_is_not_there_is_said_in_the_same_form(running):
    status, _, answer = send(running, "/v1/embeddings", {})
    assert status == 404 and "/v1/chat/completions" in answer["error"]["message"]
    assert "/v1/models/NAME" in answer["error"]["message"]
    status, headers, answer = send(running, "/v1/completions", None, "GET")
    assert (
        status == 405 and headers["allow"] == "POST" and "takes POST" in answer["error"]["message"]
    )
    status, _, answer = send(running, "/v1/completions", b"prompt=a", Content_Type="text/plain")
    assert status == 415 and "application/json" in answer["error"]["message"]


def test_a_chat_needs_a_template(client):
    with pytest.raises(openai.BadRequestError, match="its tokens are bytes") as refused:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a"}])
    assert refused.value.code == "no_chat_template"


def test_a_defect_is_an_error_in_the_same_form_and_a_line(running, monkeypatch):
    def broken() -> str:
        raise KeyError("x")

    handler = "ffjax.serve.handlers.Writer"
    monkeypatch.setattr(handler, lambda *_: broken())
    status, _, answer = send(running, "/v1/completions", {"prompt": "a"})
    assert status == 500 and answer["error"]["code"] == "internal_error"
    assert "an error inside ffjax: KeyError" in answer["error"]["message"]
    until(lambda: any("KeyError" in line for line in running.lines))
    monkeypatch.undo()
    assert send(running, "/v1/completions", {"prompt": "a"})[0] == 200


def test_what_a_request_says_stays_in_its_line(running):
    send(running, "/v1/completions", {"prompt": "a", "b\nfake: line": 1})
    until(lambda: any("fake: line" in line for line in running.lines))
    assert not any("\n" in line for line in running.lines)


# The server itself


def test_the_models(client):
    [model] = client.models.list()
    assert model.id == NAME == client.models.retrieve(NAME).id and model.max_model_len == 512


def test_health_page_and_figures(running):
    assert send(running, "/health", method="GET")[2] == {"status": "ok"}
    status, _, page = send(running, "/", method="GET")
    assert "<html" in page if status == 200 else "no page" in page["error"]["message"]
    status, headers, text = send(running, "/metrics", method="GET")
    assert status == 200 and headers["content-type"].startswith("text/plain")

    def figure(name: str) -> float:
        return next(float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith(name))

    assert figure("ffjax_sequences_running ") == 0
    names = ['ffjax_sequences_total{outcome="length"}', "ffjax_generation_tokens_total"]
    names += ["ffjax_prompt_tokens_total", "ffjax_time_to_first_token_seconds_count"]
    before = [figure(name) for name in names]
    running.client().completions.create(model=NAME, prompt="hello", max_tokens=20)
    text = send(running, "/metrics", method="GET")[2]
    after = [figure(name) for name in names]
    assert [a - b for a, b in zip(after, before, strict=True)] == [1, 20, 5, 1]


def test_nothing_is_served_before_it_is_warm():
    go: list[bool] = []

    def slow() -> FakeBatch:
        until(lambda: bool(go), 20)
        return FakeBatch()

    with serving(slow, wait=False) as running:
        status, _, answer = send(running, "/health", method="GET")
        assert status == 503 and answer["status"] == "starting"
        status, headers, answer = send(running, "/v1/completions", {"prompt": "a"})
        assert status == 503 and headers["retry-after"] == "1"
        assert "compiles its programs" in answer["error"]["message"]
        assert send(running, "/v1/models", method="GET")[0] == 200
        go.append(True)
        until(lambda: send(running, "/health", method="GET")[0] == 200)
        assert running.client().completions.create(model=NAME, prompt="a").choices[0].text


def test_a_key_guards_what_is_under_v1():
    with serving(api_key="secret") as running:
        for key in ("wrong", "secret2"):
            with pytest.raises(openai.AuthenticationError, match="The API key is wrong") as refused:
                running.client(api_key=key).models.list()
            assert refused.value.code == "invalid_api_key"
        status, headers, answer = send(running, "/v1/models", method="GET")
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert "There is no API key" in answer["error"]["message"]
        assert send(running, "/health", method="GET")[0] == 200
        assert running.client(api_key="secret").models.list().data
        assert not any("secret" in line for line in running.lines)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(stream):
    with serving(lambda: FakeBatch(rows=1, capacity=100_000, step_seconds=0.001)) as running:
        body = {"prompt": "a", "max_tokens": 90_000, "stream": stream, "ignore_eos": True}
        data = json.dumps(body).encode()
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as sock:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            sock.sendall(head.encode() + data)
            until(lambda: running.server.scheduler._running == 1)
            if stream:
                assert b"200 OK" in sock.recv(1000)
        until(lambda: running.server.scheduler._running == 0, 2)
        until(lambda: any("the client went away" in line for line in running.lines), 2)
        answer = running.client().completions.create(model=NAME, prompt="b", max_tokens=5)
        assert answer.choices[0].text == text_of("b", max_tokens=5)


def test_a_full_queue_is_said_and_the_client_may_try_again():
    with serving(lambda: FakeBatch(rows=1, step_seconds=0.002), max_queue=0) as running:
        client = running.client()
        busy = client.completions.create(
            model=NAME, prompt="a", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
        )
        next(busy)
        with pytest.raises(openai.RateLimitError, match="The server is busy") as refused:
            client.completions.create(model=NAME, prompt="b")
        assert refused.value.response.headers["retry-after"] == "1"
        assert refused.value.code == "rate_limit_exceeded"
        # The client's own way: it waits as it is told to, and asks again.
        again = running.client(max_retries=3).completions.create(model=NAME, prompt="b")
        assert again.choices[0].text == text_of("b")
        assert "".join(x.choices[0].text for x in busy)


def test_an_error_before_the_first_token_has_its_status_and_one_behind_is_an_event(client, running):
    prompt = [97, 98, NAN]
    for stream in (False, True):
        with pytest.raises(openai.APIError, match="NaN or infinite after 2 new tokens") as failed:
            for _ in client.completions.create(model=NAME, prompt=prompt, stream=stream):
                pass
        assert failed.value.code == "not_finite" and failed.value.type == "server_error"
    assert client.completions.create(model=NAME, prompt="ab").choices[0].text == text_of("ab")


def test_what_runs_when_the_server_ends_is_finished_within_its_grace():
    with serving(lambda: FakeBatch(rows=1, step_seconds=0.002), grace=20) as running:
        client = running.client()
        chunks = client.completions.create(
            model=NAME, prompt="a", max_tokens=150, stream=True, extra_body={"ignore_eos": True}
        )
        first = next(chunks).choices[0].text
        running.server.stop()
        rest = "".join(chunk.choices[0].text for chunk in chunks)
        assert first + rest == text_of("a", max_tokens=150, ignore_eos=True)


def test_what_does_not_end_within_the_grace_is_told_so():
    with serving(lambda: FakeBatch(rows=1, step_seconds=0.01), grace=0.1) as running:
        chunks = running.client().completions.create(
            model=NAME, prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(chunks)
        running.server.stop()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)
