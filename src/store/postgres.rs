//! PostgreSQL: a few pooled connections, and deadlines for whatever crosses the network.

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use deadpool_postgres::{Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime, Timeouts};
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{AsyncMessage, Config};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::lines::{LINE_COLUMNS_ALL, fields};
use super::seal::{hex, unhex};
use super::tx::{Cell, Row, Tx, Value};
use super::{BootId, DayRow, Line, Notice, StoreError, days, migrate};

/// Connections of a node: its shipper, its heartbeat, and a few grants at a time.
const CONNECTIONS: usize = 8;
/// What one transaction may take, all of it; the server gives up as soon.
const TRANSACTION_MAX: Duration = Duration::from_secs(5);
/// What a report or a migration may take.
const LONG_MAX: Duration = Duration::from_secs(3600);
/// What making a connection may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Data that nobody acknowledges for so long ends its connection.
const UNANSWERED_MAX: Duration = Duration::from_secs(10);
/// Requests for users' money that wait to be read; a node that misses one is asked again.
const SHORT_MAX: usize = 256;
/// A listener whose connection has ended tries again after this.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);
/// And one that hears nothing asks so often whether anybody is there.
const LISTEN_CHECK: Duration = Duration::from_secs(5);

/// Where notices are put: apart, so that a flood of changes pushes out no request for money.
struct Told {
    changes: Arc<Notify>,
    short: mpsc::Sender<Notice>,
}

/// What the database tells. Any number of changes that nobody has heard of yet are one notice.
#[derive(Debug)]
pub struct Notices {
    changes: Arc<Notify>,
    short: mpsc::Receiver<Notice>,
}

impl Notices {
    /// The next notice, requests for money first; `None` once nobody listens any more.
    pub async fn recv(&mut self) -> Option<Notice> {
        tokio::select! {
            biased;
            short = self.short.recv() => short,
            () = self.changes.notified() => Some(Notice::Changes),
        }
    }
}

/// The pool, and how to connect beside it.
pub struct Postgres {
    pool: Pool,
    config: Config,
    tls: MakeRustlsConnect,
}

impl std::fmt::Debug for Postgres {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Postgres(***)")
    }
}

impl Postgres {
    /// Reads the URL, connects and migrates. TLS is used where `sslmode` asks for it, and the certificate and its name are
    /// checked against the system's roots then (or those of `SSL_CERT_FILE`).
    pub async fn open(url: &str) -> Result<Postgres, StoreError> {
        // What a URL is wrong about may repeat a part of it, and it holds a password.
        let mut config: Config = known_mode(url)
            .parse()
            .map_err(|_| StoreError::Open("PostgreSQL".into(), "its URL does not parse".into()))?;
        let options = format!(
            "{} -c synchronous_commit=on -c statement_timeout={ms} -c idle_in_transaction_session_timeout={ms}",
            config.get_options().unwrap_or_default(),
            ms = TRANSACTION_MAX.as_millis()
        );
        config.options(options).connect_timeout(CONNECT_MAX);
        config.tcp_user_timeout(UNANSWERED_MAX).keepalives_idle(UNANSWERED_MAX);
        if config.get_application_name().is_none() {
            config.application_name("gpt-cat");
        }
        let tls = MakeRustlsConnect::new(trust()?);
        let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = Manager::from_config(config.clone(), tls.clone(), recycling);
        let bounds = Timeouts { wait: Some(TRANSACTION_MAX), create: Some(CONNECT_MAX), recycle: Some(CONNECT_MAX) };
        let pool = Pool::builder(manager)
            .max_size(CONNECTIONS)
            .timeouts(bounds)
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| StoreError::Open("PostgreSQL".into(), error.to_string()))?;
        let opened = Postgres { pool, config, tls };
        let mut connection =
            opened.lend().await.map_err(|error| StoreError::Open("PostgreSQL".into(), error.to_string()))?;
        migrate::postgres(&mut connection).await?;
        connection.give_back();
        Ok(opened)
    }

    /// A connection for one transaction.
    pub async fn lend(&self) -> Result<Lent, StoreError> {
        self.pool.get().await.map(Lent).map_err(|error| match error {
            deadpool_postgres::PoolError::Backend(error) => StoreError::Unreached(told(&error)),
            error => StoreError::Unreached(error.to_string()),
        })
    }

    /// Tells of new rows in `changes`, and of users whose money another node asks for, for as long as the receiver
    /// lives; connects again by itself.
    pub fn listen(&self) -> Notices {
        let (short, notices) = mpsc::channel(SHORT_MAX);
        let told = Told { changes: Arc::default(), short };
        let notices = Notices { changes: told.changes.clone(), short: notices };
        let (config, tls) = (self.config.clone(), self.tls.clone());
        tokio::spawn(async move {
            while !told.short.is_closed() {
                if let Err(error) = listen_once(&config, &tls, &told).await {
                    tracing::warn!(%error, "not listening to PostgreSQL; changes are seen by asking");
                }
                tokio::time::sleep(LISTEN_AGAIN).await;
            }
        });
        notices
    }
}

