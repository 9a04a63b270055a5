"""The endpoint with models: chats, and every answer as `ffjax.generate` gives it alone."""

from __future__ import annotations

import concurrent.futures
import os
import random
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import openai
import pytest
from chat_folder import chat_folder
from fake_batch import FakeBatch
from serve_cases import NAME, serving, until

import checkpoints
import ffjax
from ffjax.live import LiveBatch
from ffjax.sampling.params import SamplingParams
from ffjax.text.defaults import default_sampling
from ffjax.text.tokenizers import load_tokenizer

pytestmark = pytest.mark.once(
    "The protocol is ours; a sample serves a model.",
    sample=[
        "test_a_chat",
        "test_what_is_wrong_with_a_chat_is_a_sentence",
    ],
)

CAPACITY = 512
SAID: list[dict[str, Any]] = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("models") / "talker")


@pytest.fixture(scope="module")
def model(folder):
    return checkpoints.load(folder, dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokenizer(folder, model):
    return load_tokenizer(folder, model.config)


@pytest.fixture(scope="module")
def running(model, tokenizer, folder):
    with serving(
        lambda: LiveBatch(model, rows=8, capacity=CAPACITY, max_logprobs=20, chunk=128),
        config=model.config,
        tokenizer=tokenizer,
        defaults=default_sampling(folder),
        chunk=128,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    return running.client()


def alone(model, tokenizer, prompt: list[int], **params: Any) -> tuple[list[int], Any]:
    """What `ffjax.generate` makes of a prompt: its tokens, and the whole output."""
    given: dict[str, Any] = {"max_tokens": 12, "seed": 0} | params
    out = ffjax.generate(
        model,
        [prompt],
        given["max_tokens"],
        sampling=SamplingParams(**given),
        stop_token=tokenizer.eot_ids,
        capacity=CAPACITY,
    )
    return out.tokens[0], out


def ask(client, messages=SAID, **how: Any):
    return client.chat.completions.create(
        **{"model": NAME, "messages": messages, "max_tokens": 12} | how
    )


# Chats


def test_a_chat(client, model, tokenizer):
    prompt = tokenizer.chat(SAID)
    tokens, out = alone(model, tokenizer, prompt)
    answer = ask(client)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == tokenizer.decode(tokens)
    assert choice.finish_reason == out.finish_reasons[0]
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(tokens)


def test_a_chat_in_pieces(client, model, tokenizer):
    tokens, _ = alone(model, tokenizer, tokenizer.chat(SAID), max_tokens=30)
    chunks = list(ask(client, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    first, *middle, last, usage = chunks
    assert first.object == "chat.completion.chunk" and first.choices[0].delta.role == "assistant"
    assert "".join(x.choices[0].delta.content for x in middle) == tokenizer.decode(tokens)
    assert last.choices[0].finish_reason in ("stop", "length")
    assert last.choices[0].delta.content is None
    assert usage.choices == [] and usage.usage.completion_tokens == len(tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_a_number_a_chat_goes_on_to_its_end(client, tokenizer):
    prompt = tokenizer.chat(SAID)
    answer = client.chat.completions.create(
        model=NAME, messages=SAID, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == CAPACITY - len(prompt)
    assert answer.choices[0].finish_reason == "length"
    few = ask(client, max_tokens=None, max_completion_tokens=3, extra_body={"ignore_eos": True})
    assert few.usage.completion_tokens == 3


def test_log_probabilities_of_a_chat(client, model, tokenizer):
    prompt = tokenizer.chat(SAID)
    tokens, out = alone(model, tokenizer, prompt, logprobs=3)
    for stream in (False, True):
        answer = ask(client, logprobs=True, top_logprobs=3, stream=stream)
        choices = [x.choices[0] for x in answer] if stream else answer.choices
        told = [one for x in choices if x.logprobs is not None for one in x.logprobs.content]
        assert len(told) == len(tokens)
        for one, token, own in zip(told, tokens, out.logprobs[0], strict=True):
            assert one.logprob == pytest.approx(own.logprob, abs=1e-4)
            assert one.token == tokenizer.decode([token])
            assert [x.logprob for x in one.top_logprobs] == pytest.approx(
                [value for _, value in own.top], abs=1e-4
            )
        said = b"".join(bytes(one.bytes) for one in told)
        assert said.decode("utf-8", "replace") == tokenizer.decode(tokens)
    plain = ask(client, logprobs=True).choices[0].logprobs.content
    assert all(one.top_logprobs == [] for one in plain)


def test_a_next_turn_feeds_what_is_new(client, tokenizer):
    messages = [{"role": "user", "content": "a conversation that nobody else has"}]
    first = ask(client, messages)
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append({"role": "user", "content": "and then?"})
    second = ask(client, messages)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens
    assert second.usage.prompt_tokens - cached < second.usage.prompt_tokens / 2


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_drawn_answers_are_those_of_generate(client, model, tokenizer, seed):
    prompt = tokenizer.chat(SAID)
    answer = ask(client, temperature=0.9, top_p=0.95, seed=seed, n=2)
    for k, choice in enumerate(answer.choices):
        own = (seed + k) % 2**64
        tokens, _ = alone(model, tokenizer, prompt, temperature=0.9, top_p=0.95, seed=own)
        assert choice.message.content == tokenizer.decode(tokens)


def test_tools_reach_the_template(client, tokenizer):
    tools: Any = [
        {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}
    ]

    def count(**how: Any) -> int:
        return ask(client, max_tokens=1, **how).usage.prompt_tokens

    assert count(tools=tools) == len(tokenizer.chat(SAID, tools=tools))
    assert count(tools=tools, tool_choice="auto") == len(tokenizer.chat(SAID, tools=tools))
    assert count(tools=tools, tool_choice="none") == len(tokenizer.chat(SAID)) == count(tools=[])
    with pytest.raises(openai.BadRequestError, match="tool_choice is auto or none"):
        ask(client, tools=tools, tool_choice="required")


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "user", "content": "a\nb"},
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"a": 1}'},
                    }
                ],
            },
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
            },
        ),
        ({"role": "tool", "tool_call_id": "1", "content": "3"}, {"role": "tool", "content": "3"}),
    ],
)
def test_messages_are_read_as_templates_expect_them(client, tokenizer, sent, read):
    echoed = ask(client, [*SAID, sent], max_tokens=1)
    assert echoed.usage.prompt_tokens == len(tokenizer.chat([*SAID, read]))


