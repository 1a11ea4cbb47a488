"""A soak of `snoopi-rt serve`: clients with ever new prompts while the served bundle's folder is replaced by rename, twice a minute.

    python tools/soak.py --minutes 10 --clients 64 --out out/soak.json

The server keeps the bundle that it opened: every answer is an image of that one, or 429. One image in twenty is drawn again here and may
differ by one level. The first prompts are long ones, which fill the server's store of prompts' states (64 MiB): its memory after that, and
after the first minute, is compared with that at the end. The exit code is 1 if any of it fails.
"""

import asyncio
import base64
import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import click
import numpy as np
from PIL import Image

WORDS = ("panda", "fox", "rocket", "apple", "owl", "red", "blue", "green", "small", "blurry", "background", "on", "a", "the", "two", "cat")
CHECKED = 20
"""One picture of so many is drawn again."""
GROWTH = 1.05
"""How many times the memory at first the last one may be."""


class Server:
    """`snoopi-rt serve` of a copy of the embedded bundle, which `replace` exchanges for another copy."""

    def __init__(self, folder: Path) -> None:
        from snoopi_rt.pipeline import EMBEDDED

        self.bundle, self._other, self._log = folder / "bundle", folder / "other", open(folder / "log", "wb")  # noqa: SIM115
        shutil.copytree(EMBEDDED, self.bundle)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = [sys.executable, "-m", "snoopi_rt", "serve", "--port", str(self.port), "--bundle", str(self.bundle), "--engine", "cpu"]
        self._process = subprocess.Popen(words, stderr=self._log)
        self.replaced = 0

    def replace(self) -> None:
        """Puts a bundle with other files, and another name, in the place of the served one: by two renames, as documented."""
        shutil.copytree(self.bundle, self._other)
        manifest = self._other / "bundle.json"
        document = json.loads(manifest.read_text(encoding="utf-8"))
        self.replaced += 1
        manifest.write_text(json.dumps(document | {"name": f"small-{self.replaced}"}), encoding="utf-8")
        old = self.bundle.with_name("old")
        self.bundle.rename(old)
        self._other.rename(self.bundle)
        shutil.rmtree(old)

    def megabytes(self) -> float:
        """Its resident memory."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def tracebacks(self) -> int:
        """How many the log has."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace").count("Traceback")

    def close(self) -> int:
        """Ends it as a service manager does; its exit code."""
        self._process.terminate()
        code = self._process.wait()
        self._log.close()
        return code