/// The URL with a `sslmode` that is known to its reader: `require` checks everything here, as `verify-full` asks for.
fn known_mode(url: &str) -> String {
    match url.split_once('?') {
        Some((server, options)) => format!("{server}?{}", options.replace("sslmode=verify-full", "sslmode=require")),
        None => url.to_owned(),
    }
}

async fn listen_once(config: &Config, tls: &MakeRustlsConnect, told: &Told) -> Result<(), StoreError> {
    let late = |_| StoreError::Database("no answer in time".into());
    let (client, mut connection) = timeout(TRANSACTION_MAX, config.connect(tls.clone())).await.map_err(late)??;
    let hearing = async {
        while let Some(message) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(notice) = message? {
                match read_notice(notice.payload()) {
                    Notice::Changes => told.changes.notify_one(),
                    short => drop(told.short.try_send(short)), // a full queue: it is asked again
                }
            }
        }
        Ok(())
    };
    // A connection that only reads does not notice that nobody is there any more.
    let asking = async {
        client.batch_execute("LISTEN gpt_cat").await?;
        loop {
            sleep(LISTEN_CHECK).await;
            timeout(TRANSACTION_MAX, client.batch_execute("SELECT 1")).await.map_err(late)??;
        }
    };
    tokio::select! {
        ended = hearing => ended,
        failed = asking => failed,
        () = told.short.closed() => Ok(()),
    }
}

/// What a notice says; one that is not understood is a reason to look.
fn read_notice(payload: &str) -> Notice {
    let mut words = payload.split(' ');
    match (words.next(), words.next().map(str::parse), words.next().and_then(unhex)) {
        (Some("short"), Some(Ok(user_id)), Some(asking)) => Notice::Short { user_id, asking },
        _ => Notice::Changes,
    }
}

fn trust() -> Result<ClientConfig, StoreError> {
    let failed = |error: String| StoreError::Open("PostgreSQL".into(), error);
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(error.to_string()))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// A connection for one transaction. It goes back to the pool only by [`Lent::give_back`]: one that was left in the
/// middle of something, since its time was over, is closed.
pub struct Lent(Object);

impl Lent {
    /// Runs one transaction within its time. When it fails or is late, whether a commit happened is unknown.
    pub async fn within<T>(long: bool, work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        let bound = if long { LONG_MAX } else { TRANSACTION_MAX };
        let late = |_| StoreError::Database(format!("no answer within {} s", bound.as_secs()));
        tokio::time::timeout(bound, work).await.map_err(late)?
    }

    /// Begins a transaction, in which each statement sees what was committed before it.
    pub async fn begin(&mut self, long: bool) -> Result<PgTx<'_>, StoreError> {
        let tx = PgTx::Transaction(self.0.transaction().await?);
        if long {
            tx.batch("SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0").await?;
        }
        Ok(tx)
    }

    /// Statements that only read, without a transaction around them: each would see what was committed before it anyway.
    pub fn look(&mut self) -> PgTx<'_> {
        PgTx::Each(&self.0)
    }

    /// Gives the connection back to the pool.
    pub fn give_back(self) {
        drop(self);
    }

    /// Closes the connection.
    pub fn close(self) {
        drop(Object::take(self.0));
    }
}

