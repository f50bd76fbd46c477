"""API clients for tests: load, fuzzing and floods."""

import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx

CALL = "/gradio_api/call/generate"
GOOD: list[Any] = ["Old Tobias", 60, 0.8, 50, 1.0, 1.0, 1, "", 1]
"""The arguments of the API's generate."""
QUEUE_FULL = 503
ODD: list[Any] = [
    None, True, -1, 0, 1, 2.5, 20.7, 1e308, -1e308, 10**30, "", "x", "7", "NaN", "\x00", "\u202e", "🙂" * 50,
    "a" * 9999, "a" * 20_000, "<script>", "{{7*7}}", "'; DROP TABLE", "../../etc/passwd", [], [1], [[]], {},
    {"path": "/etc/passwd"}, {"__type__": "update"}, {"meta": {"_type": "gradio.FileData"}, "path": "/etc/passwd"},
]  # fmt: skip


def stream_results(client: httpx.Client, data: list[Any]) -> Iterator[dict[str, Any]]:
    """Calls the API and streams its results. Raises RuntimeError if it returns an error event."""
    sent = client.post(CALL, json={"data": data})
    sent.raise_for_status()
    event = ""
    with client.stream("GET", f"{CALL}/{sent.json()['event_id']}") as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                event = line[7:]
            elif line.startswith("data: ") and event == "error":
                raise RuntimeError(line)
            elif line.startswith("data: ") and event in ("generating", "complete") and line != "data: null":
                yield json.loads(line[6:])[0]


def result_after_queueing(client: httpx.Client, data: list[Any], timeout_s: float) -> dict[str, Any]:
    """The last result of a call, which is retried while the queue is full."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return list(stream_results(client, data))[-1]
        except httpx.HTTPStatusError as error:
            if error.response.status_code != QUEUE_FULL or time.monotonic() > deadline_s:
                raise
        time.sleep(0.2)


def fuzz(url: str, calls: int, seed: int = 0) -> Counter[str]:
    """Sends calls with odd values, bodies and paths. Returns the number of each outcome."""
    draw, found = random.Random(seed), Counter[str]()
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(calls):
            kind = draw.randrange(6)
            if kind < 3:  # well-formed calls with odd values
                data = list(GOOD)
                data[1] = 3
                for place in draw.sample(range(len(GOOD)), draw.randint(1, 3)):
                    data[place] = draw.choice(ODD)
                if kind == 2:
                    data = draw.choice([data[: draw.randrange(9)], data + ODD[:3], ODD])
                try:
                    last = list(stream_results(client, data))[-1]
                    found["answered" if last["finish_reasons"][0] else "unfinished"] += 1
                except (RuntimeError, httpx.HTTPStatusError) as error:
                    found[str(error.response.status_code) if isinstance(error, httpx.HTTPStatusError) else "error"] += 1
                continue
            if kind == 3:
                body = draw.randbytes(draw.randrange(200))
            elif kind == 4:
                body = json.dumps(
                    {
                        "data": draw.choice(ODD),
                        "fn_index": draw.choice(ODD),
                        "session_hash": draw.choice(ODD),
                        "event_data": draw.choice(ODD),
                        "trigger_id": draw.choice(ODD),
                    }
                ).encode()
            else:
                body = b"x" * draw.choice([64_001, 300_000])
            path = draw.choice(
                [
                    CALL,
                    "/gradio_api/queue/join",
                    "/gradio_api/run/generate",
                    "/gradio_api/run/write",
                    "/gradio_api/call/v2/generate",
                    "/gradio_api/call/none",
                    "/gradio_api/cancel",
                    "/gradio_api/reset",
                    "/gradio_api/upload",
                    "/gradio_api/queue/data",
                ]
            )
            sent = client.post(path, content=body, headers={"content-type": "application/json"})
            found[str(sent.status_code)] += 1
    return found


def flood(url: str, posts: int) -> Counter[int]:
    """Sends long calls as fast as possible and never reads results. Returns the number of each status."""
    found, lock = Counter[int](), threading.Lock()

    def send(count: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(count):
                status = client.post(CALL, json={"data": ["flood", 500, *GOOD[2:]]}).status_code
                with lock:
                    found[status] += 1

    senders = [threading.Thread(target=send, args=(posts // 10,)) for _ in range(10)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    return found


def load_test(url: str, num_clients: int, seconds: float) -> dict[str, float]:
    """Clients that each request 60 tokens in a loop. Returns errors, times to first token and tokens/s."""
    end_s = time.monotonic() + seconds
    firsts: list[list[float]] = [[] for _ in range(num_clients)]
    rates: list[float] = [0.0] * num_clients
    errors: list[str] = []

    def run_client(number: int) -> None:
        tokens, busy_s = 0, 0.0
        with httpx.Client(base_url=url, timeout=60) as client:
            while time.monotonic() < end_s:
                start_s, first_s, count = time.monotonic(), None, 0
                try:
                    for part in stream_results(client, [f"Old Tobias {number} {tokens}", *GOOD[1:]]):
                        count = len(part["logprobs"][0]) if part["logprobs"] else 0
                        if part["texts"][0] and first_s is None:
                            first_s = time.monotonic() - start_s
                except (RuntimeError, httpx.HTTPError) as error:
                    errors.append(repr(error))
                    continue
                firsts[number].append(first_s or time.monotonic() - start_s)
                tokens, busy_s = tokens + count, busy_s + time.monotonic() - start_s
        rates[number] = tokens / busy_s

    threads = [threading.Thread(target=run_client, args=(number,)) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waits = sorted(wait for each in firsts for wait in each)
    return {
        "replies": len(waits),
        "errors": len(errors),
        "first token, median s": statistics.median(waits),
        "first token, 95th percentile s": waits[int(0.95 * len(waits))],
        "slowest client, tokens/s": min(rates),
        "fastest client, tokens/s": max(rates),
    }


def seconds_to_free_slots(url: str, slots: int) -> float:
    """Occupies all slots, disconnects, and measures the seconds until a new client gets its first token."""
    clients = [httpx.Client(base_url=url, timeout=60) for _ in range(slots)]
    streams = []
    for client in clients:
        event = client.post(CALL, json={"data": ["gone", 500, *GOOD[2:]]}).json()["event_id"]
        streams.append(client.stream("GET", f"{CALL}/{event}"))
        lines = streams[-1].__enter__().iter_lines()
        next(line for line in lines if line.startswith("data: ") and '"texts": [""]' not in line and "texts" in line)
    start_s = time.monotonic()
    for client, stream in zip(clients, streams, strict=True):
        stream.__exit__(None, None, None)
        client.close()
    with httpx.Client(base_url=url, timeout=60) as client:
        for part in stream_results(client, GOOD):
            if part["texts"][0]:
                return time.monotonic() - start_s
    raise AssertionError("no token came")
