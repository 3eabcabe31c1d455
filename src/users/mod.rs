//! Keys, users and groups as a running server knows them: a snapshot in memory, updated in place.
//!
//! Looking a key up costs one hash and no query. A freeze or a revoked key is seen by calls that are running, since
//! they hold the same [`User`].

mod limits;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

use arc_swap::ArcSwap;
use sha2::{Digest, Sha256};

pub use limits::{Limits, Pace, Period, Spending, Wait};

use crate::store::{Change, GroupRow, KeyRow, Store, StoreError, UserRow};

/// What a group's users have in common.
#[derive(Debug)]
pub struct Group {
    pub id: i64,
    pub name: String,
    /// Price ratio in millionths.
    pub ratio_micro: i64,
    /// Allowed models; `None`: all.
    pub models: Option<HashSet<String>>,
    /// Calls in flight of one user; `None`: no limit of the group's.
    pub concurrency: Option<u32>,
    /// Of one user; `None`: no limit.
    pub requests_per_minute: Option<u32>,
}

impl Group {
    /// Whether its users may call `model`.
    pub fn allows(&self, model: &str) -> bool {
        self.models.as_ref().is_none_or(|models| models.contains(model))
    }
}

/// A user, shared by everything that is in flight for it.
#[derive(Debug)]
pub struct User {
    pub id: i64,
    pub name: String,
    /// Against the allowances of the user, all keys together.
    pub spending: Arc<Spending>,
    /// Against the group's requests a minute.
    pub pace: Pace,
    frozen: AtomicBool,
    thaws: AtomicBool,
    group: ArcSwap<Group>,
}

impl User {
    /// Whether the operator froze the user; calls that are running see it at their next slice.
    pub fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Relaxed)
    }

    /// Whether it is frozen only until the next credit.
    pub fn thaws(&self) -> bool {
        self.thaws.load(Ordering::Relaxed)
    }

    /// Lets a request in, or says after how many seconds the group's requests a minute allow it.
    pub fn admit(&self, now_ms: i64) -> Result<(), u64> {
        self.group().requests_per_minute.map_or(Ok(()), |per_minute| self.pace.admit(per_minute, now_ms))
    }

    /// The user's group as it is now.
    pub fn group(&self) -> Arc<Group> {
        self.group.load_full()
    }
}

/// A key that works.
#[derive(Debug)]
pub struct Key {
    pub id: i64,
    pub user: Arc<User>,
    /// Against the key's own limits.
    pub spending: Arc<Spending>,
    /// Allowed models; `None`: those of the user's group.
    models: Option<HashSet<String>>,
    revoked: Arc<AtomicBool>,
    expires_ms: Option<i64>,
}

impl Key {
    /// Whether it was revoked since it was found; calls that are running see it at their next slice.
    pub fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Relaxed)
    }

    /// Whether it may call `model`: by itself, and by its user's group.
    pub fn allows(&self, model: &str) -> bool {
        self.models.as_ref().is_none_or(|models| models.contains(model)) && self.user.group().allows(model)
    }
}

/// Every key that works, by its hash.
#[derive(Debug, Default)]
pub struct Users {
    tables: RwLock<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    groups: HashMap<i64, Arc<Group>>,
    users: HashMap<i64, Arc<User>>,
    keys: HashMap<[u8; 32], Arc<Key>>,
    hashes: HashMap<i64, [u8; 32]>,
}

