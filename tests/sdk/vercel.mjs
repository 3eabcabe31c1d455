// Drives a server with the Vercel AI SDK, as an application would; one line a check. Environment as in client.mjs.

import assert from 'node:assert/strict';

import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, generateText, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';

const { BASE_URL, API_KEY, DIALECT = 'openai' } = process.env;
const NAME = DIALECT === 'openai' ? 'vercel' : `vercel, ${DIALECT}`;

const STORY = 'The gateway takes a request , looks at it , and hands it on as it came .';
const WORDS = STORY.split(' ').length;
const prompt = 'Tell me the story.';

const weather = tool({
  description: 'The weather of a city.',
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `sunny in ${city}`,
});

function model(apiKey = API_KEY) {
  return createOpenAICompatible({ name: 'gateway', baseURL: BASE_URL, apiKey, includeUsage: true })('gpt-4o');
}

const CHECKS = {
  async 'an answer comes with its usage'() {
    const { text, usage, finishReason } = await generateText({ model: model(), prompt });
    assert.equal(text, STORY);
    assert.equal(finishReason, 'stop');
    assert.equal(usage.outputTokens, WORDS);
  },

  async 'a stream brings every word and its usage'() {
    const result = streamText({ model: model(), prompt });
    const words = [];
    for await (const word of result.textStream) words.push(word);
    assert.equal(words.join(''), STORY);
    assert.equal((await result.usage).outputTokens, WORDS);
    assert.equal(await result.finishReason, 'stop');
  },

  async 'a tool is called and its result goes back'() {
    const asked = { model: model(), prompt, tools: { weather }, stopWhen: stepCountIs(3) };
    const { text, steps } = await generateText(asked);
    assert.equal(steps.length, 2);
    assert.equal(steps[0].toolCalls[0].input.city, 'Zürich');
    assert.match(text, /^The tool said/);
    assert.match(text, /sunny in Zürich/);
  },

  async 'a streamed tool call is put together and answered'() {
    const result = streamText({ model: model(), prompt, tools: { weather }, stopWhen: stepCountIs(3) });
    const kinds = [];
    for await (const part of result.fullStream) kinds.push(part.type);
    assert.ok(kinds.includes('tool-call') && kinds.includes('tool-result'), `${kinds}`);
    assert.match(await result.text, /sunny in Zürich/);
  },

  async 'a wrong key is an APICallError'() {
    const wrong = model('sk-wrong-0123456789abcdefghijklmnopqrstuvwxyz');
    await assert.rejects(generateText({ model: wrong, prompt, maxRetries: 0 }), (error) => {
      assert.ok(APICallError.isInstance(error), `${error}`);
      assert.equal(error.statusCode, 401);
      assert.equal(error.isRetryable, false);
      return true;
    });
  },
};

for (const [sentence, check] of Object.entries(CHECKS)) {
  try {
    await check();
    console.log(`ok ${NAME}: ${sentence}`);
  } catch (error) {
    process.exitCode = 1;
    console.log(`FAILED ${NAME}: ${sentence}`);
    console.error(error);
  }
}
