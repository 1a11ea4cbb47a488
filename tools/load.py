"""Load on `snoopi-rt serve`: clients that ask again and again, against a bare loop of the pipeline that also writes the PNG.

    python tools/load.py --out docs/load.json

The server runs in a process of its own on the same cores as the clients, so its CPU seconds are given too. The bare loop runs before and
after every row, a quarter of its time each, and the row is compared with the mean of the two: machines change their pace.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import click
import httpx

import snoopi_rt
from snoopi_rt import image

PROMPTS = [
    f"a {thing} on a {colour} background" for thing in ("panda", "fox", "red apple", "rocket") for colour in ("red", "blue", "green")
]
PORT = 8199
DRAW = f"http://127.0.0.1:{PORT}/v1/images/generations"


@click.command()
@click.option("--clients", type=int, multiple=True, default=(1, 8, 64))
@click.option("--seconds", default=60.0)
@click.option("--batching", type=click.Choice(["off", "on", "both"]), default="both")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(clients: tuple[int, ...], seconds: float, batching: str, out: Path) -> None:
    """Print the table and write it as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"seconds": seconds, "cold start": None, "rows": []}
    titles = ("batching", "clients", "images/s", "bare loop", "% of it", "p50 ms", "p95 ms", "p99 ms", "CPU s/image", "bare CPU s", "MB")
    click.echo("".join(f"{title:>12}" for title in titles) + "  answers")
    for on in {"off": [False], "on": [True], "both": [False, True]}[batching]:
        start = time.perf_counter()
        server = subprocess.Popen(
            [sys.executable, "-m", "snoopi_rt", "serve", "--port", str(PORT), *([] if on else ["--max-batch", "1"])],
            stderr=subprocess.DEVNULL,
        )
        try:
            wait(server)
            first = httpx.post(DRAW, json={"prompt": PROMPTS[0], "seed": 1})
            assert first.status_code == 200, first.text
            document["cold start"] = time.perf_counter() - start
            for count in clients:
                before = bare(seconds / 4)
                row = {"batching": on, "clients": count, **asyncio.run(load(server.pid, count, seconds))}
                after = bare(seconds / 4)
                row["bare"] = {name: (before[name] + after[name]) / 2 for name in before}
                row["of bare"] = row["images a second"] / row["bare"]["images a second"]
                document["rows"].append(row)
                out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                rates = (row["images a second"], row["bare"]["images a second"], 100 * row["of bare"], row["p50"], row["p95"], row["p99"])
                costs = (row["CPU seconds an image"], row["bare"]["CPU seconds an image"])
                cells = ("on" if on else "off", count, *(f"{rate:.1f}" for rate in rates), *(f"{cost:.4f}" for cost in costs))
                click.echo("".join(f"{cell:>12}" for cell in (*cells, f"{row['megabytes']:.0f}")) + f"  {row['answers']}")
        finally:
            server.terminate()
            server.wait()
    click.echo(f"process start to the first image over HTTP: {document['cold start']:.2f} s")


def bare(seconds: float) -> dict[str, float]:
    """Images per second of a loop that draws one image and encodes it, every prompt known, and CPU seconds of each."""
    with snoopi_rt.load() as pipe:
        pipe.warmup()
        for prompt in PROMPTS:
            pipe.generate(prompt, seed=0)
        start, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < seconds:
            result = pipe.generate(PROMPTS[count % len(PROMPTS)], seed=count)
            image.encode(result.images[0], "png", result.metadata(0))
            count += 1
        taken = time.perf_counter() - start
        return {"images a second": count / taken, "CPU seconds an image": (time.process_time() - cpu) / count}


def wait(server: subprocess.Popen) -> None:
    """Returns when the server is ready."""
    while server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{PORT}/readyz").status_code == 200:
                return
        except httpx.ConnectError:
            time.sleep(0.02)
    raise click.ClickException("the server ended")


async def load(pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """What so many clients got in so many seconds, each asking again as soon as it has its image."""
    taken: list[float] = []
    answers: dict[str, int] = {}
    cpu, begun = cpu_seconds(pid), time.perf_counter()

    async def client(number: int, http: aiohttp.ClientSession) -> None:
        turn = number
        while time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            async with http.post(DRAW, json={"prompt": PROMPTS[turn % len(PROMPTS)], "seed": turn}) as answer:
                await answer.read()
            answers[str(answer.status)] = answers.get(str(answer.status), 0) + 1
            if answer.status == 200:
                taken.append(time.perf_counter() - start)
            turn += clients

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients)) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    wall, used = time.perf_counter() - begun, cpu_seconds(pid) - cpu
    cuts = statistics.quantiles(taken, n=100)
    return {
        "images a second": len(taken) / wall,
        "p50": 1e3 * cuts[49],
        "p95": 1e3 * cuts[94],
        "p99": 1e3 * cuts[98],
        "CPU seconds an image": used / len(taken),
        "megabytes": int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) * 4096 / 1e6,
        "answers": answers,
    }


def cpu_seconds(pid: int) -> float:
    """Of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


if __name__ == "__main__":
    main()
