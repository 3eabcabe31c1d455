"""DashScope's native protocol over the same script: a request of it as one of OpenAI's, an answer of OpenAI's as one of it.

The answers follow from the request as `upstream.py` has them; only the shapes differ. `finish_reason` is the text "null"
until the last result, usage comes with each result, and errors are `{"code","message","request_id"}`.
"""

PREFIX = "/api/v1/services/aigc/"
CODES = {400: "InvalidParameter", 401: "InvalidApiKey", 404: "ModelNotFound", 429: "Throttling.RateQuota"}
REQUEST_ID = "scripted"  # becomes the id `chatcmpl-scripted`


def is_path(path):
    return path in (f"{PREFIX}text-generation/generation", f"{PREFIX}multimodal-generation/generation")


def request_of(body, headers):
    """What an OpenAI request would have said."""
    parameters = body.get("parameters", {})
    assert parameters.get("result_format") == "message", "results are asked for as messages"
    stream = headers.get("x-dashscope-sse") == "enable"
    assert parameters.get("incremental_output", False) == stream, "a stream is asked for in increments"
    messages = [{**message, "content": text_of(message["content"])} for message in body["input"]["messages"]]
    return {"model": body["model"], "messages": messages, "stream": stream, **parameters}


def text_of(content):
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def usage_of(usage):
    tokens = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
    return {**tokens, "total_tokens": usage["total_tokens"]}


def result(message, finish, usage):
    """One result: the message of a whole answer, or a piece of a streamed one."""
    message = {"role": "assistant", **{name: value for name, value in message.items() if value is not None}}
    message.setdefault("content", "")
    message.pop("refusal", None)
    choice = {"index": 0, "message": message, "finish_reason": finish or "null"}
    return {"output": {"choices": [choice]}, "usage": usage_of(usage), "request_id": REQUEST_ID}


def refusal(status, message):
    return {"code": CODES.get(status, "InternalError"), "message": message, "request_id": REQUEST_ID}
