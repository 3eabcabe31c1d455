//! Commands and templates in the chat, and the calls that front ends make behind the user's back.

use serde_json::{Value, json};

use crate::node::{INPUT_NANO, Node, OUTPUT_NANO, Reply, Setup, USER};
use crate::upstream::{DONE, Upstream, completion, finish, stream, text, usage, whole};
use gpt_cat::store::{LineFilter, NewTemplate};

async fn answering() -> Upstream {
    Upstream::start(|_, seen| match seen.json()["stream"].as_bool() {
        Some(true) => stream(&[text("Hello"), finish(), usage(5, 1), DONE.into()].concat()),
        _ => whole(200, &completion("Hello", 5, 1)),
    })
    .await
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

fn body(messages: &[Value], more: Value) -> String {
    let mut body = json!({ "model": "m", "messages": messages });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body.to_string()
}

/// What the gateway itself says to a last message, which must be a whole completion that cost nothing.
async fn told(node: &Node, history: &[Value], last: &str) -> String {
    let mut said = Vec::new();
    for streamed in [false, true] {
        let messages: Vec<Value> = history.iter().cloned().chain([message("user", last)]).collect();
        let reply: Reply = node.chat(&body(&messages, json!({ "stream": streamed }))).await;
        assert_eq!((reply.status, reply.whole), (200, true), "{}", reply.text());
        said.push(match streamed {
            true => {
                assert!(reply.text().ends_with(DONE) && reply.text().contains(r#""finish_reason":"stop""#));
                reply.said()
            }
            false => {
                let answer = reply.json();
                assert_eq!(answer["usage"], json!({ "prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0 }));
                answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
            }
        });
        // Only the first of the two deletes or saves anew.
        if last.contains("delete") || last.contains("end-template") {
            break;
        }
    }
    assert!(said.windows(2).all(|pair| pair[0] == pair[1]), "{said:?}");
    said.swap_remove(0)
}

#[tokio::test]
async fn commands_are_answered_in_either_language_without_an_upstream_or_a_charge() {
    let upstream = answering().await;
    for (language, hi, help, price) in
        [("en", "Hi, Ann!", "Commands:", "input 1.00"), ("zh", "你好，Ann！", "命令：", "输入 1.00")]
    {
        let node =
            Setup::at(&upstream).replacing("[server]", &format!("language = \"{language}\"\n[server]")).start().await;
        for (given, expected) in [
            ("/say_hi Ann", hi),
            ("/sh Ann", hi),
            ("/help", help),
            (" /h ", help),
            ("/price m", price),
            ("/bi", "1.00 USD"),
            ("/t help", "translate"),
            ("/template list", "explain-code"),
        ] {
            let said = told(&node, &[], given).await;
            assert!(said.contains(expected), "{given}: {said}");
        }
        assert!(node.store.lines(LineFilter { limit: 9, ..LineFilter::default() }).await.unwrap().is_empty());
        node.finish().await;
    }
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn what_only_looks_like_a_command_goes_to_the_model_unchanged() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let texts = [
        "/etc/passwd",
        "^/h$",
        "/",
        "/helpme",
        "say /help",
        "/ t translate",
        "/t translate this please",
        "//t translate",
    ];
    for text in texts {
        let sent = body(&[message("user", text)], json!({}));
        let reply = node.chat(&sent).await;
        // A sentence behind `/t translate` is a subcommand that is not there, and is told so.
        if text.starts_with("/t ") {
            assert!(reply.text().contains("no template"), "{}", reply.text());
            continue;
        }
        assert_eq!(String::from_utf8(upstream.seen().pop().unwrap().body).unwrap(), sent);
    }
    assert_eq!(upstream.seen().len(), texts.len() - 1);
    node.lines(texts.len() - 1).await;
    node.finish().await;
}

#[tokio::test]
async fn a_command_of_an_earlier_turn_is_never_run_again() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let history = [message("user", "/price m"), message("assistant", "m: 1.00"), message("user", "thanks")];
    let sent = body(&history, json!({}));
    let reply = node.chat(&sent).await;
    assert_eq!(reply.json()["choices"][0]["message"]["content"], "Hello");
    assert_eq!(String::from_utf8(upstream.seen()[0].body.clone()).unwrap(), sent);
    node.lines(1).await;
    node.finish().await;
}

#[tokio::test]
async fn commands_have_their_own_prefix_and_can_be_switched_off() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).with("[commands]\nprefix = \"!!\"\n").start().await;
    assert!(told(&node, &[], "!!sh Ann").await.contains("Hi, Ann!"));
    node.chat(&body(&[message("user", "!!t polish"), message("user", "text")], json!({}))).await;
    node.chat(&body(&[message("user", "/help")], json!({}))).await;
    let seen = upstream.seen();
    assert_eq!(seen[0].json()["messages"][0]["role"], "system");
    assert_eq!(seen[1].json()["messages"][0]["content"], "/help");
    node.lines(2).await;
    node.finish().await;
    let node = Setup::at(&upstream).with("[commands]\nenabled = false\n").start().await;
    node.chat(&body(&[message("user", "/t polish"), message("user", "/help")], json!({}))).await;
    assert_eq!(upstream.seen()[2].json()["messages"][0]["content"], "/t polish");
    node.lines(1).await;
    node.finish().await;
}

#[tokio::test]
async fn a_template_in_the_middle_of_a_conversation_keeps_every_other_byte_and_is_charged_for() {
    let upstream =
        Upstream::start(|_, _| whole(200, &completion("Hello", 100, 1).replace(r#""usage""#, r#""x""#))).await;
    let node = Setup::at(&upstream).start().await;
    let stored = r#"{"role":"system", "content":"You \u0061re a cat."},{"role":"assistant","content":"Meow."}"#;
    let template = NewTemplate {
        name: "猫".into(),
        messages: Some(format!("[{stored}]")),
        enabled: Some(true),
        ..NewTemplate::default()
    };
    node.store.put_template(template).await.unwrap();
    let sent = r#"{ "model":"m", "temperature":0.70, "messages":[ {"role":"user","content":"/t 猫"} ,{"role":"user","content":"who are you? \u00e9"}], "seed":12345678901234567890123 }"#;
    let reply = node.chat(sent).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let seen = String::from_utf8(upstream.seen()[0].body.clone()).unwrap();
    assert_eq!(seen, sent.replace(r#"{"role":"user","content":"/t 猫"}"#, stored));
    // Without a usage the prompt is counted here: that of the conversation that went up.
    let line = node.lines(1).await.pop().unwrap();
    let counted = gpt_cat::meter::count_prompt(
        seen.as_bytes(),
        gpt_cat::meter::Vocabulary::O200k,
        std::time::Duration::from_secs(1),
    );
    assert_eq!(line.input, counted.tokens);
    assert_eq!(line.charged_nano, line.input as i64 * INPUT_NANO + OUTPUT_NANO);
    node.finish().await;
}

#[tokio::test]
async fn users_save_use_overwrite_and_delete_their_own_templates() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let history = [message("system", "You are a pirate."), message("user", "hi"), message("assistant", "Arr!")];
    assert!(
        told(&node, &history, "/t end-template 海盗 talks like a pirate")
            .await
            .contains("Saved. Use it with `/t 海盗`")
    );
    assert!(told(&node, &[], "/t list").await.contains("`/t 海盗` talks like a pirate"));
    assert!(told(&node, &[], "/t show 海盗").await.contains("You are a pirate."));
    node.chat(&body(&[message("user", "/template 海盗"), message("user", "go on")], json!({}))).await;
    let messages: Vec<Value> = history.iter().cloned().chain([message("user", "go on")]).collect();
    assert_eq!(upstream.seen()[0].json()["messages"], Value::from(messages));
    // One of the user's own goes before a public one, and may be written over.
    assert!(told(&node, &history[..1], "/t end-template translate mine").await.starts_with("Saved."));
    assert!(told(&node, &history[..2], "/t end-template translate mine").await.contains("over the template"));
    node.chat(&body(&[message("user", "/t translate")], json!({}))).await;
    assert_eq!(upstream.seen()[1].json()["messages"], Value::from(history[..2].to_vec()));
    assert_eq!(told(&node, &[], "/t delete translate").await, "Deleted.");
    node.chat(&body(&[message("user", "/t translate"), message("user", "猫")], json!({}))).await;
    assert!(upstream.seen()[2].json()["messages"][0]["content"].as_str().unwrap().starts_with("You are a translator."));
    // Public ones are not theirs to delete.
    assert!(told(&node, &[], "/t delete translate").await.contains("no template of this name"));
    for (given, why) in [
        ("/t end-template help x", "a name has"),
        ("/t end-template x", "it has no messages"),
        ("/t nope", "no template of this name: `nope`"),
    ] {
        assert!(told(&node, &[], given).await.contains(why), "{given}");
    }
    node.lines(3).await;
    node.finish().await;
}

#[tokio::test]
async fn one_users_templates_are_nobody_elses_and_have_a_bound() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let key = ([7; 32], "hint".to_owned());
    let other = node.store.add_user("bob".into(), "default".into(), 0, Some(key)).await.unwrap().id;
    let own = node.store.user(USER.into()).await.unwrap().id;
    let put = |user_id: i64, name: String| {
        let messages = Some(json!([message("user", "secret of bob")]).to_string());
        node.store.put_template(NewTemplate { user_id: Some(user_id), name, messages, ..NewTemplate::default() })
    };
    put(other, "bobs".into()).await.unwrap();
    assert!(!told(&node, &[], "/t list").await.contains("bobs"));
    for given in ["/t bobs", "/t show bobs", "/t delete bobs"] {
        let said = told(&node, &[], given).await;
        assert!(said.contains("no template of this name") && !said.contains("secret"), "{said}");
    }
    for number in 0..100 {
        put(own, format!("t{number}")).await.unwrap();
    }
    let history = [message("user", "hi")];
    assert!(told(&node, &history, "/t end-template one-more").await.contains("at most 100 templates"));
    assert!(told(&node, &history, "/t end-template t99").await.contains("Saved over"));
    node.finish().await;
}

#[tokio::test]
async fn a_name_or_description_that_a_database_does_not_take_is_no_failure_of_it() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    for given in ["/t show a\0b", "/t delete a\0b", "/t a\0b"] {
        assert!(told(&node, &[], given).await.contains("no template of this name"), "{given:?}");
    }
    assert!(told(&node, &[message("user", "hi")], "/t end-template a b\0c").await.starts_with("Saved."));
    assert!(told(&node, &[], "/t list").await.contains("`/t a` b c"));
    node.finish().await;
}

#[tokio::test]
async fn a_template_that_ends_like_a_command_runs_none() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let messages = Some(json!([message("user", "/help")]).to_string());
    let template = NewTemplate { name: "x".into(), messages, enabled: Some(true), ..NewTemplate::default() };
    node.store.put_template(template).await.unwrap();
    let reply = node.chat(&body(&[message("user", "/t x")], json!({}))).await;
    assert_eq!(reply.json()["choices"][0]["message"]["content"], "Hello");
    assert_eq!(upstream.seen()[0].json()["messages"][0]["content"], "/help");
    node.lines(1).await;
    node.finish().await;
}

#[tokio::test]
async fn commands_count_among_the_requests_of_a_minute() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let group = gpt_cat::store::NewGroup {
        name: "default".into(),
        ratio_micro: None,
        models: None,
        concurrency: None,
        requests_per_minute: Some(Some(2)),
    };
    node.store.put_group(group).await.unwrap();
    let mut statuses = Vec::new();
    for _ in 0..200 {
        let reply = node.chat(&body(&[message("user", "/sh")], json!({}))).await;
        statuses.push(reply.status);
        if reply.status == 429 {
            assert_eq!(reply.json()["error"]["code"], "rate_limit_exceeded");
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(statuses.last(), Some(&429));
    node.finish().await;
}

#[tokio::test]
async fn a_disabled_template_is_not_there() {
    let upstream = answering().await;
    let node = Setup::at(&upstream).start().await;
    let off = NewTemplate { name: "translate".into(), enabled: Some(false), ..NewTemplate::default() };
    assert!(node.store.put_template(off).await.unwrap());
    assert!(told(&node, &[], "/t translate").await.contains("no template of this name"));
    // In an older message an unknown name stays what it is.
    node.chat(&body(&[message("user", "/t translate"), message("user", "hi")], json!({}))).await;
    assert_eq!(upstream.seen()[0].json()["messages"][0]["content"], "/t translate");
    node.lines(1).await;
    node.finish().await;
}

/// The prompts of frontends.md: whose, and the messages of such a call.
fn title_calls() -> Vec<(&'static str, Vec<Value>)> {
    let history = || vec![message("user", "How do cats purr?"), message("assistant", "With their larynx.")];
    let asked = |last: &str| history().into_iter().chain([message("user", last)]).collect::<Vec<_>>();
    let system = |text: &str| vec![message("system", text), message("user", "user: How do cats purr?")];
    vec![
        (
            "NextChat zh, title",
            asked(
                "使用四到五个字直接返回这句话的简要主题，不要解释、不要标点、不要语气词、不要多余文本，不要加粗，如果没有主题，请直接返回“闲聊”",
            ),
        ),
        (
            "NextChat en, title",
            asked(
                "Please generate a four to five word title summarizing our conversation without any lead-in, punctuation, quotation marks, periods, symbols, bold text, or additional text. Remove enclosing quotation marks.",
            ),
        ),
        (
            "NextChat zh, memory",
            history()
                .into_iter()
                .chain([message("system", "简要总结一下对话内容，用作后续的上下文提示 prompt，控制在 200 字以内")])
                .collect(),
        ),
        ("LobeChat old, title", asked("猫为什么会打呼噜？请总结上述对话为10个字以内的标题，不需要包含标点符号")),
        (
            "LobeChat new, title",
            system(
                "You are a professional conversation summarizer. Generate a concise title that captures the essence of the conversation.",
            ),
        ),
        (
            "Open WebUI, title",
            vec![message(
                "user",
                "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n### Guidelines:\n…",
            )],
        ),
        (
            "Open WebUI, tags",
            vec![message(
                "user",
                "### Task:\nGenerate 1-3 broad tags categorizing the main themes of the chat history",
            )],
        ),
        (
            "Open WebUI, follow-ups",
            vec![message(
                "user",
                "### Task:\nSuggest 3-5 relevant follow-up questions or prompts that the user might naturally ask next",
            )],
        ),
        (
            "LibreChat, title",
            vec![message(
                "user",
                "Provide a concise, 5-word-or-less title for the conversation, using its same language, with no punctuation.",
            )],
        ),
        (
            "Cherry Studio, title",
            system("你是一名擅长会话的助理，你需要将用户的会话总结为 10 个字以内的标题，标题语言与用户的首要语言一致"),
        ),
    ]
}

fn catching(upstream: &Upstream) -> Setup {
    let setup = Setup::at(upstream)
        .replacing(r#"models = ["m", "mapped", "hidden"]"#, r#"models = ["m", "mapped", "hidden", "cheap"]"#);
    setup.with(
        "[models.cheap]\ninput = \"0.10\"\noutput = \"0.20\"\n[title_catch]\nmodel = \"cheap\"\noutput_max = 100\n",
    )
}

#[tokio::test]
async fn every_front_ends_title_call_goes_to_the_cheap_model_at_its_price_and_within_the_cap() {
    // Open WebUI expects its JSON back as it is.
    let titles = r#"{ "title": "🐈 Purring" }"#;
    let upstream = Upstream::start(move |_, seen| {
        let answer =
            completion(titles, 50, 9).replace(r#""model":"m""#, &format!(r#""model":{}"#, seen.json()["model"]));
        whole(200, &answer)
    })
    .await;
    let node = catching(&upstream).start().await;
    let calls = title_calls();
    for (whose, messages) in &calls {
        let reply = node.chat(&body(messages, json!({ "stream": false }))).await;
        let answer = reply.json();
        assert_eq!(answer["choices"][0]["message"]["content"], titles, "{whose}");
        assert_eq!(answer["model"], "m", "{whose}: the client sees the name that it asked for");
        let seen = upstream.seen().pop().unwrap().json();
        assert_eq!((&seen["model"], &seen["max_tokens"]), (&"cheap".into(), &100.into()), "{whose}");
        assert_eq!(seen["messages"], Value::from(messages.clone()), "{whose}");
    }
    for line in node.lines(calls.len()).await {
        assert_eq!((line.model_asked.as_str(), line.model.as_str()), ("m", "cheap"));
        assert_eq!(line.charged_nano, 50 * INPUT_NANO / 10 + 9 * OUTPUT_NANO / 10);
    }
    node.finish().await;
}

#[tokio::test]
async fn a_title_calls_own_lower_bound_stays_and_a_higher_one_is_lowered() {
    let upstream = answering().await;
    let node = catching(&upstream).start().await;
    let (_, messages) = title_calls().swap_remove(1);
    for (field, given, expected) in
        [("max_tokens", 50, 50), ("max_tokens", 1000, 100), ("max_completion_tokens", 1000, 100)]
    {
        node.chat(&body(&messages, json!({ field: given }))).await;
        assert_eq!(upstream.seen().pop().unwrap().json()[field], expected);
    }
    node.lines(3).await;
    node.finish().await;
}

#[tokio::test]
async fn an_ordinary_question_is_not_caught_and_neither_is_a_title_call_whose_model_the_key_may_not_use() {
    let upstream = answering().await;
    let node = catching(&upstream).start().await;
    let talk = [
        message("user", "Please generate a four to five word title summarizing our conversation"),
        message("assistant", "Cats"),
        message("user", "Why do you ask for a title?"),
    ];
    node.chat(&body(&talk, json!({}))).await;
    let group = gpt_cat::store::NewGroup {
        name: "default".into(),
        ratio_micro: None,
        models: Some(Some(vec!["m".into()])),
        concurrency: None,
        requests_per_minute: None,
    };
    node.store.put_group(group).await.unwrap();
    for _ in 0..100 {
        let models = node.send(&crate::node::get("/v1/models")).await.read().await.json();
        if models["data"].as_array().unwrap().len() == 1 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    node.chat(&body(&title_calls()[1].1, json!({}))).await;
    let seen: Vec<Value> = upstream.seen().iter().map(|seen| seen.json()).collect();
    assert!(seen.iter().all(|seen| seen["model"] == "m" && seen.get("max_tokens").is_none()), "{seen:?}");
    node.lines(2).await;
    node.finish().await;
}