impl From<tokio_postgres::Error> for StoreError {
    fn from(error: tokio_postgres::Error) -> StoreError {
        match error.code() {
            Some(&SqlState::FOREIGN_KEY_VIOLATION) => StoreError::Dangling,
            _ => StoreError::Database(told(&error)),
        }
    }
}

fn told(error: &tokio_postgres::Error) -> String {
    // Its own text is "db error"; what happened is in its source. Values of rows are in the detail, which stays out.
    let source = error.as_db_error().map(|error| error.message().to_owned());
    let source = source.or_else(|| error.source().map(ToString::to_string));
    source.map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

/// A transaction of PostgreSQL, or a connection on which each statement is one.
pub enum PgTx<'a> {
    Transaction(deadpool_postgres::Transaction<'a>),
    Each(&'a Object),
}

impl PgTx<'_> {
    /// Runs statements without parameters.
    pub async fn batch(&self, sql: &str) -> Result<(), StoreError> {
        match self {
            PgTx::Transaction(tx) => tx.batch_execute(sql).await?,
            PgTx::Each(client) => client.batch_execute(sql).await?,
        }
        Ok(())
    }

    /// Commits; an error leaves it unknown whether it did.
    pub async fn commit(self) -> Result<(), StoreError> {
        match self {
            PgTx::Transaction(tx) => Ok(tx.commit().await?),
            PgTx::Each(_) => Ok(()),
        }
    }
}

impl ToSql for Value {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self {
            Value::Int(value) => value.to_sql_checked(ty, out),
            Value::Text(value) => value.to_sql_checked(ty, out),
            Value::Blob(value) => value.to_sql_checked(ty, out),
            Value::Bool(value) => value.to_sql_checked(ty, out),
        }
    }

    fn accepts(_: &Type) -> bool {
        true // its parts check
    }

    to_sql_checked!();
}

impl<'a> FromSql<'a> for Cell {
    fn from_sql(ty: &Type, raw: &'a [u8]) -> Result<Cell, Box<dyn std::error::Error + Sync + Send>> {
        Ok(match *ty {
            Type::BOOL => Cell::Bool(bool::from_sql(ty, raw)?),
            Type::INT8 => Cell::Int(i64::from_sql(ty, raw)?),
            Type::INT4 => Cell::Int(i32::from_sql(ty, raw)?.into()),
            Type::BYTEA => Cell::Blob(Vec::from_sql(ty, raw)?),
            _ => Cell::Text(String::from_sql(ty, raw)?),
        })
    }

    fn from_sql_null(_: &Type) -> Result<Cell, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Cell::Null)
    }

    fn accepts(ty: &Type) -> bool {
        matches!(*ty, Type::BOOL | Type::INT8 | Type::INT4 | Type::BYTEA | Type::TEXT | Type::VARCHAR | Type::NAME)
    }
}

impl PgTx<'_> {
    async fn query(&self, sql: &str, given: &[&(dyn ToSql + Sync)]) -> Result<Vec<tokio_postgres::Row>, StoreError> {
        Ok(match self {
            PgTx::Transaction(tx) => tx.query(&tx.prepare_cached(sql).await?, given).await?,
            PgTx::Each(client) => client.query(&client.prepare_cached(sql).await?, given).await?,
        })
    }
}

fn read_rows(rows: &[tokio_postgres::Row]) -> Result<Vec<Row>, StoreError> {
    let read = |row: &tokio_postgres::Row| {
        (0..row.len()).map(|index| Ok(row.try_get(index)?)).collect::<Result<Vec<Cell>, StoreError>>().map(Row)
    };
    rows.iter().map(read).collect()
}

