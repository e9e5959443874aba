"""Acquire, use, report: what a proxy does for each request. Paste what you need.

    MPOOL_KEY=sk-cli-v1-… python acquire.py https://api.example.com/v1/models

Needs the PyPI package redis. Prints the answer, never a token. Redis is at MPOOL_REDIS_HOST
(127.0.0.1), MPOOL_REDIS_PORT (6380), with MPOOL_REDIS_PASSWORD if it asks for one,
and MPOOL_REDIS_USER for an ACL user.
"""
import os, sys, time, urllib.error, urllib.request
import redis

env = os.environ.get
pool = redis.Redis(env("MPOOL_REDIS_HOST", "127.0.0.1"), int(env("MPOOL_REDIS_PORT", "6380")),
                   username=env("MPOOL_REDIS_USER"), password=env("MPOOL_REDIS_PASSWORD"), protocol=3, decode_responses=True)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):  # a token goes to the host it is meant for, nowhere else
        return None


http = urllib.request.build_opener(NoRedirect)


def send(url, lease):
    token = lease["token"]
    header = {"x-api-key": token} if lease["auth"] == "x-api-key" else {"Authorization": "Bearer " + token}
    try:
        answer = http.open(urllib.request.Request(url, headers=header), timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, dict(answer.headers.items()), answer.read()


def request(key, url):
    """The upstream's answer, or a refusal in its form: status, headers, body."""
    for last_try in (False, True):
        try:
            lease = pool.execute_command("MPOOL.ACQUIRE", key, "*", "WITHTOKEN")
        except redis.BusyLoadingError:
            return 503, {"Retry-After": "1"}, b"LOADING"
        except redis.ResponseError as error:
            code, when = str(error).split(" ")[0], str(error).split(" ")[-1]
            if code not in ("POOLFULL", "NOACCOUNT"):  # NOKEY, REVOKED, EXPIRED, …
                return 403, {}, code.encode()
            wait = max(1, int(when) // 1000 - int(time.time())) if when.isdigit() else 60
            return 503, {"Retry-After": str(wait)}, code.encode()
        status, headers, body = send(url, lease)
        if status not in (401, 429) or lease["state"] == "bound" or last_try:
            return status, headers, body
        wait = next((v for k, v in headers.items() if k.lower() == "retry-after" and v.isdigit()), "60")
        pool.execute_command("MPOOL.COOLDOWN", "medium", lease["account"], "*", min(int(wait), 86400) * 1000,
                             "REASON", f"the upstream answered {status}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or not (sys.argv[2:] or env("MPOOL_KEY")):
        sys.exit("usage: MPOOL_KEY=KEY acquire.py URL   or   acquire.py URL KEY")
    status, headers, body = request(sys.argv[2] if sys.argv[2:] else env("MPOOL_KEY"), sys.argv[1])
    print(status, *(f"Retry-After: {v}" for k, v in headers.items() if k == "Retry-After"), file=sys.stderr)
    sys.stdout.buffer.write(body + b"\n")
    sys.exit(status >= 400)