class Clients:
    """What the clients of a server got, and what was `wrong` with it. `full_at`: when all had sent their long first prompts."""

    def __init__(self, port: int, clients: int, seed: int) -> None:
        import snoopi_rt
        from snoopi_rt.prompt_encoder import MAX_BYTES_IN_MEMORY

        self.address, self.answers, self.wrong = f"http://127.0.0.1:{port}", Counter[str](), list[str]()
        self.full_at: float | None = None
        self._filling, self._seed, self._pipe = clients, seed, snoopi_rt.load(engine="cpu")
        (states,) = self._pipe.bundle.variant("text_encoder", "cpu").outputs
        # Two prompts per request, of as many tokens as there may be.
        self._long = math.ceil(MAX_BYTES_IN_MEMORY / (2 * 4 * self._pipe.bundle.text.max_tokens * (states.shape[-1] or 1)) / clients)

    async def ready(self, http: aiohttp.ClientSession) -> None:
        """Returns once the server is ready."""
        while True:
            try:
                async with http.get(f"{self.address}/readyz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)

    async def client(self, number: int, http: aiohttp.ClientSession, end: float) -> None:
        """Sends requests one after the other until that time."""
        random, turn = Random(f"{self._seed} {number}"), 0
        while time.monotonic() < end:
            turn += 1
            if turn == self._long + 1:
                self._filling -= 1
                self.full_at = None if self._filling else time.monotonic()
            body = self._body(random, turn <= self._long)
            try:
                async with http.post(f"{self.address}/v1/images/generations", json=body) as response:
                    answer = await response.json()
            except (aiohttp.ClientError, TimeoutError) as error:
                self.answers["no answer"] += 1
                self.wrong.append(f"{type(error).__name__}: {error}")
                continue
            self.answers[str(response.status)] += 1
            if response.status == 429:
                await asyncio.sleep(random.random())
            elif response.status != 200:
                self.wrong.append(f"{response.status}: {answer}")
            elif turn % CHECKED == 0:
                await self._draw_again(body, answer)

    def close(self) -> None:
        self._pipe.close()

    def _body(self, random: Random, long: bool) -> dict[str, Any]:
        words = random.choices(WORDS, k=150 if long else random.randint(1, 12))
        body: dict[str, Any] = {"prompt": " ".join(words), "seed": random.randrange(2**32), "truncate": True}
        if long or random.random() < 0.5:
            negative = " ".join(words[::-1]) if long else random.choice(WORDS)
            body |= {"negative_prompt": negative, "negative_scale": random.choice((0.25, 0.5, 1.0))}
        return body

    async def _draw_again(self, body: dict[str, Any], answer: dict[str, Any]) -> None:
        self.answers["drawn again"] += 1
        again = await asyncio.to_thread(
            self._pipe.generate, body["prompt"], body.get("negative_prompt"), body.get("negative_scale"), body["seed"], truncate=True
        )
        with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as opened:
            difference = np.abs(np.asarray(opened).astype(int) - again.images[0]).max()
        if difference > 1:
            self.wrong.append(f"a picture that is {difference} levels off: {body}")


async def soak(server: Server, count: int, seconds: float, seed: int) -> dict[str, Any]:
    """What the clients got, what is wrong with it, and whether the server's memory grew."""
    clients, memory = Clients(server.port, count, seed), list[tuple[float, float]]()

    def measure() -> None:
        memory.append((time.monotonic(), server.megabytes()))

    async def every(pause: float, act: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(pause)
            await asyncio.to_thread(act)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await clients.ready(http)
        begun = time.monotonic()
        tasks = [asyncio.create_task(every(30.0, server.replace)), asyncio.create_task(every(10.0, measure))]
        await asyncio.gather(*(clients.client(number, http, begun + seconds) for number in range(count)))
        for task in tasks:
            task.cancel()
    measure()
    clients.close()
    settled = [] if clients.full_at is None else [value for at, value in memory if at >= max(clients.full_at, begun + 60.0)]
    if len(settled) < 2:
        clients.wrong.append("the store was full too late to see whether memory grows: give more --minutes")
    return {
        "answers": dict(clients.answers),
        "wrong": clients.wrong[:20],
        "seconds until the store was full": None if clients.full_at is None else round(clients.full_at - begun),
        "flat from then on": len(settled) > 1 and settled[-1] <= GROWTH * settled[0],
        "megabytes every 10 s": [round(value, 1) for _, value in memory],
    }


@click.command()
@click.option("--minutes", default=10.0)
@click.option("--clients", default=64)
@click.option("--seed", default=0)
@click.option("--out", type=click.Path(path_type=Path))
def main(minutes: float, clients: int, seed: int, out: Path | None) -> None:
    """Print and write what the clients got."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SNOOPI_RT_CACHE"] = folder  # the prompts are nobody's
        server = Server(Path(folder))
        try:
            row = asyncio.run(soak(server, clients, 60 * minutes, seed))
        finally:
            code = server.close()
        facts = {
            "minutes": minutes,
            "clients": clients,
            "bundles replaced": server.replaced,
            "tracebacks": server.tracebacks(),
        }
    document = {**facts, **row}
    click.echo(json.dumps(document))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if row["flat from then on"] and not row["wrong"] and not facts["tracebacks"] and code in (0, -15, 143) else 1)


if __name__ == "__main__":
    main()
