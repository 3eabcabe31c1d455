-- What each day came to: written with the lines, in the same transaction, and there when they are pruned.
CREATE TABLE days (
    day           INTEGER NOT NULL, -- since 1970-01-01 UTC, of the calls' beginning
    user_id       INTEGER NOT NULL REFERENCES users (id),
    key_id        INTEGER NOT NULL REFERENCES keys (id),
    model         TEXT    NOT NULL,
    calls         INTEGER NOT NULL,
    input         INTEGER NOT NULL, -- billed tokens
    cached_input  INTEGER NOT NULL,
    output        INTEGER NOT NULL,
    charged_nano  INTEGER NOT NULL,
    absorbed_nano INTEGER NOT NULL,
    PRIMARY KEY (day, user_id, key_id, model)
) STRICT, WITHOUT ROWID;
CREATE INDEX days_user ON days (user_id, day);
CREATE INDEX days_key ON days (key_id, day);
INSERT INTO days SELECT started_ms / 86400000, user_id, key_id, model, count(*), sum(input), sum(cached_input),
                        sum(output), sum(charged_nano), sum(absorbed_nano)
                 FROM lines GROUP BY 1, 2, 3, 4;

-- Limits are on what is charged; NULL: none.
ALTER TABLE keys ADD COLUMN models     TEXT; -- JSON array of allowed models; NULL: those of the user's group
ALTER TABLE keys ADD COLUMN limit_nano INTEGER CHECK (limit_nano >= 0); -- in all
ALTER TABLE keys ADD COLUMN day_nano   INTEGER CHECK (day_nano >= 0);   -- each day, UTC
ALTER TABLE keys ADD COLUMN month_nano INTEGER CHECK (month_nano >= 0); -- each month, UTC
ALTER TABLE users ADD COLUMN day_nano   INTEGER CHECK (day_nano >= 0);
ALTER TABLE users ADD COLUMN month_nano INTEGER CHECK (month_nano >= 0);
ALTER TABLE users ADD COLUMN thaws     INTEGER NOT NULL DEFAULT 0 CHECK (thaws IN (0, 1)); -- frozen until the next credit
ALTER TABLE groups ADD COLUMN requests_per_minute INTEGER CHECK (requests_per_minute > 0); -- of one user
DROP TRIGGER users_changed;
CREATE TRIGGER users_changed AFTER UPDATE OF name, group_id, frozen, day_nano, month_nano ON users
BEGIN INSERT INTO changes (kind, row_id) VALUES ('user', new.id); END;

-- Codes that users turn into money, each once.
CREATE TABLE codes (
    id          INTEGER PRIMARY KEY,
    hash        BLOB    NOT NULL UNIQUE, -- SHA-256 of the code; the code itself is shown once and stored nowhere
    hint        TEXT    NOT NULL,        -- its last four characters
    amount_nano INTEGER NOT NULL CHECK (amount_nano > 0),
    note        TEXT    NOT NULL DEFAULT '',
    created_ms  INTEGER NOT NULL,
    expires_ms  INTEGER,
    revoked_ms  INTEGER,
    redeemed_ms INTEGER,
    redeemed_by INTEGER REFERENCES users (id),
    CHECK ((redeemed_ms IS NULL) = (redeemed_by IS NULL))
) STRICT;