/// The hash under which a key is stored. Keys are 192 random bits, so a plain SHA-256 is enough: there is nothing to guess.
pub fn hash_key(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

impl Users {
    /// Reads everything.
    pub async fn load(store: &Store) -> Result<Users, StoreError> {
        let users = Users::default();
        users.reload(store).await?;
        Ok(users)
    }

    /// The key that was presented, if it works at `now_ms`.
    pub fn find(&self, presented: &str, now_ms: i64) -> Option<Arc<Key>> {
        let hash = hash_key(presented);
        let tables = self.tables.read().expect("no holder of this lock panics");
        let key = tables.keys.get(&hash)?;
        key.expires_ms.is_none_or(|expires| now_ms < expires).then(|| key.clone())
    }

    /// Reads again what a change names.
    pub async fn apply(&self, store: &Store, change: &Change) -> Result<(), StoreError> {
        match change {
            Change::Group => self.reload(store).await,
            Change::User(id) => {
                let rows = store.users(Some(*id)).await?;
                self.write(|tables| rows.into_iter().for_each(|row| tables.put_user(row)));
                Ok(())
            }
            Change::Key(id) => {
                let rows = store.keys(Some(*id)).await?;
                self.write(|tables| rows.into_iter().for_each(|row| tables.put_key(row)));
                Ok(())
            }
            Change::Account | Change::Balance(_) | Change::Short(_) => Ok(()),
        }
    }

    async fn reload(&self, store: &Store) -> Result<(), StoreError> {
        let (groups, users, keys) = (store.groups().await?, store.users(None).await?, store.keys(None).await?);
        self.write(|tables| {
            groups.into_iter().for_each(|row| tables.put_group(row));
            users.into_iter().for_each(|row| tables.put_user(row));
            keys.into_iter().for_each(|row| tables.put_key(row));
        });
        Ok(())
    }

    fn write(&self, change: impl FnOnce(&mut Tables)) {
        change(&mut self.tables.write().expect("no holder of this lock panics"));
    }
}

impl UserRow {
    fn limits(&self) -> Limits {
        Limits { total: None, day: self.day_nano, month: self.month_nano }
    }
}

impl KeyRow {
    fn limits(&self) -> Limits {
        Limits { total: self.limit_nano, day: self.day_nano, month: self.month_nano }
    }
}

impl Tables {
    fn put_group(&mut self, row: GroupRow) {
        let GroupRow { id, name, ratio_micro, models, concurrency, requests_per_minute } = row;
        let models = models.map(|models| models.into_iter().collect());
        let group = Group { id, name, ratio_micro, models, concurrency, requests_per_minute };
        self.groups.insert(id, Arc::new(group));
    }

    fn put_user(&mut self, row: UserRow) {
        let Some(group) = self.groups.get(&row.group_id).cloned() else { return };
        let limits = row.limits();
        match self.users.get(&row.id) {
            Some(user) => {
                user.thaws.store(row.thaws, Ordering::Relaxed);
                user.frozen.store(row.frozen, Ordering::Relaxed);
                user.spending.limit(limits);
                user.group.store(group);
            }
            None => {
                let (frozen, thaws) = (AtomicBool::new(row.frozen), AtomicBool::new(row.thaws));
                let spending = Arc::new(Spending::default());
                spending.limit(limits);
                let (pace, group) = (Pace::default(), ArcSwap::new(group));
                let user = User { id: row.id, name: row.name, spending, pace, frozen, thaws, group };
                self.users.insert(row.id, Arc::new(user));
            }
        }
    }

    fn put_key(&mut self, row: KeyRow) {
        let old = self.hashes.remove(&row.id).and_then(|hash| self.keys.remove(&hash));
        if let Some(old) = old.as_ref().filter(|_| row.revoked_ms.is_some()) {
            old.revoked.store(true, Ordering::Relaxed);
        }
        let Some(user) = self.users.get(&row.user_id).cloned() else { return };
        if row.revoked_ms.is_some() {
            return;
        }
        // Running calls have the key as it was: what they hold counts against it, and its end is theirs.
        let (spending, revoked) = old.map_or_else(Default::default, |old| (old.spending.clone(), old.revoked.clone()));
        spending.limit(row.limits());
        let models = row.models.map(|models| models.into_iter().collect());
        let expires_ms = row.expires_ms;
        self.hashes.insert(row.id, row.hash);
        self.keys.insert(row.hash, Arc::new(Key { id: row.id, user, spending, models, revoked, expires_ms }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&crate::config::DatabaseUrl::Sqlite(folder.path().join("x.db"))).await.unwrap();
        (folder, store)
    }

    async fn apply_changes(users: &Users, store: &Store, since: i64) {
        for change in store.changes_since(since).await.unwrap().1 {
            users.apply(store, &change).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_running_call_sees_its_key_revoked_although_the_key_was_changed_meanwhile() {
        let (_folder, store) = store().await;
        let key = (hash_key("sk-9"), "hint".to_owned());
        store.add_user("bea".into(), "default".into(), 0, Some(key)).await.unwrap();
        let users = Users::load(&store).await.unwrap();
        let id = store.keys(None).await.unwrap().pop().unwrap().id;
        let running = users.find("sk-9", 0).unwrap();
        store.limit_key(id, crate::store::NewLimits { day_nano: Some(Some(5)), ..Default::default() }).await.unwrap();
        users.apply(&store, &Change::Key(id)).await.unwrap();
        assert!(!running.is_revoked());
        store.revoke_key(id).await.unwrap();
        users.apply(&store, &Change::Key(id)).await.unwrap();
        assert!(running.is_revoked());
    }

    #[tokio::test]
    async fn a_key_made_and_revoked_beside_the_server_is_seen_from_the_changes() {
        let (_folder, store) = store().await;
        let users = Users::load(&store).await.unwrap();
        let since = store.change_sequence().await.unwrap();
        store.add_user("ann".into(), "default".into(), 5, Some((hash_key("sk-1"), "sk-1".into()))).await.unwrap();
        apply_changes(&users, &store, since).await;
        let key = users.find("sk-1", 0).unwrap();
        assert_eq!(key.user.name, "ann");
        assert!(users.find("sk-2", 0).is_none());
        store.revoke_key(key.id).await.unwrap();
        apply_changes(&users, &store, since).await;
        assert!(users.find("sk-1", 0).is_none());
    }

    #[tokio::test]
    async fn a_freeze_is_seen_through_a_user_that_is_held_already() {
        let (_folder, store) = store().await;
        store.add_user("ann".into(), "default".into(), 0, Some((hash_key("sk-1"), "sk-1".into()))).await.unwrap();
        let users = Users::load(&store).await.unwrap();
        let held = users.find("sk-1", 0).unwrap();
        let since = store.change_sequence().await.unwrap();
        store.set_frozen("ann".into(), true, false).await.unwrap();
        apply_changes(&users, &store, since).await;
        assert!(held.user.is_frozen());
    }

    #[test]
    fn an_expired_key_is_no_key() {
        let users = Users::default();
        users.write(|tables| {
            let group = GroupRow {
                id: 1,
                name: "g".into(),
                ratio_micro: 1,
                models: None,
                concurrency: None,
                requests_per_minute: None,
            };
            tables.put_group(group);
            let user = UserRow {
                id: 1,
                name: "ann".into(),
                group_id: 1,
                balance_nano: 0,
                leased_nano: 0,
                frozen: false,
                thaws: false,
                day_nano: None,
                month_nano: None,
                created_ms: 0,
            };
            tables.put_user(user);
            let key = KeyRow {
                id: 1,
                user_id: 1,
                hash: hash_key("sk-1"),
                hint: String::new(),
                name: String::new(),
                created_ms: 0,
                expires_ms: Some(100),
                revoked_ms: None,
                models: None,
                limit_nano: None,
                day_nano: None,
                month_nano: None,
            };
            tables.put_key(key);
        });
        assert!(users.find("sk-1", 99).is_some());
        assert!(users.find("sk-1", 100).is_none());
    }
}
