"""A scripted upstream that speaks OpenAI's API, and DashScope's: what it answers follows from the model's name and the request.

    gpt-4o, gpt-4o-priced…   an answer, whole or streamed; tool calls where tools are given; an instance of a JSON schema
    gpt-4o-slow…             a word each 20 ms, until the client has gone
    gpt-4o-busy              429, always
    gpt-4o-busy-once…        429 to the first request, then an answer
    gpt-4o-picky             400 with param `temperature`

`GET /_log` tells every request so far: its body as it came, its key, the words sent and when the client closed. The
standard library only; it prints `listening on http://ADDRESS`, and ends by itself after a quarter of an hour.
"""

import asyncio
import json
import time

import dashscope

KEY = "sk-upstream-0123456789abcdef"
PACE_S = 0.02
SLOW_WORDS_MAX = 1500  # 30 s: a client that never hangs up must not keep it for ever
HEAD_BYTES_MAX = 64 * 1024
LIFE_S = 900  # whoever started it and died must not leave it behind

STORY = "The gateway takes a request , looks at it , and hands it on as it came .".split(" ")
TOOL_ARGUMENTS = '{"city":"Z\\u00fcrich","note":"quote \\" and \\\\ slash","days":[1,2,3]}'
BUSY_HEADERS = {"retry-after": "1"}
SLOW_USAGE = {"prompt_tokens": 8, "completion_tokens": 1, "total_tokens": 9}

LOG = []
BUSY_SEEN = set()


def log_entry(path, key, body):
    entry = {"path": path, "key": key, "body": body, "words_sent": 0, "closed_at": None}
    LOG.append(entry)
    return entry


async def serve():
    server = await asyncio.start_server(converse, "127.0.0.1", 0, limit=HEAD_BYTES_MAX)
    host, port = server.sockets[0].getsockname()
    print(f"listening on http://{host}:{port}", flush=True)
    await asyncio.sleep(LIFE_S)


async def converse(reader, writer):
    try:
        while await one_request(reader, writer):
            pass
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def one_request(reader, writer):
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    request_line, *fields = head.split("\r\n")
    method, path, _ = request_line.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields if field)}
    body = (await reader.readexactly(int(headers.get("content-length", 0)))).decode()

    if path == "/_log":
        return reply(writer, 200, LOG)
    entry = log_entry(path, headers.get("authorization", "").removeprefix("Bearer "), body)
    if dashscope.is_path(path):
        return await chat_of_dashscope(reader, writer, dashscope.request_of(json.loads(body), headers), entry)
    if entry["key"] != KEY:
        return refuse(writer, 401, "Incorrect API key provided.", "invalid_request_error", code="invalid_api_key")
    if method == "GET" and path == "/v1/models":
        return reply(writer, 200, {"object": "list", "data": [model_row("gpt-4o")]})
    if method == "GET" and path == "/v1/models/gpt-4o":
        return reply(writer, 200, model_row("gpt-4o"))
    if path != "/v1/chat/completions":
        return refuse(writer, 404, f"Unknown URL {path}.", "invalid_request_error", code="unknown_url")
    return await chat(reader, writer, json.loads(body), entry)


async def chat(reader, writer, request, entry):
    model = request["model"]
    if not model.startswith("gpt-4o"):
        return refuse(writer, 404, f"The model `{model}` does not exist.", "invalid_request_error", code="model_not_found")
    if model == "gpt-4o-picky":
        return refuse(writer, 400, "Only the default (1) value is supported.", "invalid_request_error", "temperature")
    if not isinstance(request.get("messages"), list):
        return refuse(writer, 400, "messages must be an array.", "invalid_request_error", "messages")
    first_time = model not in BUSY_SEEN
    BUSY_SEEN.add(model)
    if model == "gpt-4o-busy" or (model.startswith("gpt-4o-busy-once") and first_time):
        return refuse(writer, 429, "Rate limit reached.", "requests", code="rate_limit_exceeded", headers=BUSY_HEADERS)
    if model.startswith("gpt-4o-slow"):
        base = frame(model, "chat.completion.chunk")
        choice = {"index": 0, "delta": {"content": " word"}, "finish_reason": None}
        event = f"data: {json.dumps({**base, 'choices': [choice]})}\n\n"
        return await stream_slowly(reader, writer, entry, (event for _ in range(SLOW_WORDS_MAX)))
    message = answer_to(request)
    if request.get("stream"):
        return await stream(writer, request, message)
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return reply(writer, 200, {**frame(model, "chat.completion"), "choices": [choice], "usage": usage(request, message)})


