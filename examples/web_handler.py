"""An asyncio web service of your own around a pipeline, if `snoopi-rt serve` is not what you want: timeouts, and clients that disconnect.

python examples/web_handler.py     (needs the extra `serve` for Starlette and uvicorn; it asks itself once and ends)
"""

import asyncio
import urllib.request

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import snoopi_rt

pipe = snoopi_rt.load(threads=2).warmup()


async def gone(request: Request) -> None:
    """Returns when the client disconnects: no server cancels a handler for that."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def draw(request: Request) -> Response:
    """GET /?prompt=...&negative=...: a PNG."""
    asked = request.query_params
    # In a thread, so that the event loop serves others meanwhile.
    drawing = asyncio.create_task(pipe.generate_async(asked.get("prompt"), asked.get("negative"), timeout=5))
    watching = asyncio.create_task(gone(request))
    await asyncio.wait((drawing, watching), return_when=asyncio.FIRST_COMPLETED)
    watching.cancel()
    if not drawing.done():
        drawing.cancel()  # no further stage begins
        return PlainTextResponse("the client disconnected", 499)
    try:
        result = drawing.result()
    except snoopi_rt.InputError as error:
        return PlainTextResponse(str(error), 400)
    except snoopi_rt.Cancelled as error:
        return PlainTextResponse(str(error), 504)
    return Response(result.encode("png")[0], media_type="image/png", headers={"x-seed": str(result.seeds[0])})


async def main() -> None:
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=[Route("/", draw)]), port=8077, log_level="warning"))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)

    def ask() -> tuple[str, int]:
        with urllib.request.urlopen("http://127.0.0.1:8077/?prompt=a+blurry+fox+on+a+blue+background&negative=blurry") as answer:
            return answer.headers["x-seed"], len(answer.read())

    for seed, size in await asyncio.gather(*(asyncio.to_thread(ask) for _ in range(4))):
        print(f"seed {seed}: {size} bytes of PNG")
    server.should_exit = True
    await running
    pipe.close()


asyncio.run(main())
