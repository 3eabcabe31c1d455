//! Exact requests and answers, cut anywhere; and what was recorded.

use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::meter::{Meter, Reader, Usage, Vocabulary};
use crate::upstream::translate;

fn asked(body: &Value, model: &str) -> Result<(&'static str, String), Error> {
    with(body, model, false)
}

fn with(body: &Value, model: &str, lossy: bool) -> Result<(&'static str, String), Error> {
    let body = body.to_string();
    let head = Head::read(body.as_bytes()).unwrap();
    let (path, made) = translated(body.as_bytes(), &head, None, model, lossy)?;
    Ok((path, String::from_utf8(made).unwrap()))
}

fn names() -> Names {
    Names { model: "qwen".into(), created_s: 7, n: 1 }
}

/// A stream translated, in the pieces that it is cut into.
fn streamed<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let (mut parser, mut stream, mut out) = (Parser::new(), Stream::new(names()), Vec::new());
    for piece in pieces {
        translate::read(&mut parser, &mut stream, piece, &mut out);
    }
    translate::finish(&mut parser, &mut stream, &mut out);
    String::from_utf8(out).unwrap()
}

fn translated_whole(body: &Value) -> Value {
    serde_json::from_slice(&whole(&names(), body.to_string().as_bytes()).unwrap()).unwrap()
}

