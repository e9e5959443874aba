// What OpenAI's SDK makes of the forwarder at MPOOL_URL: a line of JSON for each check.
// MPOOL_KEY is a good key, MPOOL_LATE_KEY one that finds the pool full.

import OpenAI from 'openai';

const { MPOOL_URL: url, MPOOL_KEY: key, MPOOL_LATE_KEY: lateKey } = process.env;
const asked = {
  model: 'demo',
  messages: [{ role: 'user', content: 'one two three four five six' }],
};

const client = (apiKey) => new OpenAI({ baseURL: `${url}/v1`, maxRetries: 0, apiKey });

function report(check, found) {
  console.log(JSON.stringify({ check, ...found }));
}

async function mustFail(check, kind, call) {
  try {
    await call();
  } catch (error) {
    if (!(error instanceof kind)) throw error;
    report(check, {
      status: error.status,
      message: error.message,
      code: error.headers.get('x-mpool-error'),
      retry_after: error.headers.get('retry-after'),
    });
    return;
  }
  throw new Error(`${check}: no error was thrown`);
}

async function stream(check) {
  const started = performance.now();
  const times = [];
  const pieces = [];
  for await (const chunk of await client(key).chat.completions.create({ ...asked, stream: true })) {
    const piece = chunk.choices[0].delta.content;
    if (!piece) continue;
    times.push(Math.round(performance.now() - started));
    pieces.push(piece);
  }
  report(check, { pieces, times });
}

const answer = await client(key).chat.completions.create(asked);
report('plain', { text: answer.choices[0].message.content, tokens: answer.usage.completion_tokens });
const names = [];
for await (const model of client(key).models.list()) names.push(model.id);
report('models', { names });
// The SDK loads parts of itself while it streams for the first time.
await stream('first stream');
await stream('stream');
const stranger = client('sk-cli-v1-nobody');
const late = client(lateKey);
await mustFail('bad key', OpenAI.AuthenticationError, () => stranger.chat.completions.create(asked));
await mustFail('full', OpenAI.InternalServerError, () => late.chat.completions.create({ ...asked, stream: true }));
