"""The command that serves bundles over HTTP. FastAPI and uvicorn are imported inside it."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from snoopi_rt.cli.options import Integer, Number, complete_bundle, engine_option, named_folder, ray_options, ray_workers
from snoopi_rt.engines import known_engine
from snoopi_rt.errors import EngineMissing, InputError, how_to_install


@click.command(epilog="Example: snoopi-rt serve --port 8000, then POST http://127.0.0.1:8000/v1/images/generations")
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Any address other than loopback needs an API key.")
@click.option("--port", type=Integer(1, 65535), default=8000, metavar="N")
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    metavar="[NAME=]FOLDER",
    shell_complete=complete_bundle,
    help="One or more; the first is the default.  [default: the embedded]",
)
@engine_option
@click.option("--precision", metavar="NAME", help="A precision of the bundles, or one a graph.  [default: the bundle's first]")
@click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: one for each core it may use]")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="What clients must send.  [default: $SNOOPI_RT_API_KEY]"
)
@click.option("--max-batch", type=Integer(1), default=16, metavar="N", help="Images of waiting requests drawn in one call; 1: none.")
@click.option("--batch-wait", type=Number(0, 1000), default=0.0, metavar="MS", help="How long a batch waits for more requests.")
@click.option("--queue", type=Integer(1), default=256, metavar="N", help="Images that may wait; then 429.")
@click.option("--max-images", type=Integer(1), default=16, metavar="N", help="Images of one request.")
@click.option("--timeout", type=Number(0, 10**9, min_open=True), default=60.0, metavar="S", help="Seconds of one request.")
@click.option("--cors", "origins", multiple=True, metavar="ORIGIN", help="A web page's origin that may call.  [default: none]")
@click.option(
    "--allowed-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Another name by which it may be called without a key.",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "memory", "mapped"]),
    default="auto",
    help="memory: files may be copied over a served bundle; mapped: less memory for large bundles; auto: memory up to 2 GiB.",
)
@click.option("--root-path", default="", metavar="PATH", help="The path below which a proxy shows the server, such as /images.")
@click.option("--truncate", is_flag=True, help="Cut prompts that are too long, where a request does not say otherwise.")
@click.option("--lenient", is_flag=True, help="Draw the nearest size, and take an unknown model name for the first bundle.")
@click.option("--log-json", is_flag=True, help="Log lines of JSON at a terminal too.")
@click.option("--log-prompts", is_flag=True, help="Write prompts into the log.")
@ray_options
def serve(
    bundles: tuple[str, ...],
    engine: str,
    precision: str | None,
    threads: int | None,
    api_key_file: Path | None,
    ray: bool,
    workers: tuple[int, int] | None,
    gpus: float | None,
    **options: Any,
) -> None:
    """Serve bundles over HTTP, in the words of OpenAI's image API."""
    scale = ray_workers(ray, workers, gpus, threads)
    if scale is not None and threads is None:
        threads = 1
    try:
        from snoopi_rt.server.app import Settings, read_key
        from snoopi_rt.server.serve import serve as run
    except ImportError as error:
        raise EngineMissing(f"serve needs {error.name}: {how_to_install('serve')}") from error
    from snoopi_rt.pipeline import load

    if engine != "auto":
        known_engine(engine)
    named: list[tuple[str, str | None]] = [(name, str(folder)) for name, folder in map(named_folder, bundles)] or [("small", None)]
    if len(dict(named)) < len(named):
        raise InputError("two bundles have one name: --bundle NAME=FOLDER gives them others")
    load_options: dict[str, Any] = {"engine": engine, "precision": precision, "threads": threads, "weights": options["weights"]}
    settings = Settings(
        models={name: partial(load, folder, **load_options) for name, folder in named},
        key=read_key(api_key_file, os.environ.get("SNOOPI_RT_API_KEY")),
        together=options["max_batch"],
        batch_wait=options["batch_wait"] / 1000,
        queue=options["queue"],
        most=options["max_images"],
        timeout=options["timeout"],
        prompts_in_log=options["log_prompts"],
        origins=options["origins"],
        hosts=options["hosts"],
        truncate=options["truncate"],
        lenient=options["lenient"],
        root=options["root_path"],
    )
    log_json = options["log_json"] or not sys.stderr.isatty()
    if scale is None:
        run(settings, options["host"], options["port"], log_json)
    else:
        from snoopi_rt.server.ray import serve_on_ray

        serve_on_ray(settings, scale, options["host"], options["port"], log_json)
