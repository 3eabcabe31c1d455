//! What the books cost a call that is covered by its node's lease: hold, OPEN, MARK, END, charge. No statement is sent.

use std::sync::Arc;

use bytes::Bytes;
use criterion::{Criterion, criterion_group, criterion_main};
use gpt_cat::catalog::Model;
use gpt_cat::config::Price;
use gpt_cat::config::{Config, DatabaseUrl};
use gpt_cat::ledger::{Ask, Counting, Ended, Ledger};
use gpt_cat::meter::Vocabulary;
use gpt_cat::request::Head;
use gpt_cat::store::{EndReason, Store};
use gpt_cat::users::{Users, hash_key};

fn ledger(c: &mut Criterion) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let config = Config::load(None, [], &["openai", "qianwen", "demo"]).expect("the defaults");
    let endpoint = &config.endpoints["openai"];
    let (ledger, users, model) = runtime.block_on(async {
        let store = Store::open(&DatabaseUrl::Sqlite(folder.path().join("x.db"))).await.expect("a database");
        let key = (hash_key("sk-bench"), "ench".to_owned());
        store.add_user("ann".into(), "default".into(), i64::MAX / 4, Some(key)).await.expect("a user");
        let price = Price::plain(2_500_000_000, 10_000_000_000);
        let model = Arc::new(Model {
            name: "gpt-4o".into(),
            price: price.clone(),
            price_version: store.price_version("gpt-4o".into(), price).await.expect("a price"),
            context: 128_000,
            max_output: 16_384,
            bills_unseen: false,
            vocabulary: Vocabulary::O200k,
            offers: Vec::new(),
        });
        let journals = folder.path().join("journal");
        let ledger = Ledger::start(store.clone(), &journals, &config.ledger, Counting::default()).await;
        let ledger = ledger.expect("a ledger");
        tokio::spawn(ledger.clone().keep()); // lines are shipped meanwhile, as they are while serving
        (ledger, Users::load(&store).await.expect("users"), model)
    });
    let key = users.find("sk-bench", 0).expect("the key");
    let body = Bytes::from(
        r#"{"model":"gpt-4o","stream":true,"max_tokens":200,"messages":[{"role":"user","content":"Hello there"}]}"#,
    );
    let head = Head::read(&body).expect("a valid body");
    let open = async || {
        let ask = Ask {
            key: &key,
            model: &model,
            model_asked: "gpt-4o",
            head: &head,
            body: &body,
            request_id: "d71959fb01478e12-1".into(),
            client_request_id: None,
        };
        ledger.open(ask).await.expect("there is money")
    };
    let ended = || Ended { reason: EndReason::Complete, output: 100, content: true, ..Ended::failed(200, true) };
    // A first hold of many calls brings a lease that the calls to come are covered by.
    runtime.block_on(async {
        let mut lines = Vec::new();
        for _ in 0..1000 {
            lines.push(open().await);
        }
        lines.into_iter().for_each(|line| line.end(ended()));
    });
    c.bench_function("ledger/call", |b| {
        b.iter(|| {
            let mut line = runtime.block_on(open());
            line.called(Some(1), endpoint, "gpt-4o");
            assert!(line.mark(1));
            line.end(ended());
        });
    });
}

criterion_group!(benches, ledger);
criterion_main!(benches);
