"""What Anthropic's SDK makes of the forwarder at MPOOL_URL: a line of JSON for each check.

MPOOL_KEY is a good key, MPOOL_LATE_KEY one that finds the pool full.
"""

import json
import os
import time

import anthropic

URL, KEY, LATE_KEY = (os.environ[name] for name in ("MPOOL_URL", "MPOOL_KEY", "MPOOL_LATE_KEY"))
ASKED = {
    "model": "demo",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "one two three four five six"}],
}


def client(**credential):
    return anthropic.Anthropic(base_url=URL, max_retries=0, **credential)


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
    with client(api_key=KEY).messages.stream(**ASKED) as events:
        for piece in events.text_stream:
            times.append(round((time.monotonic() - started) * 1000))
            pieces.append(piece)
        usage = events.get_final_message().usage
    report(check, pieces=pieces, times=times, tokens=usage.output_tokens)


answer = client(api_key=KEY).messages.create(**ASKED)
report("plain", text=answer.content[0].text, tokens=answer.usage.output_tokens)
answer = client(auth_token=KEY).messages.create(**ASKED)
report("bearer", text=answer.content[0].text, tokens=answer.usage.output_tokens)
report("models", names=[model.id for model in client(api_key=KEY).models.list()])
# The SDK loads parts of itself while it streams for the first time.
stream("first stream")
stream("stream")
stranger, late = client(api_key="sk-cli-v1-nobody"), client(api_key=LATE_KEY)
must_fail("bad key", anthropic.AuthenticationError, lambda: stranger.messages.create(**ASKED))
must_fail("full", anthropic.InternalServerError, lambda: late.messages.create(**ASKED, stream=True))
