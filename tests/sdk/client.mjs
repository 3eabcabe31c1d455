// Drives a server with the OpenAI SDK for Node, as an application would; one line a check.
//
// Environment: BASE_URL (with /v1), API_KEY, UPSTREAM (the scripted upstream's root). GATEWAY and GATEWAY_CONFIG name
// the gateway's executable and configuration; without them the SDK talks to the upstream itself, and the checks of what
// only a gateway does are skipped.

import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { setTimeout as sleep } from 'node:timers/promises';

import OpenAI from 'openai';
import { zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const { BASE_URL, API_KEY, UPSTREAM, GATEWAY, GATEWAY_CONFIG, UPSTREAM_KEY, DIALECT = 'openai' } = process.env;
// What another dialect than OpenAI's cannot represent is not asked for.
const IS_OPENAI = DIALECT === 'openai';
const NAME = IS_OPENAI ? 'node' : `node, ${DIALECT}`;

const LEARN_TIMEOUT_MS = 5000; // a running server learns of a change within a second
const LINE_TIMEOUT_MS = 5000; // lines are shipped each second
const CLOSE_TIMEOUT_MS = 2000;
// A word each 20 ms: what lies in the sockets between us and the upstream, and what comes while we hang up.
const WORDS_UNREAD_MAX = 15;

// Thousandths of the currency a token, as run.sh configures them.
const PRICE_INPUT = 1;
const PRICE_OUTPUT = 2;

const STORY = 'The gateway takes a request , looks at it , and hands it on as it came .';
const TOOL_ARGUMENTS = '{"city":"Z\\u00fcrich","note":"quote \\" and \\\\ slash","days":[1,2,3]}';
const HELLO = [{ role: 'user', content: 'Tell me the story.' }];
const TOOLS = [
  {
    type: 'function',
    function: {
      name: 'weather',
      description: 'The weather of a city.',
      parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
    },
  },
];

class Skipped extends Error {}

/** An SDK client, and how many requests it has sent, retries included. */
function client(key = API_KEY, options = {}) {
  const counted = { requests: 0 };
  const counting = (...asked) => {
    counted.requests += 1;
    return fetch(...asked);
  };
  return [new OpenAI({ apiKey: key, baseURL: BASE_URL, timeout: 30_000, fetch: counting, ...options }), counted];
}

/** The error of this kind that the call must end in. */
async function refused(kind, call) {
  try {
    await call();
  } catch (error) {
    assert.ok(error instanceof kind, `${error} is no ${kind.name}`);
    return error;
  }
  assert.fail(`no ${kind.name}`);
}

async function upstreamLog() {
  return (await fetch(`${UPSTREAM}/_log`)).json();
}

async function upstreamRequests(model) {
  return (await upstreamLog()).filter((entry) => entry.body.includes(`"${model}"`));
}

function onlyOfAGateway() {
  if (!GATEWAY) throw new Skipped();
}

function gateway(...words) {
  onlyOfAGateway();
  return execFileSync(GATEWAY, [...words, '--config', GATEWAY_CONFIG], { encoding: 'utf8', timeout: 30_000 });
}

function gatewayJson(...words) {
  return JSON.parse(gateway(...words, '--json'));
}

/** What `find` gives as soon as it gives anything. */
async function until(timeoutMs, find) {
  const deadline = Date.now() + timeoutMs;
  for (;;) {
    const found = await find();
    if (found) return found;
    assert.ok(Date.now() < deadline, `not within ${timeoutMs} ms`);
    await sleep(100);
  }
}

/** The one line of the one call of a model. */
async function onlyLine(model) {
  const lines = await until(LINE_TIMEOUT_MS, () => {
    const found = gatewayJson('usage').filter((line) => line.model === model);
    return found.length && found;
  });
  assert.equal(lines.length, 1, 'lines for one call');
  return lines[0];
}

function chargedAsPriced(line) {
  const thousandths = line.input_tokens * PRICE_INPUT + line.output_tokens * PRICE_OUTPUT;
  assert.equal(Math.round(Number(line.charged) * 1e9), thousandths * 1e6, JSON.stringify(line));
}

async function keyKnown(key) {
  await until(LEARN_TIMEOUT_MS, async () => {
    try {
      return await client(key, { maxRetries: 0 })[0].models.list();
    } catch (error) {
      if (error instanceof OpenAI.AuthenticationError) return false;
      throw error;
    }
  });
}

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

const CHECKS = {
  async 'chat answers'() {
    const answer = await client()[0].chat.completions.create({ model: 'gpt-4o', messages: HELLO });
    assert.equal(answer.choices[0].message.content, STORY);
    assert.equal(answer.choices[0].finish_reason, 'stop');
    assert.equal(answer.id, 'chatcmpl-scripted');
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },

  async 'fields that nobody knows reach the upstream as they were'() {
    if (!IS_OPENAI) throw new Skipped();
    const unknown = { z: 1, a: [1e300, null], ü: '\u0007' };
    const content = `node unknown fields ${Date.now()}`;
    const asked = { model: 'gpt-4o', seed: 7, x_unknown: unknown, messages: [{ role: 'user', content }] };
    await client()[0].chat.completions.create(asked);
    const { body } = (await upstreamLog()).find((entry) => entry.body.includes(content));
    assert.equal(body, JSON.stringify(asked), 'a request that needs no change came changed');
  },

  async 'a stream brings every word and no usage that was not asked for'() {
    const chunks = await collect(await client()[0].chat.completions.create({ model: 'gpt-4o', messages: HELLO, stream: true }));
    assert.ok(chunks.every((chunk) => chunk.choices.length === 1 && !chunk.usage));
    const words = chunks.map((chunk) => chunk.choices[0].delta.content ?? '').filter((word) => word !== '');
    assert.equal(words.join(''), STORY);
    assert.equal(words.length, STORY.split(' ').length, 'words were joined or cut');
    assert.equal(chunks.at(-1).choices[0].finish_reason, 'stop');
  },

  async 'a stream with usage ends with it'() {
    const asked = { model: 'gpt-4o', messages: HELLO, stream: true, stream_options: { include_usage: true } };
    const chunks = await collect(await client()[0].chat.completions.create(asked));
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.equal(chunks.at(-1).usage.completion_tokens, STORY.split(' ').length);
    assert.ok(chunks.slice(0, -1).every((chunk) => chunk.choices.length === 1 && chunk.usage === null));
  },

  async 'the stream helper puts the answer together'() {
    const stream = client()[0].chat.completions.stream({ model: 'gpt-4o', messages: HELLO });
    assert.equal((await stream.finalChatCompletion()).choices[0].message.content, STORY);
  },

  async 'a tool call comes whole and its result goes back'() {
    const [sdk] = client();
    const asked = await sdk.chat.completions.create({ model: 'gpt-4o', messages: HELLO, tools: TOOLS, tool_choice: IS_OPENAI ? 'required' : 'auto' });
    const { finish_reason, message } = asked.choices[0];
    assert.equal(finish_reason, 'tool_calls');
    assert.equal(message.content, null);
    const [call] = message.tool_calls;
    assert.deepEqual([call.id, call.function.name, call.function.arguments], ['call_1', 'weather', TOOL_ARGUMENTS]);
    const messages = [...HELLO, message, { role: 'tool', tool_call_id: call.id, content: 'sunny' }];
    const told = await sdk.chat.completions.create({ model: 'gpt-4o', messages, tools: TOOLS });
    assert.equal(told.choices[0].message.content, 'The tool said sunny');
  },

  async 'a streamed tool call is put together byte for byte'() {
    const stream = client()[0].chat.completions.stream({ model: 'gpt-4o', messages: HELLO, tools: TOOLS });
    const [choice] = (await stream.finalChatCompletion()).choices;
    assert.equal(choice.finish_reason, 'tool_calls');
    assert.equal(choice.message.tool_calls[0].function.name, 'weather');
    assert.equal(choice.message.tool_calls[0].function.arguments, TOOL_ARGUMENTS);
  },

  async 'a structured answer fits its schema'() {
    const weather = z.object({ city: z.string(), degrees: z.int(), sunny: z.boolean(), days: z.array(z.string()) });
    const response_format = zodResponseFormat(weather, 'weather');
    const answer = await client()[0].chat.completions.parse({ model: 'gpt-4o', messages: HELLO, response_format });
    const expected = { city: 'Zürich', degrees: 21, sunny: true, days: ['Zürich', 'Zürich'] };
    assert.deepEqual(answer.choices[0].message.parsed, expected);
  },

  async 'models are listed and retrieved'() {
    const [sdk] = client();
    const names = (await collect(await sdk.models.list())).map((model) => model.id);
    assert.ok(names.includes('gpt-4o'), `${names}`);
    assert.equal((await sdk.models.retrieve('gpt-4o')).id, 'gpt-4o');
  },

  async 'a wrong key is an AuthenticationError, asked once'() {
    const [sdk, counted] = client('sk-wrong-0123456789abcdefghijklmnopqrstuvwxyzABCDEFG');
    const error = await refused(OpenAI.AuthenticationError, () =>
      sdk.chat.completions.create({ model: 'gpt-4o', messages: HELLO }),
    );
    assert.equal(error.code, 'invalid_api_key');
    assert.ok(!error.message.includes('sk-wrong'), 'the key is in the message');
    assert.equal(counted.requests, 1);
  },

  async 'an unknown model is a NotFoundError'() {
    const [sdk, counted] = client();
    const error = await refused(OpenAI.NotFoundError, () =>
      sdk.chat.completions.create({ model: 'no-such-model', messages: HELLO }),
    );
    assert.equal(error.code, 'model_not_found');
    assert.equal(counted.requests, 1);
  },

  async 'a bad request names its parameter'() {
    const [sdk, counted] = client();
    const error = await refused(OpenAI.BadRequestError, () =>
      sdk.chat.completions.create({ model: 'gpt-4o', messages: 'hello' }),
    );
    assert.equal(error.param, 'messages');
    assert.equal(counted.requests, 1);
  },

  async "the upstream's bad request comes back with its parameter"() {
    const [sdk, counted] = client();
    const error = await refused(OpenAI.BadRequestError, () =>
      sdk.chat.completions.create({ model: 'gpt-4o-picky', messages: HELLO, temperature: 0.5 }),
    );
    assert.equal(error.param, IS_OPENAI ? 'temperature' : null);
    assert.match(error.message, /Only the default \(1\)/);
    assert.equal(counted.requests, 1);
  },

  async "the upstream's rate limit is a RateLimitError with Retry-After"() {
    const [sdk] = client(API_KEY, { maxRetries: 0 });
    const error = await refused(OpenAI.RateLimitError, () =>
      sdk.chat.completions.create({ model: 'gpt-4o-busy', messages: HELLO }),
    );
    assert.equal(error.code, 'rate_limit_exceeded');
    assert.ok(Number(error.headers.get('retry-after')) >= 1);
    assert.notEqual(error.headers.get('x-should-retry'), 'false');
  },

  async "the SDK's own retry gets past a busy upstream"() {
    const [sdk, counted] = client();
    const answer = await sdk.chat.completions.create({ model: 'gpt-4o-busy-once-node', messages: HELLO });
    assert.equal(answer.choices[0].message.content, STORY);
    assert.equal(counted.requests, 2);
  },

  async 'a client that leaves is seen upstream and pays for what it got'() {
    const model = 'gpt-4o-slow-node';
    const stream = await client()[0].chat.completions.create({ model, messages: HELLO, stream: true });
    let wordsRead = 0;
    for await (const chunk of stream) {
      if (chunk.choices[0]?.delta.content) wordsRead += 1;
      if (wordsRead === 40) break;
    }
    const leftAt = Date.now();
    stream.controller.abort();
    const entry = await until(CLOSE_TIMEOUT_MS + 1000, async () =>
      (await upstreamRequests(model)).find(({ closed_at }) => closed_at),
    );
    const closedAfterMs = entry.closed_at * 1000 - leftAt;
    assert.ok(closedAfterMs < CLOSE_TIMEOUT_MS, `closed after ${closedAfterMs} ms`);
    assert.equal((await upstreamRequests(model)).length, 1);
    if (!GATEWAY) return;
    const line = await onlyLine(model);
    const counts = `${wordsRead} words read, ${entry.words_sent} sent, ${line.output_tokens} charged`;
    assert.ok(wordsRead <= line.output_tokens, counts);
    assert.ok(line.output_tokens <= Math.min(wordsRead + WORDS_UNREAD_MAX, entry.words_sent), counts);
    assert.equal(line.end_reason, 'client_gone');
    chargedAsPriced(line);
  },

  async "an answer is charged once, by the upstream's usage"() {
    onlyOfAGateway();
    const model = 'gpt-4o-priced-node';
    const answer = await client()[0].chat.completions.create({ model, messages: HELLO });
    const line = await onlyLine(model);
    assert.equal(line.input_tokens, answer.usage.prompt_tokens);
    assert.equal(line.output_tokens, answer.usage.completion_tokens);
    chargedAsPriced(line);
  },

  async 'an empty balance is asked once and never reaches the upstream'() {
    const { key } = gatewayJson('user', 'add', 'poor-node', '--balance', '0.01');
    await keyKnown(key);
    const requestsBefore = (await upstreamLog()).length;
    const [sdk, counted] = client(key);
    const error = await refused(OpenAI.RateLimitError, () =>
      sdk.chat.completions.create({ model: 'gpt-4o', messages: HELLO }),
    );
    assert.equal(error.code, 'insufficient_quota');
    assert.equal(error.headers.get('x-should-retry'), 'false');
    assert.equal(counted.requests, 1);
    assert.equal((await upstreamLog()).length, requestsBefore);
    assert.equal(Number(gatewayJson('user', 'show', 'poor-node').balance), 0.01);
  },

  async 'a frozen user is denied, and asked once'() {
    const { key } = gatewayJson('user', 'add', 'frozen-node', '--balance', '5');
    await keyKnown(key);
    gateway('user', 'freeze', 'frozen-node');
    await until(LEARN_TIMEOUT_MS, async () => {
      const [sdk, counted] = client(key);
      try {
        await sdk.chat.completions.create({ model: 'gpt-4o', messages: HELLO });
        return false;
      } catch (error) {
        assert.ok(error instanceof OpenAI.PermissionDeniedError, `${error}`);
        assert.equal(error.code, 'user_frozen');
        assert.equal(counted.requests, 1);
        return true;
      }
    });
  },

  async 'the demo model answers whole and streamed'() {
    onlyOfAGateway();
    const [sdk] = client();
    const names = (await collect(await sdk.models.list())).map((model) => model.id);
    const model = names.find((name) => name.startsWith('demo'));
    assert.ok(model, `no demo model among ${names}`);
    const answer = await sdk.chat.completions.create({ model, messages: HELLO });
    assert.ok(answer.choices[0].message.content);
    const chunks = await collect(await sdk.chat.completions.create({ model, messages: HELLO, stream: true }));
    assert.ok(chunks.length > 2);
    assert.equal(chunks.at(-1).choices[0].finish_reason, 'stop');
  },

  async 'the upstream saw its own key only'() {
    onlyOfAGateway();
    const log = await upstreamLog();
    assert.deepEqual([...new Set(log.map(({ key }) => key))], [UPSTREAM_KEY]);
    assert.ok(!JSON.stringify(log).includes(API_KEY));
  },
};

for (const [sentence, check] of Object.entries(CHECKS)) {
  try {
    await check();
    console.log(`ok ${NAME}: ${sentence}`);
  } catch (error) {
    if (error instanceof Skipped) {
      console.log(`skipped ${NAME}: ${sentence}`);
      continue;
    }
    process.exitCode = 1;
    console.log(`FAILED ${NAME}: ${sentence}`);
    console.error(error);
  }
}
