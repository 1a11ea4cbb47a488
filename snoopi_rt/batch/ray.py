"""Many prompts on a Ray cluster: Ray Data hands the rows of a batch to processes that each have the bundle open."""

import atexit
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from snoopi_rt.batch.runner import Batch, Drawn, Job, draw_together
from snoopi_rt.engines.messages import first_reason, why
from snoopi_rt.errors import EngineError, SnoopiError
from snoopi_rt.interrupts import handlers_kept
from snoopi_rt.loading import load
from snoopi_rt.pipeline import Pipeline
from snoopi_rt.request import Request


def start_ray() -> None:
    """Joins the cluster of $RAY_ADDRESS, else starts one on this machine that ends with this process and leaves nothing behind.

    Raises EngineError.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody unless asked for
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong comes as an exception
    try:
        with handlers_kept():
            ray.init(**_own_cluster(), ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(f"Ray cannot start: {why(error)}") from error


def _own_cluster() -> dict[str, Any]:
    """What a cluster of this process is started with, so that it leaves nothing behind; empty if it joins one that is running."""
    if os.environ.get("RAY_ADDRESS") or ray.is_initialized():
        return {}
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)  # else Ray leaves one in the user's folder
    folder = tempfile.mkdtemp(prefix="ray-")  # short: the paths of sockets are bounded

    def end() -> None:
        ray.shutdown()
        for _ in range(50):  # its processes write for a moment yet
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                break
            time.sleep(0.1)

    atexit.register(end)
    return {"_temp_dir": folder}


def original_error(error: RayTaskError) -> BaseException:
    """What was raised in another process, without Ray's page about it."""
    cause = error.cause
    return cause if isinstance(cause, SnoopiError) else EngineError(f"{type(cause).__name__}: {cause}")


@dataclass(frozen=True)
class Workers:
    """How many processes have a bundle open: `min` to `max`, as there is work. cpus, gpus: what each takes; may be a part of one."""

    min: int = 1
    max: int = 1
    cpus: float = 1
    gpus: float = 0


def draw_on_ray(load_options: dict[str, Any], workers: Workers, pipe: Pipeline, batch: Batch, jobs: Iterable[Job]) -> Iterator[Drawn]:
    """With its first two given, a Draw of runner.py; load_options: what `load` takes by name. `pipe` itself is not opened.

    A process that dies is replaced, and what it was drawing is drawn again. Unlike here, all jobs are in memory first. Raises
    EngineError if a process cannot open the bundle, or Ray fails.
    """
    rows = [{"job": json.dumps([row, vars(request)])} for row, request in jobs]
    if not rows:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A block is handed out, comes back and is drawn again at once: it is one call.
    dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // pipe.max_batch)).map_batches(
        BatchWorker,
        batch_size=pipe.max_batch,
        compute=ray.data.ActorPoolStrategy(min_size=workers.min, max_size=workers.max),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
        fn_constructor_args=(load_options, replace(batch, prompts=Path())),  # a process gets rows, not the file
    )
    try:
        for row in dataset.iter_rows():
            yield Drawn(row["row"], row["file"], json.loads(row["metadata"]), row["error"], row["warning"])
    except RayError as error:
        # Ray's page about it ends with the line that says why.
        raise EngineError(f"a process on Ray failed: {first_reason(reversed(str(error).splitlines())) or why(error)}") from None


class BatchWorker:
    """What a process keeps open."""

    def __init__(self, load_options: dict[str, Any], batch: Batch) -> None:
        self._pipe, self._batch = load(**load_options), batch

    def __call__(self, rows: dict[str, Sequence[str]]) -> dict[str, list[Any]]:
        """Rows of jobs to rows of Drawn."""
        jobs = [(row, Request(**fields)) for row, fields in map(json.loads, rows["job"])]
        drawn = [asdict(row) for row in draw_together(self._pipe, self._batch, jobs)]
        columns = {name: [row[name] for row in drawn] for name in ("row", "file", "error", "warning")}
        return columns | {"metadata": [json.dumps(row["metadata"]) for row in drawn]}
