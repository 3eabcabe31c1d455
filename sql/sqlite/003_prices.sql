-- Prices by every kind of token, and by the length of the prompt; the kinds that a line was billed by.
ALTER TABLE prices ADD COLUMN audio_input_nano  INTEGER NOT NULL DEFAULT 0;
ALTER TABLE prices ADD COLUMN image_input_nano  INTEGER NOT NULL DEFAULT 0;
ALTER TABLE prices ADD COLUMN reasoning_nano    INTEGER NOT NULL DEFAULT 0;
ALTER TABLE prices ADD COLUMN audio_output_nano INTEGER NOT NULL DEFAULT 0;
ALTER TABLE prices ADD COLUMN image_output_nano INTEGER NOT NULL DEFAULT 0;
ALTER TABLE prices ADD COLUMN tiers             TEXT; -- JSON array of the rates of longer prompts; NULL: none
UPDATE prices SET audio_input_nano = input_nano, image_input_nano = input_nano,
                  reasoning_nano = output_nano, audio_output_nano = output_nano, image_output_nano = output_nano;

ALTER TABLE lines ADD COLUMN usage_audio_input  INTEGER;
ALTER TABLE lines ADD COLUMN usage_image_input  INTEGER;
ALTER TABLE lines ADD COLUMN usage_audio_output INTEGER;
ALTER TABLE lines ADD COLUMN usage_image_output INTEGER;
