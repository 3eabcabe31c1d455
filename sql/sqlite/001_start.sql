-- Money is nano-units (10^-9) of the one currency in `settings`; times are milliseconds since 1970 UTC.
-- Users and keys are closed, never deleted: lines and entries refer to them for good.

CREATE TABLE settings (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

CREATE TABLE groups (
    id          INTEGER PRIMARY KEY,
    name        TEXT    NOT NULL UNIQUE,
    ratio_micro INTEGER NOT NULL DEFAULT 1000000 CHECK (ratio_micro BETWEEN 0 AND 1000000000),
    models      TEXT,              -- JSON array of allowed models; NULL: all
    concurrency INTEGER CHECK (concurrency > 0)
) STRICT;
INSERT INTO groups (id, name) VALUES (1, 'default');

CREATE TABLE users (
    id           INTEGER PRIMARY KEY,
    name         TEXT    NOT NULL UNIQUE,
    group_id     INTEGER NOT NULL DEFAULT 1 REFERENCES groups (id),
    balance_nano INTEGER NOT NULL DEFAULT 0 CHECK (balance_nano >= 0),
    frozen       INTEGER NOT NULL DEFAULT 0 CHECK (frozen IN (0, 1)),
    created_ms   INTEGER NOT NULL
) STRICT;

CREATE TABLE keys (
    id         INTEGER PRIMARY KEY,
    user_id    INTEGER NOT NULL REFERENCES users (id),
    hash       BLOB    NOT NULL UNIQUE,  -- SHA-256 of the key; the key itself is shown once and stored nowhere
    hint       TEXT    NOT NULL,         -- its last four characters
    name       TEXT    NOT NULL DEFAULT '',
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER,
    revoked_ms INTEGER
) STRICT;
CREATE INDEX keys_user ON keys (user_id);

CREATE TABLE accounts (
    id          INTEGER PRIMARY KEY,
    name        TEXT    NOT NULL UNIQUE,
    endpoint    TEXT    NOT NULL,
    sealed_key  BLOB    NOT NULL,
    hint        TEXT    NOT NULL,
    base_url    TEXT,
    models      TEXT,              -- JSON array of models it serves; NULL: all of its endpoint's
    weight      INTEGER NOT NULL DEFAULT 1 CHECK (weight BETWEEN 1 AND 1000),
    tier        INTEGER NOT NULL DEFAULT 0 CHECK (tier BETWEEN 0 AND 1000),
    concurrency INTEGER CHECK (concurrency > 0),
    enabled     INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    created_ms  INTEGER NOT NULL,
    removed_ms  INTEGER
) STRICT;

-- Credits (> 0) and debits (< 0), in the order they were made.
CREATE TABLE entries (
    id          INTEGER PRIMARY KEY,
    user_id     INTEGER NOT NULL REFERENCES users (id),
    amount_nano INTEGER NOT NULL CHECK (amount_nano <> 0),
    note        TEXT    NOT NULL DEFAULT '',
    at_ms       INTEGER NOT NULL
) STRICT;
CREATE INDEX entries_user ON entries (user_id);

-- One life of one process. `shipped` is the watermark: how many END records of its journal are lines here.
CREATE TABLE boots (
    id         BLOB    PRIMARY KEY,
    state      TEXT    NOT NULL DEFAULT 'live' CHECK (state IN ('live', 'forfeited', 'closed')),
    started_ms INTEGER NOT NULL,
    seen_ms    INTEGER NOT NULL,
    shipped    INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;

-- Money that a boot has taken out of a balance to hold from: granted - returned - shipped charges.
CREATE TABLE leases (
    user_id     INTEGER NOT NULL REFERENCES users (id),
    boot        BLOB    NOT NULL REFERENCES boots (id),
    amount_nano INTEGER NOT NULL CHECK (amount_nano >= 0),
    granted_nano INTEGER NOT NULL, -- granted - returned, ever: tells a node what became of a commit it heard nothing of
    version     INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (user_id, boot)
) STRICT, WITHOUT ROWID;
CREATE INDEX leases_boot ON leases (boot);

-- Every price that was ever in force, so that a line can be recomputed.
CREATE TABLE prices (
    version           INTEGER PRIMARY KEY,
    model             TEXT    NOT NULL,
    input_nano        INTEGER NOT NULL, -- per million tokens
    cached_input_nano INTEGER NOT NULL,
    output_nano       INTEGER NOT NULL,
    per_call_nano     INTEGER NOT NULL,
    from_ms           INTEGER NOT NULL
) STRICT;
CREATE INDEX prices_model ON prices (model, version);

CREATE TABLE lines (
    boot              BLOB    NOT NULL REFERENCES boots (id),
    sequence          INTEGER NOT NULL,
    request_id        TEXT    NOT NULL,
    client_request_id TEXT,
    user_id           INTEGER NOT NULL REFERENCES users (id),
    key_id            INTEGER NOT NULL REFERENCES keys (id),
    ratio_micro       INTEGER NOT NULL,
    account_id        INTEGER,          -- NULL: no account was reached, or the built-in demo
    endpoint          TEXT,
    model_asked       TEXT    NOT NULL,
    model             TEXT    NOT NULL, -- after title catch, before mapping: the name that has the price
    model_upstream    TEXT,             -- after mapping
    price_version     INTEGER NOT NULL REFERENCES prices (version),
    tier              INTEGER NOT NULL DEFAULT 0,
    input             INTEGER NOT NULL, -- billed tokens
    cached_input      INTEGER NOT NULL,
    output            INTEGER NOT NULL,
    usage_input       INTEGER,          -- as the upstream said
    usage_cached      INTEGER,
    usage_output      INTEGER,
    usage_reasoning   INTEGER,
    counted_input     INTEGER,          -- as counted here; NULL: counting was not needed
    counted_output    INTEGER,
    billed            TEXT    NOT NULL CHECK (billed IN ('usage', 'count', 'mark', 'hold', 'nothing')),
    calibration_micro INTEGER NOT NULL DEFAULT 1000000,
    estimated         INTEGER NOT NULL DEFAULT 0 CHECK (estimated IN (0, 1)),
    flagged           INTEGER NOT NULL DEFAULT 0 CHECK (flagged IN (0, 1)),
    hold_nano         INTEGER NOT NULL,
    charged_nano      INTEGER NOT NULL CHECK (charged_nano >= 0),
    absorbed_nano     INTEGER NOT NULL CHECK (absorbed_nano >= 0),
    started_ms        INTEGER NOT NULL,
    content_after_ms  INTEGER,          -- time to first content
    duration_ms       INTEGER NOT NULL,
    end_reason        TEXT    NOT NULL,
    status            INTEGER NOT NULL,
    tries             INTEGER NOT NULL,
    PRIMARY KEY (boot, sequence)
) STRICT, WITHOUT ROWID;
CREATE INDEX lines_user ON lines (user_id, started_ms);
CREATE INDEX lines_started ON lines (started_ms);

-- What a running server has to read again; triggers write it, so that no path can forget to.
CREATE TABLE changes (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    kind     TEXT    NOT NULL, -- group, user, key, account, balance
    row      INTEGER NOT NULL
) STRICT;
CREATE TRIGGER groups_added   AFTER INSERT ON groups   BEGIN INSERT INTO changes (kind, row) VALUES ('group', new.id); END;
CREATE TRIGGER groups_changed AFTER UPDATE ON groups   BEGIN INSERT INTO changes (kind, row) VALUES ('group', new.id); END;
CREATE TRIGGER users_added    AFTER INSERT ON users    BEGIN INSERT INTO changes (kind, row) VALUES ('user', new.id); END;
CREATE TRIGGER users_changed  AFTER UPDATE OF name, group_id, frozen ON users
                                                       BEGIN INSERT INTO changes (kind, row) VALUES ('user', new.id); END;
CREATE TRIGGER keys_added     AFTER INSERT ON keys     BEGIN INSERT INTO changes (kind, row) VALUES ('key', new.id); END;
CREATE TRIGGER keys_changed   AFTER UPDATE ON keys     BEGIN INSERT INTO changes (kind, row) VALUES ('key', new.id); END;
CREATE TRIGGER accounts_added   AFTER INSERT ON accounts BEGIN INSERT INTO changes (kind, row) VALUES ('account', new.id); END;
CREATE TRIGGER accounts_changed AFTER UPDATE ON accounts BEGIN INSERT INTO changes (kind, row) VALUES ('account', new.id); END;
CREATE TRIGGER entries_added  AFTER INSERT ON entries  BEGIN INSERT INTO changes (kind, row) VALUES ('balance', new.user_id); END;
