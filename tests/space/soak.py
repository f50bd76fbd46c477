"""Load test of a Space of GPT-2 124M, for a quarter of an hour: `make soak-space`."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import torch

from gpt2.config import PRESETS
from gpt2.hub.export import save_space_model
from gpt2.kernels import library
from gpt2.model.transformer import GPT
from space.server import SLOTS
from tests.space import clients
from tests.space.conftest import FACTS, Server, write_manifest

REPORT = Path("reports/benchmarks/space.json")
MINUTES = 10
FUZZED_CALLS = 2000
POSTS = 200


def main() -> None:
    """Prints a table, and writes it to reports/benchmarks/space.json."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else MINUTES
    os.environ.pop(library.SWITCH)  # the tests set it
    found: dict[str, float | str] = {}

    def record(name: str, value: float | str) -> None:
        found[name] = round(value, 3) if isinstance(value, float) else value
        print(f"{name:<50} {found[name]}", flush=True)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.manual_seed(0)
        save_space_model(GPT(PRESETS["gpt2"]), folder)
        sizes = PRESETS["gpt2"]
        write_manifest(
            folder, {**FACTS, **sizes.to_dict(), "parameters": sizes.num_parameters(), "context": sizes.block_size}
        )
        start_s = time.monotonic()
        server = Server(folder)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            next(part for part in clients.stream_results(client, clients.GOOD) if part["texts"][0])
        record("seconds from start to first token", time.monotonic() - start_s)
        measure(server, record, minutes)
    REPORT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(server: Server, record: Callable[[str, float | str], None], minutes: float) -> None:
    """Runs all load tests against a server, and records their results."""
    clients.load_test(server.url, SLOTS, 20)  # every slot has been used
    before = server.resident_bytes()
    for name, value in clients.load_test(server.url, SLOTS, 60 * minutes).items():
        record(f"{SLOTS} clients, {minutes:g} minutes: {name}", value)
    record("after the load test: more memory, MB", (server.resident_bytes() - before) / 1e6)
    freed = [clients.seconds_to_free_slots(server.url, SLOTS) for _ in range(5)]
    record("all slots abandoned: seconds to a new first token", max(freed))
    fuzzed = clients.fuzz(server.url, FUZZED_CALLS)
    record(f"{FUZZED_CALLS} fuzzed calls", ", ".join(f"{key} {value}" for key, value in sorted(fuzzed.items())))
    flooded = clients.flood(server.url, POSTS)
    record(
        f"{POSTS} calls as a flood, by status", ", ".join(f"{key}: {value}" for key, value in sorted(flooded.items()))
    )
    drained_s = time.monotonic()
    with httpx.Client(base_url=server.url, timeout=600) as client:
        while client.post(clients.CALL, json={"data": clients.GOOD}).status_code == clients.QUEUE_FULL:
            time.sleep(0.5)
    record("seconds until the queue has a free place again", time.monotonic() - drained_s)
    record("more memory in the end, MB", (server.resident_bytes() - before) / 1e6)
    record("tracebacks", server.stop().count("Traceback"))


if __name__ == "__main__":
    main()
