"""Drives a server with LangChain's ChatOpenAI, as an application would; one line a check. Environment as in client.py."""

import os
import sys
import traceback

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

DIALECT = os.environ.get("DIALECT", "openai")
NAME = "langchain" if DIALECT == "openai" else f"langchain, {DIALECT}"
STORY = "The gateway takes a request , looks at it , and hands it on as it came ."
HELLO = [HumanMessage("Tell me the story.")]


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def model(key=os.environ["API_KEY"], **options):
    return ChatOpenAI(model="gpt-4o", api_key=key, base_url=os.environ["BASE_URL"], timeout=30, **options)


def an_answer_comes_with_its_usage():
    answer = model().invoke(HELLO)
    assert answer.content == STORY, answer.content
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    assert answer.response_metadata["finish_reason"] == "stop"


def a_stream_brings_every_word_and_its_usage():
    chunks = list(model(stream_usage=True).stream(HELLO))
    assert "".join(chunk.content for chunk in chunks) == STORY
    assert len([chunk for chunk in chunks if chunk.content]) == len(STORY.split(" "))
    [usage] = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert usage["output_tokens"] == len(STORY.split(" "))


def a_tool_is_called_and_its_result_goes_back():
    chat = model().bind_tools([weather])
    asked = chat.invoke(HELLO)
    [call] = asked.tool_calls
    assert (call["name"], call["args"]["city"]) == ("weather", "Zürich"), call
    result = weather.invoke({"city": call["args"]["city"]})
    told = chat.invoke([*HELLO, asked, ToolMessage(result, tool_call_id=call["id"])])
    assert told.content == "The tool said sunny in Zürich", told.content


def a_streamed_tool_call_is_put_together():
    whole = None
    for chunk in model().bind_tools([weather]).stream(HELLO):
        whole = chunk if whole is None else whole + chunk
    [call] = whole.tool_calls
    assert (call["name"], call["args"]["days"]) == ("weather", [1, 2, 3]), call


def a_wrong_key_is_an_authentication_error():
    try:
        model("sk-wrong-0123456789abcdefghijklmnopqrstuvwxyz", max_retries=0).invoke(HELLO)
    except openai.AuthenticationError as error:
        assert error.status_code == 401
    else:
        raise AssertionError("no error")


CHECKS = [
    an_answer_comes_with_its_usage,
    a_stream_brings_every_word_and_its_usage,
    a_tool_is_called_and_its_result_goes_back,
    a_streamed_tool_call_is_put_together,
    a_wrong_key_is_an_authentication_error,
]


def main():
    failed = 0
    for check in CHECKS:
        sentence = f"{NAME}: {check.__name__.replace('_', ' ')}"
        try:
            check()
            print(f"ok {sentence}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED {sentence}", flush=True)
            traceback.print_exc()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
