//! The steps of the policy, from the key to the call; and an account lent and given back.

mod support;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use criterion::{Criterion, criterion_group, criterion_main};
use gpt_cat::catalog::Catalog;
use gpt_cat::config::{Config, DatabaseUrl};
use gpt_cat::pool::Pool;
use gpt_cat::preprocess::{self, Decision, World};
use gpt_cat::request::Head;
use gpt_cat::upstream::dialects;
use gpt_cat::users::Users;

const KEY: &str = "sk-bench-of-the-steps";
const ACCOUNTS: usize = 50;

struct Made {
    config: Config,
    catalog: Catalog,
    users: Users,
    pool: Arc<Pool>,
    _folder: tempfile::TempDir,
}

async fn world() -> Made {
    let folder = tempfile::tempdir().expect("a folder");
    let config =
        Config::load(Some("[title_catch]\nmodel = \"gpt-4o-mini\"\n"), [], &dialects()).expect("a configuration");
    let url = DatabaseUrl::Sqlite(folder.path().join("x.db"));
    let (store, master) = support::filled(&url, folder.path(), KEY, "openai", ACCOUNTS).await;
    let pool = Pool::new(config.pool.clone());
    pool.reload(&store, &master, &["demo".to_owned()]).await.expect("accounts");
    let catalog = Catalog::load(&config, &store).await.expect("a catalog");
    Made { catalog, users: Users::load(&store).await.expect("users"), pool, config, _folder: folder }
}

fn scenarios(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let made = runtime.block_on(world());
    let world = World {
        config: &made.config,
        catalog: &made.catalog,
        users: &made.users,
        pool: &made.pool,
        now_ms: 1_800_000_000_000,
    };
    let turn = r#"{"role":"user","content":"What do cats dream of, and how would we know?"},{"role":"assistant","content":"Of mice, they say."},"#;
    for (name, turns) in [("one message", 0), ("a conversation of 41 messages", 20)] {
        let messages = format!(r#"{}{{"role":"user","content":"Go on."}}"#, turn.repeat(turns));
        let body = Bytes::from(format!(r#"{{"model":"gpt-4o","stream":true,"messages":[{messages}]}}"#));
        let head = Head::read(&body).expect("a valid body");
        c.bench_function(&format!("preprocess/{name}"), |b| {
            b.iter(|| {
                let admitted = preprocess::admit(&world, black_box(Some(KEY.to_owned()))).expect("a key");
                let named = preprocess::template::named(&made.config.commands, &head, &body);
                assert!(named.is_empty());
                let decided =
                    preprocess::decide(&world, admitted, Box::new(head.clone()), body.clone()).expect("a decision");
                assert!(matches!(decided, Decision::Forward(_)));
            });
        });
    }
    let model = made.catalog.find("gpt-4o").expect("a model").clone();
    c.bench_function(&format!("pool/one of {ACCOUNTS} accounts, lent and given back"), |b| {
        b.iter(|| {
            let deadline = tokio::time::Instant::now() + Duration::from_secs(1);
            let permit = runtime.block_on(made.pool.permit(&model, 1, &[], deadline)).expect("an account is free");
            drop(black_box(permit));
        });
    });
}

criterion_group!(benches, scenarios);
criterion_main!(benches);