async def chat_of_dashscope(reader, writer, request, entry):
    """The same in DashScope's shapes."""
    model = request["model"]
    refuse_so = lambda status, message, headers=None: reply(writer, status, dashscope.refusal(status, message), headers)
    first_time = model not in BUSY_SEEN
    BUSY_SEEN.add(model)
    if entry["key"] != KEY:
        return refuse_so(401, "Invalid API-key provided.")
    if model == "gpt-4o-picky":
        return refuse_so(400, "Only the default (1) value is supported.")
    if model == "gpt-4o-busy" or (model.startswith("gpt-4o-busy-once") and first_time):
        return refuse_so(429, "Requests rate limit exceeded.", BUSY_HEADERS)
    if model.startswith("gpt-4o-slow"):
        words = ({"content": " word"} for _ in range(SLOW_WORDS_MAX))
        return await stream_slowly(reader, writer, entry, (result_of(delta, None, SLOW_USAGE) for delta in words))
    message = answer_to(request)
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    tokens = usage(request, message)
    if not request["stream"]:
        return reply(writer, 200, dashscope.result(message, finish, tokens))
    begin_stream(writer)
    for delta in deltas(message):
        send_chunk(writer, result_of(delta, None, tokens))
        await writer.drain()
    send_chunk(writer, result_of({}, finish, tokens))
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    return True


def result_of(delta, finish, tokens):
    result = json.dumps(dashscope.result(delta, finish, tokens), ensure_ascii=False)
    return f"id:1\nevent:result\n:HTTP_STATUS/200\ndata:{result}\n\n"


def answer_to(request):
    """The message: a tool call, an instance of the schema, a tool's result told back, or the story."""
    last = request["messages"][-1]
    if request.get("tools") and last["role"] != "tool":
        name = request["tools"][0]["function"]["name"]
        call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": TOOL_ARGUMENTS}}
        return {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    shape = request.get("response_format") or {}
    if shape.get("type") == "json_schema":
        content = json.dumps(instance(shape["json_schema"]["schema"]), ensure_ascii=False)
    elif last["role"] == "tool":
        content = f"The tool said {last['content']}"
    else:
        content = " ".join(STORY)
    return {"role": "assistant", "content": content, "refusal": None}


def instance(schema):
    """Something that fits a schema of objects, arrays, strings, integers and booleans."""
    kind = schema["type"]
    if kind == "object":
        return {name: instance(property) for name, property in schema["properties"].items()}
    if kind == "array":
        return [instance(schema["items"])] * 2
    return {"string": "Zürich", "integer": 21, "number": 21.5, "boolean": True}[kind]


async def stream(writer, request, message):
    begin_stream(writer)
    base = frame(request["model"], "chat.completion.chunk")
    with_usage = (request.get("stream_options") or {}).get("include_usage", False)
    if with_usage:
        base["usage"] = None
    for delta in deltas(message):
        send_event(writer, {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        await writer.drain()
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    send_event(writer, {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if with_usage:
        send_event(writer, {**base, "choices": [], "usage": usage(request, message)})
    end_stream(writer)
    await writer.drain()
    return True


def deltas(message):
    """The message in pieces: words, or a tool call whose arguments are cut anywhere."""
    if not message.get("tool_calls"):
        yield {"role": "assistant", "content": ""}
        words = message["content"].split(" ")
        yield from ({"content": word if at == 0 else " " + word} for at, word in enumerate(words))
        return
    call = message["tool_calls"][0]
    function = {"name": call["function"]["name"], "arguments": ""}
    first = {"index": 0, "id": call["id"], "type": "function", "function": function}
    yield {"role": "assistant", "content": None, "tool_calls": [first]}
    arguments = call["function"]["arguments"]
    for at in range(0, len(arguments), 5):
        yield {"tool_calls": [{"index": 0, "function": {"arguments": arguments[at : at + 5]}}]}


async def stream_slowly(reader, writer, entry, events):
    """Says ` word` (one token in every vocabulary) each 20 ms and notes when the other end has closed."""
    begin_stream(writer)
    for event in events:
        send_chunk(writer, event)
        entry["words_sent"] += 1
        try:
            await writer.drain()
            await asyncio.wait_for(reader.read(1), PACE_S)
        except asyncio.TimeoutError:
            continue
        except ConnectionError:
            pass
        # Nobody sends a second request into an answer: what can be read here is the end.
        entry["closed_at"] = time.time()
        return False
    end_stream(writer)
    return True


def frame(model, kind):
    return {"id": "chatcmpl-scripted", "object": kind, "created": 1760000000, "model": model}


def model_row(name):
    return {"id": name, "object": "model", "created": 1760000000, "owned_by": "scripted"}


def usage(request, message):
    """Words for tokens: near enough to be sane."""
    text = message.get("content") or message["tool_calls"][0]["function"]["arguments"]
    prompt = sum(4 + len(str(message.get("content") or "").split()) for message in request["messages"])
    completion = len(text.split())
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def refuse(writer, status, message, kind, param=None, code=None, headers=None):
    return reply(writer, status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers)


def reply(writer, status, value, headers=None):
    body = json.dumps(value).encode()
    fields = {"content-type": "application/json", "content-length": len(body), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    writer.write(f"HTTP/1.1 {status} Scripted\r\n{head}\r\n".encode() + body)
    return True


def begin_stream(writer):
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")


def send_event(writer, value):
    send_chunk(writer, f"data: {json.dumps(value)}\n\n")


def end_stream(writer):
    send_chunk(writer, "data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")


def send_chunk(writer, text):
    payload = text.encode()
    writer.write(b"%x\r\n%s\r\n" % (len(payload), payload))


if __name__ == "__main__":
    asyncio.run(serve())
