"""Visitors of every kind at a Space of GPT-2 124M, for a quarter of an hour: `make soak-space`."""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import torch

from gpt2.config import PRESETS
from gpt2.hub.export import save_space_model
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
    found: dict[str, float | str] = {}

    def tell(name: str, value: float | str) -> None:
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
            next(part for part in clients.answers(client, clients.GOOD) if part["texts"][0])
        tell("seconds from start to first token", time.monotonic() - start_s)
        let_in(server, tell, minutes)
    REPORT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def let_in(server: Server, tell: Callable[[str, float | str], None], minutes: float) -> None:
    """Everything that visitors do to a server, and what it said."""
    clients.visit(server.url, SLOTS, 20)  # every slot has been used
    before = server.resident_bytes()
    for name, value in clients.visit(server.url, SLOTS, 60 * minutes).items():
        tell(f"{SLOTS} visitors, {minutes:g} minutes: {name}", value)
    tell("after the visitors: more memory, MB", (server.resident_bytes() - before) / 1e6)
    freed = [clients.seconds_to_free_slots(server.url, SLOTS) for _ in range(5)]
    tell("all slots abandoned: seconds to a new first token", max(freed))
    fuzzed = clients.fuzz(server.url, FUZZED_CALLS)
    tell(f"{FUZZED_CALLS} fuzzed calls", ", ".join(f"{key} {value}" for key, value in sorted(fuzzed.items())))
    flooded = clients.flood(server.url, POSTS)
    tell(f"{POSTS} calls as a flood, by status", ", ".join(f"{key}: {value}" for key, value in sorted(flooded.items())))
    drained_s = time.monotonic()
    with httpx.Client(base_url=server.url, timeout=600) as client:
        while client.post(clients.CALL, json={"data": clients.GOOD}).status_code == clients.QUEUE_FULL:
            time.sleep(0.5)
    tell("seconds until there is room in line again", time.monotonic() - drained_s)
    tell("more memory in the end, MB", (server.resident_bytes() - before) / 1e6)
    tell("tracebacks", server.stop().count("Traceback"))


if __name__ == "__main__":
    main()
