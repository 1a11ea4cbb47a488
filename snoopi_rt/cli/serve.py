"""`snoopi-rt serve`. FastAPI and uvicorn are imported inside it."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from snoopi_rt.cli.options import (
    Integer,
    Number,
    complete_bundle,
    engine_option,
    named_folder,
    ray_options,
    ray_workers,
    worker_threads_option,
)
from snoopi_rt.engines import known_engine
from snoopi_rt.errors import InputError, PackageMissing, how_to_install
from snoopi_rt.server.settings import MAX_TIMEOUT, Settings, read_key


@click.command(epilog="Example: snoopi-rt serve --port 8000 --bundle my-bundle")
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Address to listen on; any other than loopback needs an API key.")
@click.option("--port", type=Integer(1, 65535), default=8000, metavar="N", help="Port to listen on.")
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    metavar="[NAME=]FOLDER",
    shell_complete=complete_bundle,
    help="A bundle to serve; repeatable, the first is the default.  [default: the embedded bundle]",
)
@engine_option
@click.option("--precision", metavar="NAME", help="Precision of the bundles, or one per graph.  [default: the bundle's first]")
@worker_threads_option
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File with the bearer token that clients must send.  [default: $SNOOPI_RT_API_KEY]",
)
@click.option(
    "--max-batch", type=Integer(1), default=16, metavar="N", help="Maximum images of several requests drawn together; 1: no batching."
)
@click.option("--batch-wait", type=Number(0, 1000), default=0.0, metavar="MS", help="Milliseconds that a batch waits for more requests.")
@click.option("--queue", type=Integer(1), default=256, metavar="N", help="Images that may wait to be drawn; requests beyond that get 429.")
@click.option("--max-images", type=Integer(1), default=16, metavar="N", help="Maximum number of images per request.")
@click.option(
    "--timeout", type=Number(0, MAX_TIMEOUT, min_open=True), default=60.0, metavar="S", help="Seconds per request, waiting included."
)
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Origin of a web page that may call the server; repeatable.  [default: none]")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Another host name by which the server answers without an API key; repeatable.",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "memory", "mapped"]),
    default="auto",
    help="memory: read the weights, so that a served bundle's files may be overwritten; mapped: use less memory; auto: memory up to 2 GiB.",
)
@click.option("--root-path", default="", metavar="PATH", help="Path under which a proxy exposes the server, such as /images.")
@click.option("--truncate", is_flag=True, help="Cut prompts that are too long, unless the request says otherwise.")
@click.option("--lenient", is_flag=True, help="Draw the nearest supported size, and use the first bundle for an unknown model name.")
@click.option("--log-json", is_flag=True, help="Log JSON lines even at a terminal.")
@click.option("--log-prompts", is_flag=True, help="Include prompts in the log.")
@ray_options
def serve(
    host: str,
    port: int,
    bundles: tuple[str, ...],
    engine: str,
    precision: str | None,
    threads: int | None,
    api_key_file: Path | None,
    batch_wait: float,
    weights: str,
    log_json: bool,
    ray: bool,
    workers: tuple[int, int] | None,
    gpus: float | None,
    **settings: Any,
) -> None:
    """Serve bundles over HTTP, compatible with OpenAI's image API."""
    ray_settings = ray_workers(ray, workers, gpus, threads)
    if ray_settings is not None and threads is None:
        threads = 1
    try:
        from snoopi_rt.server.serve import serve as run
    except ImportError as error:
        raise PackageMissing(f"serve needs {error.name}: {how_to_install('serve')}") from error
    from snoopi_rt.loading import load

    if engine != "auto":
        known_engine(engine)
    folders: list[tuple[str, str | None]] = [(name, str(folder)) for name, folder in map(named_folder, bundles)] or [("small", None)]
    if len(dict(folders)) < len(folders):
        raise InputError("two bundles have the same name: rename one with --bundle NAME=FOLDER")
    load_options: dict[str, Any] = {"engine": engine, "precision": precision, "threads": threads, "weights": weights}
    server_settings = Settings(
        models={name: partial(load, folder, **load_options) for name, folder in folders},
        key=read_key(api_key_file, os.environ.get("SNOOPI_RT_API_KEY")),
        batch_wait=batch_wait / 1000,
        **settings,
    )
    log_json = log_json or not sys.stderr.isatty()
    if ray_settings is None:
        run(server_settings, host, port, log_json)
    else:
        from snoopi_rt.server.ray import serve_on_ray

        serve_on_ray(server_settings, ray_settings, host, port, log_json)
