-- What has been charged against a limit is summed from the index alone.
DROP INDEX days_user;
DROP INDEX days_key;
CREATE INDEX days_user ON days (user_id, day, charged_nano);
CREATE INDEX days_key ON days (key_id, day, charged_nano);

-- A list of more than two is made into a table of its own for each row that is inserted: half of what a line cost. As
-- https://www.sqlite.org/lang_altertable.html (section 7) changes a constraint whose rows stay as they are.
PRAGMA writable_schema = ON;
UPDATE sqlite_schema SET sql = replace(sql,
    'billed IN (''usage'', ''count'', ''mark'', ''hold'', ''nothing'')',
    'billed = ''usage'' OR billed = ''count'' OR billed = ''mark'' OR billed = ''hold'' OR billed = ''nothing''')
WHERE type = 'table' AND name = 'lines';
PRAGMA writable_schema = RESET;
