"""How many threads are worth starting: as many cores as the process may use, not as the machine has."""

import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path


def available_threads(root: Path = Path("/"), processors: Collection[int] | None = None) -> int:
    """One thread per core, at most the CPU quota of the process's cgroups rounded up, at least 1.

    Two hardware threads of one core count once: they share its arithmetic units. processors: those that the process may run on; None: by
    the system. root: where /proc and /sys are.
    """
    if processors is None:
        processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    topology = root / "sys" / "devices" / "system" / "cpu"
    cores = {_read(topology / f"cpu{number}" / "topology" / "thread_siblings_list") or str(number) for number in processors}
    return max(1, min([len(cores), *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """CPU seconds per second that each cgroup above the process allows, of version 2 (cpu.max) and 1 (cfs quota)."""
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys" / "fs" / "cgroup" / controllers
        # In a container the path may be the host's, which is not there: what is mounted is then the container's own.
        folder = mount.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
        for level in (folder, *folder.parents):
            limit = _read(level / "cpu.max").split() or [_read(level / f"cpu.cfs_{what}_us") for what in ("quota", "period")]
            if len(limit) == 2 and all(number.isdecimal() for number in limit):  # "max" and -1 are no limit
                yield int(limit[0]) / int(limit[1])
            if level == mount:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace", encoding="utf-8").strip()
    except OSError:
        return ""
