// What Anthropic's SDK makes of the forwarder at MPOOL_URL: a line of JSON for each check.
// MPOOL_KEY is a good key, MPOOL_LATE_KEY one that finds the pool full.

import Anthropic from '@anthropic-ai/sdk';

const { MPOOL_URL: baseURL, MPOOL_KEY: key, MPOOL_LATE_KEY: lateKey } = process.env;
const asked = {
  model: 'demo',
  max_tokens: 100,
  messages: [{ role: 'user', content: 'one two three four five six' }],
};

const client = (credential) => new Anthropic({ baseURL, maxRetries: 0, ...credential });

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
  const events = client({ apiKey: key }).messages.stream(asked);
  events.on('text', (piece) => {
    times.push(Math.round(performance.now() - started));
    pieces.push(piece);
  });
  const { usage } = await events.finalMessage();
  report(check, { pieces, times, tokens: usage.output_tokens });
}

for (const [check, credential] of [['plain', { apiKey: key }], ['bearer', { authToken: key }]]) {
  const answer = await client(credential).messages.create(asked);
  report(check, { text: answer.content[0].text, tokens: answer.usage.output_tokens });
}
const names = [];
for await (const model of client({ apiKey: key }).models.list()) names.push(model.id);
report('models', { names });
// The SDK loads parts of itself while it streams for the first time.
await stream('first stream');
await stream('stream');
const stranger = client({ apiKey: 'sk-cli-v1-nobody' });
const late = client({ apiKey: lateKey });
await mustFail('bad key', Anthropic.AuthenticationError, () => stranger.messages.create(asked));
await mustFail('full', Anthropic.InternalServerError, () => late.messages.create({ ...asked, stream: true }));