impl Tx for PgTx<'_> {
    const FOR_UPDATE: &'static str = " FOR NO KEY UPDATE";

    fn ids(parameter: &str) -> String {
        format!(
            "SELECT CAST(value AS BIGINT) FROM json_array_elements_text(CAST(CAST({parameter} AS TEXT) AS JSON)) AS ids (value)"
        )
    }

    async fn execute(&self, sql: &str, given: &[Value]) -> Result<u64, StoreError> {
        let given: Vec<&(dyn ToSql + Sync)> = given.iter().map(|value| value as _).collect();
        Ok(match self {
            PgTx::Transaction(tx) => tx.execute(&tx.prepare_cached(sql).await?, &given).await?,
            PgTx::Each(client) => client.execute(&client.prepare_cached(sql).await?, &given).await?,
        })
    }

    async fn rows(&self, sql: &str, given: &[Value]) -> Result<Vec<Row>, StoreError> {
        let given: Vec<&(dyn ToSql + Sync)> = given.iter().map(|value| value as _).collect();
        read_rows(&self.query(sql, &given).await?)
    }

    async fn now_ms(&self) -> Result<i64, StoreError> {
        let sql = "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)";
        self.row(sql, &[]).await?.ok_or_else(|| StoreError::Database("no clock".into()))?.get(0)
    }

    async fn snapshot(&self) -> Result<(), StoreError> {
        self.batch("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ").await
    }

    async fn tell_short(&self, user_id: i64, asking: BootId) -> Result<(), StoreError> {
        let notice = format!("short {user_id} {}", hex(&asking));
        self.query("SELECT pg_notify('gpt_cat', $1)", &[&notice]).await?;
        Ok(())
    }

    async fn insert_lines(&self, boot: BootId, lines: &[Line]) -> Result<Vec<u64>, StoreError> {
        let columns = columns_of(lines.iter().map(|line| fields(boot, line)));
        if columns.is_empty() {
            return Ok(Vec::new());
        }
        let sql = format!(
            "INSERT INTO lines ({LINE_COLUMNS_ALL}) {} ON CONFLICT DO NOTHING RETURNING sequence",
            unnested(&columns)
        );
        let given: Vec<&(dyn ToSql + Sync)> = columns.iter().map(Column::as_sql).collect();
        let inserted = self.query(&sql, &given).await?;
        inserted.iter().map(|row| Ok(row.try_get::<_, i64>(0)? as u64)).collect()
    }

    async fn add_days(&self, rows: &[DayRow]) -> Result<(), StoreError> {
        let columns = columns_of(rows.iter().map(days::fields));
        if !columns.is_empty() {
            let given: Vec<&(dyn ToSql + Sync)> = columns.iter().map(Column::as_sql).collect();
            self.query(&days::upsert(&unnested(&columns)), &given).await?;
        }
        Ok(())
    }

    async fn lease_amounts(&self, boot: BootId, users: Vec<i64>) -> Result<Vec<(i64, i64)>, StoreError> {
        let sql = "SELECT user_id, amount_nano FROM leases WHERE boot = $1 AND user_id = ANY($2)";
        let rows = self.query(sql, &[&&boot[..], &users]).await?;
        rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
    }

    async fn lock_balances(&self, users: Vec<i64>) -> Result<Vec<(i64, i64, i64)>, StoreError> {
        let sql = "SELECT id, balance_nano, (SELECT count(*) FROM boots WHERE state = 'live')
                   FROM users WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE";
        let rows = self.query(sql, &[&users]).await?;
        rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))).collect()
    }

    async fn lease_out(&self, boot: BootId, amounts: Vec<(i64, i64)>) -> Result<Vec<Row>, StoreError> {
        let (users, amounts): (Vec<i64>, Vec<i64>) = amounts.into_iter().unzip();
        let sql = "WITH granted AS (SELECT * FROM unnest($2::bigint[], $3::bigint[]) AS granted (user_id, amount)),
                   taken AS (UPDATE users SET balance_nano = balance_nano - amount
                             FROM granted WHERE users.id = granted.user_id)
                   INSERT INTO leases (user_id, boot, amount_nano, granted_nano)
                   SELECT user_id, $1, amount, amount FROM granted
                   ON CONFLICT (user_id, boot) DO UPDATE SET amount_nano = leases.amount_nano + excluded.amount_nano,
                   granted_nano = leases.granted_nano + excluded.granted_nano, version = leases.version + 1
                   RETURNING amount_nano, granted_nano, version, user_id";
        read_rows(&self.query(sql, &[&&boot[..], &users, &amounts]).await?)
    }

    async fn forget_leases(&self, boot: BootId, users: Vec<i64>) -> Result<Vec<i64>, StoreError> {
        let sql = "DELETE FROM leases WHERE boot = $1 AND user_id = ANY($2) AND amount_nano = 0 RETURNING user_id";
        let rows = self.query(sql, &[&&boot[..], &users]).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    async fn cap_lines(&self, boot: BootId, capped: Vec<(u64, i64, i64)>) -> Result<(), StoreError> {
        let mut columns = [Vec::new(), Vec::new(), Vec::new()];
        for (sequence, charged, absorbed) in capped {
            columns.iter_mut().zip([sequence as i64, charged, absorbed]).for_each(|(column, value)| column.push(value));
        }
        let [sequences, charged, absorbed] = columns;
        let sql = "UPDATE lines SET charged_nano = capped.charged, absorbed_nano = absorbed_nano + capped.absorbed,
                   flagged = TRUE
                   FROM unnest($2::bigint[], $3::bigint[], $4::bigint[]) AS capped (sequence, charged, absorbed)
                   WHERE lines.boot = $1 AND lines.sequence = capped.sequence RETURNING 1";
        self.query(sql, &[&&boot[..], &sequences, &charged, &absorbed]).await?;
        Ok(())
    }

    async fn charge_leases(&self, boot: BootId, charges: Vec<(i64, i64)>) -> Result<Vec<i64>, StoreError> {
        let (users, amounts): (Vec<i64>, Vec<i64>) = charges.into_iter().unzip();
        let sql = "UPDATE leases SET amount_nano = amount_nano - charge.amount
                   FROM unnest($2::bigint[], $3::bigint[]) AS charge (user_id, amount)
                   WHERE leases.boot = $1 AND leases.user_id = charge.user_id AND leases.amount_nano >= charge.amount
                   RETURNING leases.user_id";
        let rows = self.query(sql, &[&&boot[..], &users, &amounts]).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }
}

