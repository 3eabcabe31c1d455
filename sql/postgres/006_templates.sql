-- Messages that stand for a word in a chat: public ones of the operator, private ones of their users.
CREATE TABLE templates (
    id          BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id     BIGINT REFERENCES users (id), -- NULL: public
    name        TEXT    NOT NULL,
    description TEXT    NOT NULL DEFAULT '',
    messages    TEXT    NOT NULL,              -- JSON array, each message as its sender wrote it
    enabled     BOOLEAN NOT NULL DEFAULT true,
    updated_ms  BIGINT  NOT NULL
);
CREATE UNIQUE INDEX templates_public ON templates (name) WHERE user_id IS NULL;
CREATE UNIQUE INDEX templates_private ON templates (user_id, name) WHERE user_id IS NOT NULL;

-- Rows like any other from here on: the operator edits, disables or removes them.
INSERT INTO templates (name, description, messages, updated_ms) VALUES
    ('translate', 'translates between English and Chinese / 中英互译',
     '[{"role":"system","content":"You are a translator. Translate every message of the user: into English if it is in Chinese, into Chinese otherwise. Keep formatting, code and names. Answer with the translation alone."}]', 0),
    ('summarize', 'summarizes a text / 总结文本',
     '[{"role":"system","content":"Summarize what the user sends, in the language that it is written in: first one sentence, then the most important points as a short list. Add nothing that is not in the text."}]', 0),
    ('polish', 'improves the wording of a text / 润色文本',
     '[{"role":"system","content":"Improve the wording of what the user sends, in its own language: correct mistakes, make it clear and natural, keep its meaning and tone. Answer with the improved text alone."}]', 0),
    ('explain-code', 'explains code step by step / 解释代码',
     '[{"role":"system","content":"Explain the code that the user sends, in the language that the user writes in: what it is for, then how it works step by step, then what may go wrong with it."}]', 0);
