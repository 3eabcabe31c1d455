-- What a price per call is charged for: 1, and for each of the images that one call asks for.
ALTER TABLE lines ADD COLUMN units INTEGER NOT NULL DEFAULT 1 CHECK (units > 0);
