"""What OpenAI's SDK makes of the forwarder at MPOOL_URL: a line of JSON for each check.

MPOOL_KEY is a good key, MPOOL_LATE_KEY one that finds the pool full.
"""

import json
import os
import time

import openai

URL, KEY, LATE_KEY = (os.environ[name] for name in ("MPOOL_URL", "MPOOL_KEY", "MPOOL_LATE_KEY"))
ASKED = {
    "model": "demo",
    "messages": [{"role": "user", "content": "one two three four five six"}],
}


def client(key):
    return openai.OpenAI(base_url=f"{URL}/v1", max_retries=0, api_key=key)


def report(check, **found):
    print(json.dumps({"check": check, **found}), flush=True)


def must_fail(check, kind, call):
    try:
        call()
    except kind as error:
        headers = error.response.headers
        report(
            check,
            status=error.status_code,
            message=str(error),
            code=headers.get("x-mpool-error"),
            retry_after=headers.get("retry-after"),
        )
    else:
        raise SystemExit(f"{check}: no error was raised")


def stream(check):
    started, times, pieces = time.monotonic(), [], []
    for chunk in client(KEY).chat.completions.create(**ASKED, stream=True):
        if chunk.choices[0].delta.content:
            times.append(round((time.monotonic() - started) * 1000))
            pieces.append(chunk.choices[0].delta.content)
    report(check, pieces=pieces, times=times)


answer = client(KEY).chat.completions.create(**ASKED)
report("plain", text=answer.choices[0].message.content, tokens=answer.usage.completion_tokens)
report("models", names=[model.id for model in client(KEY).models.list()])
# The SDK loads parts of itself while it streams for the first time.
stream("first stream")
stream("stream")
stranger, late = client("sk-cli-v1-nobody"), client(LATE_KEY)
must_fail("bad key", openai.AuthenticationError, lambda: stranger.chat.completions.create(**ASKED))
must_fail(
    "full",
    openai.InternalServerError,
    lambda: late.chat.completions.create(**ASKED, stream=True),
)
