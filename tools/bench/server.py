"""Send many requests to a server, some of which leave early: how long they take, what stays behind.

    python tools/bench/server.py -n 200 --at-once 8
    python tools/bench/server.py -n 2000 --at-once 8 -- -m base.gguf -me expert.gguf -np 4

What follows `--` is for `colm-edge serve`, which this starts. Memory is the resident memory of that
process after a tenth of the requests, and at the end (Linux).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

from colm_edge.tables import Table, render

TOKENS = 24  # of an answer
LEAVES = 5  # each so many requests leaves after its first token


async def ask(client: httpx.AsyncClient, i: int) -> tuple[float, float] | None:
    """Return the seconds to the first token and to the end; None where the client left."""
    body = {"prompt": f"Request {i}: tell me about the", "max_tokens": TOKENS, "stream": True}
    since, first = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line:
                continue
            first = first or time.perf_counter() - since
            if i % LEAVES == 0:
                return None
    return first, time.perf_counter() - since


async def send(url: str, n: int, at_once: int, pid: int) -> Table:
    limits, free = httpx.Limits(max_connections=at_once), asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        begun = 0
        early = 0.0

        async def one(i: int) -> tuple[float, float] | None:
            nonlocal begun, early
            async with free:
                begun += 1
                if begun == max(1, n // 10):
                    early = resident(pid)
                return await ask(client, i)

        since = time.perf_counter()
        found = [x for x in await asyncio.gather(*map(one, range(n))) if x is not None]
        seconds = time.perf_counter() - since
        await asyncio.sleep(0.5)
        metrics = (await client.get("/metrics")).text
    firsts, wholes = (sorted(column) for column in zip(*found, strict=True))
    busy = next(line for line in metrics.splitlines() if line.startswith("colm_busy_slots"))
    return [
        {
            "requests": n,
            "seconds": seconds,
            "first_token_median": statistics.median(firsts),
            "whole_median": statistics.median(wholes),
            "whole_95_percent": wholes[int(0.95 * len(wholes))],
            "busy_slots": int(float(busy.split()[-1])),
            "memory_early_mb": round(early),
            "memory_end_mb": round(resident(pid)),
        }
    ]


def resident(pid: int) -> float:
    """Return a process's resident memory in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-n", type=int, default=200, help="requests")
    parser.add_argument("--at-once", type=int, default=8, help="how many are under way")
    parser.add_argument("serve", nargs="*", help="options of `colm-edge serve`, after --")
    given = parser.parse_args()
    command = [sys.executable, "-m", "colm_edge", "serve", "--port", "0", *given.serve]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            line = next(line for line in server.stderr if "listening on" in line)
            table = asyncio.run(send(line.split()[-1], given.n, given.at_once, server.pid))
        finally:
            server.terminate()
    print(render(table, "md"))


if __name__ == "__main__":
    main()