#[test]
fn a_text_request_goes_up_with_every_value_as_it_came() {
    let body = r#"{"model":"q", "temperature":0.70, "messages":[ {"role":"developer","content":"Be \u0062rief"},
        {"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}],"name":"ann"},
        {"role":"assistant","content":null,"tool_calls":[ {"id":"c1","type":"function","function":{"name":"f","arguments":"{}"}} ]},
        {"role":"tool","tool_call_id":"c1","content":"12"} ],
        "tools":[{"type":"function","function":{"parameters":{"z":1,"a":2},"name":"f"}}], "seed":12345678901234567890123,
        "stream":true, "stream_options":{"include_usage":true}, "max_completion_tokens":9, "n":2, "user":"u", "stop":["x"],
        "frequency_penalty":0, "functions":[], "top_k":20, "enable_thinking":false, "parameters":{"result_format":"text","custom":{"b":1}}}"#;
    let head = Head::read(body.as_bytes()).unwrap();
    let (path, made) = translated(body.as_bytes(), &head, None, "qwen-plus", false).unwrap();
    let expected = concat!(
        r#"{"model":"qwen-plus","input":{"messages":[{"role":"system","content":"Be \u0062rief"},"#,
        r#"{"role":"user","name":"ann","content":"a\nb"},"#,
        r#"{"role":"assistant","tool_calls":[ {"id":"c1","type":"function","function":{"name":"f","arguments":"{}"}} ],"content":""},"#,
        r#"{"role":"tool","tool_call_id":"c1","content":"12"}]},"parameters":{"temperature":0.70,"#,
        r#""tools":[{"type":"function","function":{"parameters":{"z":1,"a":2},"name":"f"}}],"seed":12345678901234567890123,"#,
        r#""stop":["x"],"top_k":20,"enable_thinking":false,"custom":{"b":1},"result_format":"message","#,
        r#""incremental_output":true,"max_tokens":9,"n":2}}"#
    );
    assert_eq!((path, String::from_utf8(made).unwrap().as_str()), (TEXT_PATH, expected));
    let (_, clamped) = translated(body.as_bytes(), &head, Some(5), "qwen-plus", false).unwrap();
    assert!(String::from_utf8(clamped).unwrap().contains(r#""max_tokens":5"#));
}

#[test]
fn pictures_sound_and_films_go_to_the_multimodal_path_as_parts() {
    let body = json!({ "model": "q", "messages": [
        { "role": "system", "content": "Look." },
        { "role": "user", "content": [
            { "type": "image_url", "image_url": { "url": "data:image/png;base64,AA", "detail": "high" } },
            { "type": "image_url", "image_url": "https://x/y.png" },
            { "type": "input_audio", "input_audio": { "data": "UklG", "format": "mp3" } },
            { "type": "video_url", "video_url": { "url": "https://x/z.mp4" } },
            { "type": "text", "text": "What?" },
        ] },
    ] });
    let (path, made) = asked(&body, "qwen-plus").unwrap();
    let made: Value = serde_json::from_str(&made).unwrap();
    assert_eq!(path, MULTIMODAL_PATH);
    assert_eq!(made["input"]["messages"][0], json!({ "role": "system", "content": [{ "text": "Look." }] }));
    let parts = json!([{ "image": "data:image/png;base64,AA" }, { "image": "https://x/y.png" },
        { "audio": "data:audio/mp3;base64,UklG" }, { "video": "https://x/z.mp4" }, { "text": "What?" }]);
    assert_eq!(made["input"]["messages"][1]["content"], parts);
    // A model that sees is there whatever it is asked.
    let text = json!({ "model": "q", "messages": [{ "role": "user", "content": "hi" }] });
    let (path, made) = asked(&text, "qwen3-vl-plus").unwrap();
    assert_eq!(path, MULTIMODAL_PATH);
    assert!(made.contains(r#""content":[{"text":"hi"}]"#), "{made}");
}

#[test]
fn what_dashscope_cannot_represent_is_refused_by_its_name_unless_it_may_be_lost() {
    let base = || json!({ "model": "q", "messages": [{ "role": "user", "content": "hi" }] });
    for (field, value) in [
        ("frequency_penalty", json!(0.5)),
        ("functions", json!([{ "name": "f" }])),
        ("tool_choice", json!("required")),
        ("modalities", json!(["text", "audio"])),
        ("audio", json!({ "voice": "alloy" })),
        ("reasoning_effort", json!("high")),
        ("x_unknown", json!(1)),
    ] {
        let mut body = base();
        body[field] = value;
        let refused = asked(&body, "qwen-plus").unwrap_err();
        assert!(matches!(&refused, Error::BodyInvalid { param: Some(param), .. } if param == field), "{refused:?}");
        let (_, lost) = with(&body, "qwen-plus", true).unwrap();
        assert_eq!(lost, asked(&base(), "qwen-plus").unwrap().1, "{field}");
    }
    let mut file = base();
    file["messages"][0]["content"] = json!([{ "type": "file", "file": { "file_id": "f" } }]);
    let refused = asked(&file, "qwen-plus").unwrap_err();
    assert!(refused.to_string().contains("messages[0].content[0]"), "{refused}");
    let mut message = base();
    message["messages"][0]["function_call"] = json!({ "name": "f" });
    assert!(asked(&message, "qwen-plus").unwrap_err().to_string().contains("messages[0].function_call"));
    let mut quiet = base();
    for (field, value) in [
        ("frequency_penalty", json!(0)),
        ("logprobs", Value::Null),
        ("store", json!(true)),
        ("modalities", json!(["text"])),
    ] {
        quiet[field] = value;
    }
    assert_eq!(asked(&quiet, "qwen-plus").unwrap(), asked(&base(), "qwen-plus").unwrap());
}

const EVENTS: &str = concat!(
    "id:1\nevent:result\n:HTTP_STATUS/200\ndata:{\"output\":{\"choices\":[{\"message\":{\"content\":\"\",\"reasoning_content\":\"Hm\",\"role\":\"assistant\"},\"index\":0,\"finish_reason\":\"null\"}]},\"usage\":{\"total_tokens\":12,\"output_tokens\":2,\"input_tokens\":10},\"request_id\":\"r1\"}\n\n",
    "id:2\nevent:result\n:HTTP_STATUS/200\ndata:{\"output\":{\"choices\":[{\"message\":{\"content\":[{\"text\":\"H\u{e9}\"},{\"text\":\"llo\"}],\"role\":\"assistant\"},\"finish_reason\":\"null\"}]},\"usage\":{\"total_tokens\":13,\"output_tokens\":3,\"input_tokens\":10},\"request_id\":\"r1\"}\n\n",
    "id:3\nevent:result\n:HTTP_STATUS/200\ndata:{\"output\":{\"choices\":[{\"message\":{\"content\":\"\",\"tool_calls\":[{\"index\":0,\"id\":\"c1\",\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"{\"}}],\"role\":\"assistant\"},\"index\":0,\"finish_reason\":\"null\"}]},\"usage\":{},\"request_id\":\"r1\"}\n\n",
    "id:4\nevent:result\n:HTTP_STATUS/200\ndata:{\"output\":{\"choices\":[{\"message\":{\"content\":\"\",\"tool_calls\":[{\"index\":0,\"id\":\"\",\"type\":\"function\",\"function\":{\"name\":\"\",\"arguments\":\"}\"}}],\"role\":\"assistant\"},\"index\":0,\"finish_reason\":\"stop\"}]},\"usage\":{\"total_tokens\":30,\"output_tokens\":20,\"input_tokens\":10,\"output_tokens_details\":{\"reasoning_tokens\":2},\"prompt_tokens_details\":{\"cached_tokens\":4}},\"request_id\":\"r1\"}\n\n",
);

fn chunk(choices: &str, usage: &str) -> String {
    format!(
        "data: {{\"choices\":[{choices}],\"created\":7,\"id\":\"chatcmpl-r1\",\"model\":\"qwen\",\"object\":\"chat.completion.chunk\",\"usage\":{usage}}}\n\n"
    )
}

fn expected() -> String {
    let delta = |delta: &str, finish: &str| {
        chunk(&format!("{{\"delta\":{{{delta}}},\"finish_reason\":{finish},\"index\":0}}"), "null")
    };
    let usage = "{\"completion_tokens\":20,\"completion_tokens_details\":{\"reasoning_tokens\":2},\"prompt_tokens\":10,\"prompt_tokens_details\":{\"cached_tokens\":4},\"total_tokens\":30}";
    [
        delta("\"reasoning_content\":\"Hm\",\"role\":\"assistant\"", "null"),
        delta("\"content\":\"H\u{e9}llo\"", "null"),
        delta("\"tool_calls\":[{\"function\":{\"arguments\":\"{\",\"name\":\"f\"},\"id\":\"c1\",\"index\":0,\"type\":\"function\"}]", "null"),
        delta("\"tool_calls\":[{\"function\":{\"arguments\":\"}\"},\"index\":0,\"type\":\"function\"}]", "\"tool_calls\""),
        chunk("", usage),
        "data: [DONE]\n\n".into(),
    ]
    .concat()
}

#[test]
fn a_stream_is_exactly_openais_wherever_it_is_cut() {
    let events = EVENTS.as_bytes();
    assert_eq!(streamed([events]), expected());
    for at in 0..events.len() {
        assert_eq!(streamed([&events[..at], &events[at..]]), expected(), "cut at {at}");
    }
    assert_eq!(streamed(events.chunks(1)), expected());
    // Neither a byte order mark nor a last event without its blank line changes anything.
    assert_eq!(streamed([b"\xEF\xBB\xBF", &events[..events.len() - 1]]), expected());
}

#[test]
fn a_stream_that_ends_early_has_no_end() {
    let cut = streamed([&EVENTS.as_bytes()[..EVENTS.len() - 40]]);
    assert!(
        cut.contains("\"arguments\":\"{\"") && !cut.contains("[DONE]") && !cut.contains("finish_reason\":\"t"),
        "{cut}"
    );
    assert_eq!(streamed([]), "");
}

#[test]
fn a_stream_without_all_its_answers_or_with_a_result_that_cannot_be_read_has_no_end() {
    let (mut parser, mut out) = (Parser::new(), Vec::new());
    let mut two = Stream::new(Names { n: 2, ..names() });
    translate::read(&mut parser, &mut two, EVENTS.as_bytes(), &mut out);
    translate::finish(&mut parser, &mut two, &mut out);
    assert!(!String::from_utf8(out).unwrap().contains("[DONE]"));
    for bad in [
        "data:{\"output\":{\"text\":\"\\ud83d\"}}\n\n",
        "data:nothing\n\n",
        "event:error\ndata:{\"message\":\"m\"}\n\n",
    ] {
        let made = streamed([bad.as_bytes(), EVENTS.as_bytes()]);
        assert!(made.contains("\"error\":{") && !made.contains("[DONE]"), "{made}");
    }
}

#[test]
fn an_error_in_a_stream_is_openais_and_ends_it() {
    let error = "event:error\n:HTTP_STATUS/429\ndata:{\"code\":\"Throttling.RateQuota\",\"message\":\"slow down\",\"request_id\":\"r\"}\n\n";
    let made = streamed([error.as_bytes(), EVENTS.as_bytes()]);
    let made: Value = serde_json::from_str(made.trim().strip_prefix("data: ").unwrap()).unwrap();
    let expected =
        json!({ "message": "slow down", "type": "rate_limit_error", "param": null, "code": "Throttling.RateQuota" });
    assert_eq!(made["error"], expected);
}

#[test]
fn a_whole_answer_is_openais() {
    let answer =
        translated_whole(&json!({ "output": { "choices": [{ "finish_reason": "stop", "message": { "role": "assistant",
        "tool_calls": [{ "function": { "name": "f", "arguments": "{}" }, "index": 0, "id": "c", "type": "function" }],
        "content": "" } }], "search_info": { "search_results": [] } },
        "usage": { "output_tokens": 8, "input_tokens": 211, "image_tokens": 200 }, "request_id": "r" }));
    assert_eq!(
        answer,
        json!({ "id": "chatcmpl-r", "object": "chat.completion", "created": 7, "model": "qwen",
            "choices": [{ "index": 0, "finish_reason": "tool_calls", "logprobs": null, "message": { "role": "assistant", "content": null,
                "tool_calls": [{ "function": { "name": "f", "arguments": "{}" }, "index": 0, "id": "c", "type": "function" }] } }],
            "usage": { "prompt_tokens": 211, "completion_tokens": 8, "total_tokens": 219, "prompt_tokens_details": { "image_tokens": 200 } },
            "search_info": { "search_results": [] } })
    );
    let old = translated_whole(
        &json!({ "output": { "text": "Hi", "finish_reason": "stop" }, "usage": null, "request_id": "r" }),
    );
    assert_eq!((&old["choices"][0]["message"]["content"], &old["usage"]), (&"Hi".into(), &Value::Null));
    assert_eq!(whole(&names(), b"{}"), None);
}

#[test]
fn refusals_keep_what_they_mean_in_either_framing() {
    for (status, body, expected, kind) in [
        (400, r#"{"code":"InvalidParameter","message":"m","request_id":"r"}"#, 400, "invalid_request_error"),
        (
            400,
            "\u{feff}id:1\nevent:error\n:HTTP_STATUS/400\ndata:{\"code\":\"InvalidParameter\",\"message\":\"m\"}",
            400,
            "invalid_request_error",
        ),
        (401, r#"{"code":"InvalidApiKey","message":"m"}"#, 401, "authentication_error"),
        (400, r#"{"code":"Arrearage","message":"m"}"#, 402, "authentication_error"),
        (429, r#"{"code":"Throttling.AllocationQuota","message":"m"}"#, 429, "rate_limit_error"),
        (400, r#"{"code":"DataInspectionFailed","message":"m"}"#, 400, "invalid_request_error"),
        (404, r#"{"code":"ModelNotFound","message":"m"}"#, 404, "invalid_request_error"),
        (418, r#"{"code":"Teapot","message":"m"}"#, 418, "invalid_request_error"),
        (500, r#"{"code":"InternalError.Timeout","message":"m"}"#, 500, "server_error"),
    ] {
        let (found, error) = refusal(status, body.as_bytes());
        let error: Value = serde_json::from_slice(&error).unwrap();
        assert_eq!(
            (found, &error["error"]["type"], &error["error"]["message"]),
            (expected, &kind.into(), &"m".into()),
            "{body}"
        );
    }
    assert_eq!(refusal(502, b"<html>"), (502, b"<html>".to_vec()));
}

fn corpus() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/corpus");
    if folder.join("dashscope").exists() {
        return Some(folder);
    }
    assert!(std::env::var("CI").is_err(), "CI must have the corpus beside the project");
    eprintln!("SKIPPED: there is no corpus in {}", folder.display());
    None
}

/// What a recording says, in the plainest words: texts of all its results together, and the last usage.
fn oracle(results: impl Iterator<Item = Value>) -> (String, Option<(u64, u64)>) {
    let (mut said, mut usage) = (String::new(), None);
    for result in results {
        let output = &result["output"];
        let message = &output["choices"][0]["message"];
        for text in [&message["reasoning_content"], &message["content"], &output["text"]] {
            said += text.as_str().unwrap_or_default();
            let parts = text.as_array().into_iter().flatten();
            said.extend(parts.filter_map(|part| part["text"].as_str()));
        }
        let tokens = &result["usage"];
        usage = tokens["input_tokens"].as_u64().zip(tokens["output_tokens"].as_u64()).or(usage);
    }
    (said, usage)
}

/// The same of a translated stream, by what reads it in the gateway.
fn reading(stream: &str) -> (String, Option<Usage>, bool) {
    let (mut meter, mut reader) = (Meter::new(Vocabulary::O200k), Reader::new());
    let (mut said, mut usage) = (String::new(), None);
    for data in stream.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).filter(|data| *data != "[DONE]") {
        let chunk = reader.read(data.as_bytes(), &mut meter).unwrap();
        usage = chunk.usage.or(usage);
        let chunk: Value = serde_json::from_str(data).unwrap();
        for name in ["reasoning_content", "content"] {
            said += chunk["choices"][0]["delta"][name].as_str().unwrap_or_default();
        }
    }
    (said, usage, stream.ends_with("data: [DONE]\n\n"))
}

#[test]
fn every_recorded_stream_says_the_same_in_openais_shape() {
    let Some(folder) = corpus() else { return };
    let mut compared = 0;
    for entry in std::fs::read_dir(folder.join("sse")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if !name.starts_with("dashscope--") || !name.ends_with(".sse") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        let made = streamed([&bytes[..]]);
        for size in [1, 7, 61, 1000] {
            assert_eq!(streamed(bytes.chunks(size)), made, "{name}");
        }
        // Those whose blank lines were lost are one event that nobody can read; error and research streams have no choices.
        let events: Value = serde_json::from_slice(&std::fs::read(path.with_extension("json")).unwrap()).unwrap();
        let results: Vec<Value> = events
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|event| serde_json::from_str(event["data"].as_str()?).ok())
            .collect();
        if results.is_empty() || !text.contains("\"choices\"") || name.contains("conversation") {
            continue;
        }
        let (said, usage) = oracle(results.into_iter());
        let (made_said, made_usage, is_whole) = reading(&made);
        assert_eq!(made_said, said, "{name}");
        assert!(is_whole, "{name}");
        assert_eq!(made_usage.map(|usage| (usage.input, usage.output)), usage, "{name}");
        compared += 1;
    }
    assert!(compared >= 5, "only {compared} streams were compared");
}

#[test]
fn every_recorded_answer_says_the_same_in_openais_shape() {
    let Some(folder) = corpus() else { return };
    let mut compared = 0;
    for entry in std::fs::read_dir(folder.join("dashscope")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let Some(case) = name.strip_suffix("-nosse.response.body.txt") else { continue };
        let body = std::fs::read_to_string(&path).unwrap();
        let result: Value = serde_json::from_str(body.trim_start_matches('\u{feff}')).unwrap();
        let Some(made) = whole(&names(), body.as_bytes()) else {
            assert_eq!(refusal(400, body.as_bytes()).0, 400, "{case}");
            continue;
        };
        let mut meter = Meter::new(Vocabulary::O200k);
        let read = Reader::new().read(&made, &mut meter).unwrap();
        let (said, usage) = oracle(std::iter::once(result));
        let made: Value = serde_json::from_slice(&made).unwrap();
        let message = &made["choices"][0]["message"];
        let texts = ["reasoning_content", "content"].map(|name| message[name].as_str().unwrap_or_default());
        assert_eq!((texts.concat(), read.usage.map(|usage| (usage.input, usage.output))), (said, usage), "{case}");
        assert!(!read.finished.is_empty() && read.content, "{case}");
        compared += 1;
    }
    assert!(compared >= 6, "only {compared} answers were compared");
}

#[test]
fn every_recorded_request_can_be_asked_for_in_openais_shape() {
    let Some(folder) = corpus() else { return };
    let mut compared = 0;
    for entry in std::fs::read_dir(folder.join("dashscope")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if !name.ends_with(".request.body.json") || !name.contains("message") {
            continue;
        }
        let recorded = std::fs::read_to_string(&path).unwrap();
        let recorded: Value = serde_json::from_str(recorded.trim_start_matches('\u{feff}')).unwrap();
        let mut body = json!({ "model": "any", "messages": recorded["input"]["messages"] });
        let mut expected = recorded["parameters"].clone();
        expected["result_format"] = "message".into();
        expected.as_object_mut().unwrap().remove("incremental_output");
        for (name, value) in recorded["parameters"].as_object().unwrap() {
            if !["result_format", "incremental_output"].contains(&name.as_str()) {
                body[name] = value.clone();
            }
        }
        if let Some(max) = expected.as_object_mut().unwrap().remove("max_completion_tokens") {
            expected["max_tokens"] = max;
        }
        let model = recorded["model"].as_str().unwrap();
        let (_, made) = asked(&body, model).unwrap_or_else(|refused| panic!("{name}: {refused}"));
        let made: Value = serde_json::from_str(&made).unwrap();
        assert_eq!((&made["input"], &made["parameters"]), (&recorded["input"], &expected), "{name}");
        compared += 1;
    }
    assert!(compared >= 8, "only {compared} requests were compared");
}

/// DashScope's shape of one choice of a stream, for round trips.
fn dashscope_event(delta: &str, finish: &str, usage: (u64, u64)) -> String {
    let data = json!({ "output": { "choices": [{ "message": { "content": delta, "role": "assistant" }, "finish_reason": finish }] },
        "usage": { "input_tokens": usage.0, "output_tokens": usage.1 }, "request_id": "r" });
    format!("event:result\ndata:{data}\n\n")
}

proptest! {
    #[test]
    fn texts_and_usage_survive_the_way_there_and_back(texts in prop::collection::vec(any::<String>(), 1..8), input in 1u64..100_000, output in 0u64..100_000, size in 1usize..50) {
        let mut events: String = texts.iter().map(|text| dashscope_event(text, "null", (input, 0))).collect();
        events += &dashscope_event("", "stop", (input, output));
        let made = streamed(events.as_bytes().chunks(size));
        let (said, usage, is_whole) = reading(&made);
        prop_assert_eq!(said, texts.concat());
        prop_assert_eq!(usage.map(|usage| (usage.input, usage.output)), Some((input, output)));
        prop_assert!(is_whole);
    }

    #[test]
    fn no_bytes_make_it_panic_or_grow_beyond_its_input(data in prop::collection::vec(prop::sample::select(br#"{}[]":,data: choices0output1message2content3 4null
"#.to_vec()), 0..400)) {
        let made = streamed([&data[..]]);
        prop_assert!(made.len() <= 64 * (data.len() + 64));
        let _ = whole(&names(), &data);
        let _ = refusal(400, &data);
    }
}
