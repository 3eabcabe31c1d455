-- "row" is a reserved word in other databases.
ALTER TABLE changes RENAME COLUMN row TO row_id;