def test_what_else_a_template_takes(client, tokenizer):
    how: dict[str, Any] = {"chat_template_kwargs": {"mood": "a good mood"}}
    said = ask(client, max_tokens=1, extra_body=how).usage.prompt_tokens
    assert said == len(tokenizer.chat(SAID, variables={"mood": "a good mood"}))
    last = [*SAID, {"role": "assistant", "content": "Well, "}]
    how = {"continue_final_message": True, "add_generation_prompt": False}
    said = ask(client, last, max_tokens=1, extra_body=how).usage.prompt_tokens
    assert said == len(tokenizer.chat(last, continue_final_message=True))


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hello"}, "messages", "a list, got"),
        ({"messages": ["hello"]}, "messages[0]", "an object with role and content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "one of system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a text or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
            "is image_url",
        ),
        ({"messages": SAID, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"messages": SAID, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"messages": SAID, "logprobs": 3}, "logprobs", "true or false"),
        ({"messages": SAID, "tools": [{"name": "f"}]}, "tools[0]", "A tool is"),
        ({"messages": SAID, "documents": [{"text": "x"}]}, "documents", "takes no documents"),
        ({"messages": SAID, "functions": [{}]}, "functions", "give tools"),
        ({"messages": SAID, "prompt": "x"}, "prompt", "has no such field"),
        ({"messages": SAID, "modalities": ["audio"]}, "modalities", "Answers are text"),
        ({"messages": SAID, "reasoning_effort": "low"}, "reasoning_effort", "chat_template_kwargs"),
        (
            {"messages": SAID, "chat_template_kwargs": {"messages": 1}},
            "messages",
            "have names other",
        ),
        ({"messages": SAID, "max_tokens": 600}, "max_tokens", "and there are 512"),
        ({"messages": [*SAID, {"role": "user", "content": "x" * 600}]}, None, "512 positions"),
        (
            {"messages": [*SAID, {"role": "user", "content": "x" * 66_000}]},
            "messages",
            "up to 65536 characters here",
        ),
    ],
)
def test_what_is_wrong_with_a_chat_is_a_sentence(client, body, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.post("/chat/completions", body=body, cast_to=object)
    assert refused.value.param == param


def test_a_folders_own_defaults_count_where_a_request_says_nothing(tmp_path, model, tokenizer):
    folder = chat_folder(tmp_path / "own", do_sample=True, temperature=0.8, top_k=7)
    placed: list[SamplingParams] = []

    class Batch(FakeBatch):
        def place(self, row, tokens, params, **how):
            placed.append(params)
            super().place(row, tokens, params, **how)

    with serving(
        Batch, config=model.config, tokenizer=tokenizer, defaults=default_sampling(folder)
    ) as running:
        for given in ({}, {"temperature": 0.0}, {"top_p": 0.9}):
            ask(running.client(), seed=3, **given)
            params: dict[str, Any] = {"temperature": 0.8, "top_k": 7, "seed": 3}
            params |= {"max_tokens": 12, **given}
            assert placed[-1] == SamplingParams(**params)


def test_the_guides_program_prints_an_answer(running, capsys):
    guide = (Path(__file__).parent.parent / "docs" / "serve.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    exec(program.replace("http://127.0.0.1:8000", running.url), {})
    assert len(capsys.readouterr().out) > 0


# Many at once


_DRAWN = {"temperature": 0.9, "top_p": 0.95}


def _requests() -> list[tuple[bool, Any, dict[str, Any]]]:
    """Fifty requests: whether it is a chat, the prompt, and its parameters."""
    draw = random.Random(3)
    words = ["hello", "world", "return", "the", "user", "of", "a", "1", ";", "é", "日"]
    requests: list[tuple[bool, Any, dict[str, Any]]] = []
    for i in range(50):
        text = f"{i} " + " ".join(draw.choices(words, k=draw.randint(1, 60)))
        params: dict[str, Any] = {"max_tokens": draw.randint(5, 40), "seed": draw.randrange(2**63)}
        if i % 2:
            params |= _DRAWN
        if i >= 8:  # the first ones are as other tests have them, and compiled
            extra = [{"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.3}, {"min_tokens": 5}]
            params |= draw.choice([{}, {"frequency_penalty": 0.7}, {"logit_bias": {"70": 3.0}}])
            params["extra_body"] = draw.choice([{}, *extra])
        prompt = [{"role": "user", "content": text}] if i % 5 else text
        requests.append((i % 5 != 0, prompt, params))
    return requests


def _answered(client, request: tuple[bool, Any, dict[str, Any]], stream: bool) -> tuple[Any, ...]:
    """An answer's text, end and number of tokens."""
    chat, prompt, params = request
    how = {"model": NAME, "messages" if chat else "prompt": prompt, **params}
    call = client.chat.completions if chat else client.completions
    if not stream:
        answer = call.create(**how)
        [choice] = answer.choices
        text = choice.message.content if chat else choice.text
        return text, choice.finish_reason, answer.usage.completion_tokens
    text, end, count = "", None, None
    for chunk in call.create(**how, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            text += (choice.delta.content or "") if chat else choice.text
            end = choice.finish_reason or end
        count = chunk.usage.completion_tokens if chunk.usage else count
    return text, end, count


def test_200_requests_of_8_clients_lose_nothing_and_are_as_alone(running, model, tokenizer):
    requests = _requests()
    own = [_answered(running.client(), request, False) for request in requests]
    for (chat, prompt, params), (text, end, count) in zip(requests[:8], own, strict=False):
        ids = tokenizer.chat(prompt) if chat else tokenizer.encode(prompt)
        tokens, out = alone(model, tokenizer, ids, **params)
        assert (text, end, count) == (tokenizer.decode(tokens), out.finish_reasons[0], len(tokens))
    order = list(range(200))
    random.Random(4).shuffle(order)

    def client_of(k: int) -> list[tuple[int, tuple[Any, ...]]]:
        client = running.client()
        return [(j % 50, _answered(client, requests[j % 50], j % 3 == 0)) for j in order[k::8]]

    most = 0
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client_of, k) for k in range(8)]
        while not all(one.done() for one in asked):
            most = max(most, running.server.scheduler._running)
            time.sleep(0.001)
        got = [pair for one in asked for pair in one.result()]
    assert len(got) == 200 and most > 4  # they were side by side
    wrong = [(i, found, own[i]) for i, found in got if found != own[i]]
    assert not wrong, f"{len(wrong)} answers are not as alone: {wrong[:3]}"
    until(lambda: running.server.scheduler._running == 0)
    assert running.server.scheduler.state == "ready"


def test_clients_that_go_away_leave_caches_that_can_be_trusted(running, model, tokenizer):
    client = running.client()
    for i in range(6):
        said = [{"role": "user", "content": f"{i} times hello world"}]
        with ask(client, said, max_tokens=300, stream=True) as chunks:
            next(iter(chunks))
        until(lambda: running.server.scheduler._running == 0)
        answer = ask(client, said, max_tokens=30)
        tokens, _ = alone(model, tokenizer, tokenizer.chat(said), max_tokens=30)
        assert answer.choices[0].message.content == tokenizer.decode(tokens)
        assert answer.usage.prompt_tokens_details.cached_tokens > 5


def test_drafts_that_are_looked_up_change_no_answer(model, tokenizer):
    said = [{"role": "user", "content": "abab abab abab"}]
    asked = {"max_tokens": 60, "ignore_eos": True}
    tokens, _ = alone(model, tokenizer, tokenizer.chat(said), **asked)
    lookup = ffjax.Lookup(min_match=1)
    how = {"capacity": CAPACITY, "chunk": 128, "speculation": lookup, "ahead": False}
    with serving(
        lambda: LiveBatch(model, rows=2, **how), config=model.config, tokenizer=tokenizer
    ) as running:
        accepted = []
        for _ in range(3):
            answer = ask(running.client(), said, max_tokens=60, extra_body={"ignore_eos": True})
            assert answer.choices[0].message.content == tokenizer.decode(tokens)
            accepted.append(answer.usage.completion_tokens_details.accepted_prediction_tokens)
        with urllib.request.urlopen(f"{running.url}/metrics") as metrics:
            told = metrics.read().decode()
    assert min(accepted) > 0
    assert f"ffjax_generation_tokens_accepted_total {float(sum(accepted))}" in told


def test_a_draft_model_changes_no_answer(model, tokenizer):
    """Its own: so all drafts are right, also after what is kept of the turn before."""
    how = {"capacity": CAPACITY, "chunk": 128, "ahead": False, "speculation": ffjax.Draft(model)}
    messages, accepted = list(SAID), []
    with serving(
        lambda: LiveBatch(model, rows=2, **how), config=model.config, tokenizer=tokenizer
    ) as running:
        client, cached = running.client(), 0
        for question in ("hello", "world", "the user"):
            messages.append({"role": "user", "content": question})
            prompt = tokenizer.chat(messages)
            tokens, _ = alone(model, tokenizer, prompt, max_tokens=31, ignore_eos=True)
            answer = ask(client, messages, max_tokens=31, extra_body={"ignore_eos": True})
            assert answer.choices[0].message.content == tokenizer.decode(tokens)
            usage = answer.usage
            assert usage.prompt_tokens_details.cached_tokens == cached
            accepted.append(usage.completion_tokens_details.accepted_prediction_tokens)
            # The next turn says it in a text, which may be cut into other tokens.
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            held, said = [*prompt, *tokens[:-1]], tokenizer.chat(messages)
            cached = next((i for i, t in enumerate(held) if said[i] != t), len(held))
        with urllib.request.urlopen(f"{running.url}/metrics") as metrics:
            told = metrics.read().decode()
    assert cached > 60
    assert accepted == [30 - 8] * 3  # of 30 tokens in steps of 4, the first of each was certain
    assert f"ffjax_generation_tokens_accepted_total {float(sum(accepted))}" in told


@pytest.mark.skipif(
    "FFJAX_TEST_CHAT_MODEL" not in os.environ,
    reason="FFJAX_TEST_CHAT_MODEL names no folder of a trained chat model",
)
def test_a_trained_model_chats_over_several_turns():
    path = os.environ["FFJAX_TEST_CHAT_MODEL"]
    model = ffjax.load(path)
    tokenizer: Any = load_tokenizer(path, model.config)
    questions = ["What is the capital of France?", "Which river runs through it?", "Thank you."]
    with serving(
        lambda: LiveBatch(model, rows=2, capacity=CAPACITY),
        config=model.config,
        tokenizer=tokenizer,
    ) as running:
        client, messages, before = running.client(timeout=600), [], 0
        for question in questions:
            messages.append({"role": "user", "content": question})
            answer = ask(client, messages, max_tokens=24)
            prompt = tokenizer.chat(messages)
            tokens, out = alone(model, tokenizer, prompt, max_tokens=24)
            assert answer.choices[0].message.content == tokenizer.decode(tokens)
            assert answer.choices[0].finish_reason == out.finish_reasons[0]
            # All that was fed and said before, but for the last token, which was never fed.
            assert answer.usage.prompt_tokens_details.cached_tokens == before
            before = len(prompt) + max(len(tokens) - 1, 0)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    assert "Paris" in messages[1]["content"]