/// The rows of many values, a column a parameter: one statement for any number of them.
fn unnested(columns: &[Column]) -> String {
    let types = columns.iter().zip(1..).map(|(column, number)| format!("${number}::{}[]", column.type_name()));
    format!("SELECT * FROM unnest({})", types.collect::<Vec<_>>().join(", "))
}

fn columns_of<const N: usize>(rows: impl Iterator<Item = [Value; N]>) -> Vec<Column> {
    let mut columns: Vec<Column> = Vec::new();
    for row in rows {
        for (index, value) in row.into_iter().enumerate() {
            if index == columns.len() {
                columns.push(Column::like(&value));
            }
            columns[index].push(value);
        }
    }
    columns
}

/// The values of one column of many rows.
enum Column {
    Int(Vec<Option<i64>>),
    Text(Vec<Option<String>>),
    Blob(Vec<Vec<u8>>),
    Bool(Vec<bool>),
}

impl Column {
    fn like(value: &Value) -> Column {
        match value {
            Value::Int(_) => Column::Int(Vec::new()),
            Value::Text(_) => Column::Text(Vec::new()),
            Value::Blob(_) => Column::Blob(Vec::new()),
            Value::Bool(_) => Column::Bool(Vec::new()),
        }
    }

    fn push(&mut self, value: Value) {
        match (self, value) {
            (Column::Int(values), Value::Int(value)) => values.push(value),
            (Column::Text(values), Value::Text(value)) => values.push(value),
            (Column::Blob(values), Value::Blob(value)) => values.push(value),
            (Column::Bool(values), Value::Bool(value)) => values.push(value),
            _ => unreachable!("a field of a line has one type"),
        }
    }

    fn type_name(&self) -> &'static str {
        match self {
            Column::Int(_) => "bigint",
            Column::Text(_) => "text",
            Column::Blob(_) => "bytea",
            Column::Bool(_) => "boolean",
        }
    }

    fn as_sql(&self) -> &(dyn ToSql + Sync) {
        match self {
            Column::Int(values) => values,
            Column::Text(values) => values,
            Column::Blob(values) => values,
            Column::Bool(values) => values,
        }
    }
}
