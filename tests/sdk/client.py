"""Drives a server with the OpenAI SDK for Python, as an application would; one line a check, and a count at the end.

Environment: BASE_URL (with /v1), API_KEY, UPSTREAM (the scripted upstream's root). GATEWAY and GATEWAY_CONFIG name the
gateway's executable and configuration; without them the SDK talks to the upstream itself, and the checks of what only a
gateway does are skipped.
"""

import json
import os
import subprocess
import sys
import time
import traceback
import urllib.request
from decimal import Decimal

import openai
from pydantic import BaseModel

BASE_URL = os.environ["BASE_URL"]
API_KEY = os.environ["API_KEY"]
UPSTREAM = os.environ["UPSTREAM"]
GATEWAY = os.environ.get("GATEWAY")
# What the gateway's endpoints speak: what another dialect than OpenAI's cannot represent is not asked for.
IS_OPENAI = os.environ.get("DIALECT", "openai") == "openai"
NAME = "python" if IS_OPENAI else f"python, {os.environ['DIALECT']}"

LEARN_TIMEOUT_S = 5  # a running server learns of a change within a second
LINE_TIMEOUT_S = 5  # lines are shipped each second
CLOSE_TIMEOUT_S = 2
# A word each 20 ms: what lies in the sockets between us and the upstream, and what comes while we hang up.
WORDS_UNREAD_MAX = 15

