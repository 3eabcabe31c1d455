-- What has been charged against a limit is summed from the index alone.
DROP INDEX days_user;
DROP INDEX days_key;
CREATE INDEX days_user ON days (user_id, day, charged_nano);
CREATE INDEX days_key ON days (key_id, day, charged_nano);