PRICE_INPUT, PRICE_OUTPUT = Decimal("0.001"), Decimal("0.002")  # a token, as run.sh configures them
STORY = "The gateway takes a request , looks at it , and hands it on as it came ."
TOOL_ARGUMENTS = '{"city":"Z\\u00fcrich","note":"quote \\" and \\\\ slash","days":[1,2,3]}'
HELLO = [{"role": "user", "content": "Tell me the story."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


class Skipped(Exception):
    """The check is about what only a gateway does, or only OpenAI's own dialect."""


class Counted(openai.DefaultHttpxClient):
    """The SDK's own HTTP client, which counts what it sends: retries included."""

    def __init__(self):
        super().__init__(event_hooks={"request": [self._count]})
        self.requests = 0

    def _count(self, _request):
        self.requests += 1


def client(key=API_KEY, **options):
    counted = Counted()
    made = openai.OpenAI(api_key=key, base_url=BASE_URL, http_client=counted, timeout=30, **options)
    return made, counted


def refused(kind, call):
    """The exception of this kind that the call must end in."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def upstream_log():
    with urllib.request.urlopen(f"{UPSTREAM}/_log", timeout=5) as answer:
        return json.load(answer)


def upstream_requests(model):
    return [entry for entry in upstream_log() if f'"{model}"' in entry["body"]]


def gateway_command(*words, parse=True):
    if not GATEWAY:
        raise Skipped
    command = [GATEWAY, *words, "--config", os.environ["GATEWAY_CONFIG"]] + (["--json"] if parse else [])
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0, f"{command}: {ran.stderr or ran.stdout}"
    return json.loads(ran.stdout) if parse else None


def until(seconds, find):
    """What `find` gives as soon as it gives anything."""
    deadline = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
    return found


def only_line(model):
    """The one line of the one call of a model."""
    lines = until(LINE_TIMEOUT_S, lambda: [line for line in gateway_command("usage") if line["model"] == model])
    assert len(lines) == 1, f"{len(lines)} lines for one call"
    return lines[0]


def key_known(key):
    def ask():
        try:
            return client(key, max_retries=0)[0].models.list()
        except openai.AuthenticationError:
            return None

    until(LEARN_TIMEOUT_S, ask)


def chat_answers():
    answer = client()[0].chat.completions.create(model="gpt-4o", messages=HELLO)
    assert answer.choices[0].message.content == STORY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id == "chatcmpl-scripted"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


def fields_that_nobody_knows_reach_the_upstream_as_they_were():
    if not IS_OPENAI:
        raise Skipped
    extra = {"x_unknown": {"z": 1, "a": [12345678901234567890123, None], "ü": "\u0007"}}
    marked = [{"role": "user", "content": f"python unknown fields {time.time()}"}]
    client()[0].chat.completions.create(model="gpt-4o", messages=marked, seed=7, extra_body=extra)
    body = next(entry["body"] for entry in upstream_log() if marked[0]["content"] in entry["body"])
    sent = json.loads(body)
    assert sent["x_unknown"] == extra["x_unknown"] and sent["seed"] == 7
    assert list(sent["x_unknown"]) == ["z", "a", "ü"], "the order of keys"


def a_stream_brings_every_word_and_no_usage_that_was_not_asked_for():
    words, finish = [], []
    for chunk in client()[0].chat.completions.create(model="gpt-4o", messages=HELLO, stream=True):
        assert chunk.choices, "a chunk without choices"
        assert chunk.usage is None
        words.append(chunk.choices[0].delta.content or "")
        finish.append(chunk.choices[0].finish_reason)
    assert "".join(words) == STORY
    assert len([word for word in words if word]) == len(STORY.split(" ")), "words were joined or cut"
    assert finish[-1] == "stop" and not any(finish[:-1])


def a_stream_with_usage_ends_with_it():
    options = {"include_usage": True}
    chunks = list(client()[0].chat.completions.create(model="gpt-4o", messages=HELLO, stream=True, stream_options=options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(STORY.split(" "))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks[:-1])


def the_stream_helper_puts_the_answer_together():
    with client()[0].chat.completions.stream(model="gpt-4o", messages=HELLO) as stream:
        assert stream.get_final_completion().choices[0].message.content == STORY


def a_tool_call_comes_whole_and_its_result_goes_back():
    sdk, _ = client()
    asked = sdk.chat.completions.create(model="gpt-4o", messages=HELLO, tools=TOOLS, tool_choice="required" if IS_OPENAI else "auto")
    assert asked.choices[0].finish_reason == "tool_calls" and asked.choices[0].message.content is None
    call = asked.choices[0].message.tool_calls[0]
    assert (call.id, call.function.name, call.function.arguments) == ("call_1", "weather", TOOL_ARGUMENTS)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    history = [*HELLO, asked.choices[0].message, result]
    told = sdk.chat.completions.create(model="gpt-4o", messages=history, tools=TOOLS)
    assert told.choices[0].message.content == "The tool said sunny"


def a_streamed_tool_call_is_put_together_byte_for_byte():
    name, arguments, finish = None, "", None
    for chunk in client()[0].chat.completions.create(model="gpt-4o", messages=HELLO, tools=TOOLS, stream=True):
        finish = chunk.choices[0].finish_reason
        for piece in chunk.choices[0].delta.tool_calls or []:
            name = name or piece.function.name
            arguments += piece.function.arguments
    assert (name, arguments, finish) == ("weather", TOOL_ARGUMENTS, "tool_calls")


def a_structured_answer_fits_its_schema():
    class Weather(BaseModel):
        city: str
        degrees: int
        sunny: bool
        days: list[str]

    answer = client()[0].chat.completions.parse(model="gpt-4o", messages=HELLO, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Zürich", degrees=21, sunny=True, days=["Zürich", "Zürich"])


def models_are_listed_and_retrieved():
    sdk, _ = client()
    assert "gpt-4o" in [model.id for model in sdk.models.list()]
    assert sdk.models.retrieve("gpt-4o").id == "gpt-4o"


def a_wrong_key_is_an_authentication_error_asked_once():
    sdk, counted = client("sk-wrong-0123456789abcdefghijklmnopqrstuvwxyzABCDEFG")
    error = refused(openai.AuthenticationError, lambda: sdk.chat.completions.create(model="gpt-4o", messages=HELLO))
    assert error.status_code == 401 and error.code == "invalid_api_key"
    assert "sk-wrong" not in str(error), "the key is in the message"
    assert counted.requests == 1


def an_unknown_model_is_a_not_found_error():
    sdk, counted = client()
    error = refused(openai.NotFoundError, lambda: sdk.chat.completions.create(model="no-such-model", messages=HELLO))
    assert error.status_code == 404 and error.code == "model_not_found" and counted.requests == 1


def a_bad_request_names_its_parameter():
    sdk, counted = client()
    error = refused(openai.BadRequestError, lambda: sdk.chat.completions.create(model="gpt-4o", messages="hello"))
    assert error.status_code == 400 and error.param == "messages" and counted.requests == 1


def the_upstreams_bad_request_comes_back_with_its_parameter():
    sdk, counted = client()
    ask = lambda: sdk.chat.completions.create(model="gpt-4o-picky", messages=HELLO, temperature=0.5)
    error = refused(openai.BadRequestError, ask)
    assert error.param == ("temperature" if IS_OPENAI else None) and "Only the default (1)" in error.message and counted.requests == 1


def the_upstreams_rate_limit_is_a_rate_limit_error_with_retry_after():
    sdk, _ = client(max_retries=0)
    error = refused(openai.RateLimitError, lambda: sdk.chat.completions.create(model="gpt-4o-busy", messages=HELLO))
    assert error.status_code == 429 and error.code == "rate_limit_exceeded"
    assert int(error.response.headers["retry-after"]) >= 1
    assert error.response.headers.get("x-should-retry") != "false"


def the_sdks_own_retry_gets_past_a_busy_upstream():
    sdk, counted = client()
    answer = sdk.chat.completions.create(model="gpt-4o-busy-once-python", messages=HELLO)
    assert answer.choices[0].message.content == STORY
    assert counted.requests == 2, f"{counted.requests} requests"


def a_client_that_leaves_is_seen_upstream_and_pays_for_what_it_got():
    model = "gpt-4o-slow-python"
    stream = client()[0].chat.completions.create(model=model, messages=HELLO, stream=True)
    words_read = 0
    for chunk in stream:
        words_read += bool(chunk.choices and chunk.choices[0].delta.content)
        if words_read == 40:
            break
    left_at = time.time()
    stream.close()
    closed = lambda: [entry for entry in upstream_requests(model) if entry["closed_at"]]
    [entry] = until(CLOSE_TIMEOUT_S + 1, closed)
    assert entry["closed_at"] - left_at < CLOSE_TIMEOUT_S, f"closed after {entry['closed_at'] - left_at:.2f} s"
    assert len(upstream_requests(model)) == 1
    if not GATEWAY:
        return
    line = only_line(model)
    charged_for = line["output_tokens"]
    assert words_read <= charged_for <= min(words_read + WORDS_UNREAD_MAX, entry["words_sent"]), (
        f"{words_read} words read, {entry['words_sent']} sent, {charged_for} charged"
    )
    assert line["end_reason"] == "client_gone", line["end_reason"]
    assert price_of(line) == Decimal(str(line["charged"])), line


def price_of(line):
    return line["input_tokens"] * PRICE_INPUT + line["output_tokens"] * PRICE_OUTPUT


def an_answer_is_charged_once_by_the_upstreams_usage():
    model = "gpt-4o-priced-python"
    gateway_command("usage")
    answer = client()[0].chat.completions.create(model=model, messages=HELLO)
    line = only_line(model)
    assert line["input_tokens"] == answer.usage.prompt_tokens
    assert line["output_tokens"] == answer.usage.completion_tokens
    assert price_of(line) == Decimal(str(line["charged"])), line


def an_empty_balance_is_asked_once_and_never_reaches_the_upstream():
    key = gateway_command("user", "add", "poor-python", "--balance", "0.01")["key"]
    key_known(key)
    requests_before = len(upstream_log())
    sdk, counted = client(key)
    error = refused(openai.RateLimitError, lambda: sdk.chat.completions.create(model="gpt-4o", messages=HELLO))
    assert error.code == "insufficient_quota" and error.response.headers["x-should-retry"] == "false"
    assert counted.requests == 1, f"{counted.requests} requests"
    assert len(upstream_log()) == requests_before
    assert Decimal(gateway_command("user", "show", "poor-python")["balance"]) == Decimal("0.01")


def what_the_dialect_cannot_represent_is_refused_by_its_name():
    if IS_OPENAI:
        raise Skipped
    sdk, counted = client()
    error = refused(openai.BadRequestError, lambda: sdk.chat.completions.create(model="gpt-4o", messages=HELLO, logit_bias={}, frequency_penalty=1))
    assert error.param == "frequency_penalty" and counted.requests == 1


def a_frozen_user_is_denied_and_asked_once():
    key = gateway_command("user", "add", "frozen-python", "--balance", "5")["key"]
    key_known(key)
    gateway_command("user", "freeze", "frozen-python", parse=False)

    def ask():
        sdk, counted = client(key)
        try:
            sdk.chat.completions.create(model="gpt-4o", messages=HELLO)
        except openai.PermissionDeniedError as error:
            return error, counted

    error, counted = until(LEARN_TIMEOUT_S, ask)
    assert error.code == "user_frozen" and counted.requests == 1


def the_demo_model_answers_whole_and_streamed():
    if not GATEWAY:
        raise Skipped
    sdk, _ = client()
    [demo] = [model.id for model in sdk.models.list() if model.id.startswith("demo")]
    assert sdk.chat.completions.create(model=demo, messages=HELLO).choices[0].message.content
    chunks = list(sdk.chat.completions.create(model=demo, messages=HELLO, stream=True))
    assert len(chunks) > 2 and chunks[-1].choices[0].finish_reason == "stop"


def the_upstream_saw_its_own_key_only():
    if not GATEWAY:
        raise Skipped
    assert {entry["key"] for entry in upstream_log()} == {os.environ["UPSTREAM_KEY"]}
    assert API_KEY not in json.dumps(upstream_log())


CHECKS = [
    chat_answers,
    fields_that_nobody_knows_reach_the_upstream_as_they_were,
    a_stream_brings_every_word_and_no_usage_that_was_not_asked_for,
    a_stream_with_usage_ends_with_it,
    the_stream_helper_puts_the_answer_together,
    a_tool_call_comes_whole_and_its_result_goes_back,
    a_streamed_tool_call_is_put_together_byte_for_byte,
    a_structured_answer_fits_its_schema,
    models_are_listed_and_retrieved,
    a_wrong_key_is_an_authentication_error_asked_once,
    an_unknown_model_is_a_not_found_error,
    a_bad_request_names_its_parameter,
    the_upstreams_bad_request_comes_back_with_its_parameter,
    the_upstreams_rate_limit_is_a_rate_limit_error_with_retry_after,
    the_sdks_own_retry_gets_past_a_busy_upstream,
    a_client_that_leaves_is_seen_upstream_and_pays_for_what_it_got,
    an_answer_is_charged_once_by_the_upstreams_usage,
    an_empty_balance_is_asked_once_and_never_reaches_the_upstream,
    what_the_dialect_cannot_represent_is_refused_by_its_name,
    a_frozen_user_is_denied_and_asked_once,
    the_demo_model_answers_whole_and_streamed,
    the_upstream_saw_its_own_key_only,
]


def main():
    failed = 0
    for check in CHECKS:
        sentence = f"{NAME}: {check.__name__.replace('_', ' ')}"
        try:
            check()
            print(f"ok {sentence}", flush=True)
        except Skipped:
            print(f"skipped {sentence}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED {sentence}", flush=True)
            traceback.print_exc()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
