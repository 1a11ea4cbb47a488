"""A process starts as many threads as it may use, whatever the machine has."""

from pathlib import Path

import pytest

from snoopi_rt.engines.threads import available_threads

EIGHT = range(8)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(("limit", "threads"), [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1)])
def test_the_quota_of_cgroup_version_2_counts_rounded_up(tmp_path: Path, limit: str, threads: int) -> None:
    files = {"proc/self/cgroup": "0::/system.slice/app", "sys/fs/cgroup/system.slice/app/cpu.max": limit}
    assert available_threads(write(tmp_path, files), EIGHT) == threads


@pytest.mark.parametrize("where", ["cpu.max", "kubepods/cpu.max", "kubepods/pod/cpu.max"])
def test_the_quota_of_every_group_above_counts(tmp_path: Path, where: str) -> None:
    files = {
        "proc/self/cgroup": "0::/kubepods/pod/container",
        "sys/fs/cgroup/kubepods/pod/container/cpu.max": "max 100000",
        f"sys/fs/cgroup/{where}": "300000 100000",
    }
    assert available_threads(write(tmp_path, files), EIGHT) == 3


@pytest.mark.parametrize("path", ["/../../docker/0a1b", "/docker/0a1b", "/"])
def test_in_a_container_whose_path_is_the_hosts_the_mounted_group_counts(tmp_path: Path, path: str) -> None:
    files = {"proc/self/cgroup": f"0::{path}", "sys/fs/cgroup/cpu.max": "400000 100000"}
    assert available_threads(write(tmp_path, files), EIGHT) == 4


@pytest.mark.parametrize(("quota", "threads"), [("-1", 8), ("250000", 3)])
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_cgroup_version_1_counts(tmp_path: Path, controllers: str, quota: str, threads: int) -> None:
    folder = f"sys/fs/cgroup/{controllers}/docker/0a1b"
    files = {
        "proc/self/cgroup": f"9:memory:/docker/0a1b\n1:{controllers}:/docker/0a1b\n0::/",
        f"{folder}/cpu.cfs_quota_us": quota,
        f"{folder}/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/docker/0a1b/cpu.cfs_quota_us": "100000",
    }
    assert available_threads(write(tmp_path, files), EIGHT) == threads


def test_two_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {topology.format(number): f"{number % 4},{number % 4 + 4}" for number in EIGHT}
    assert available_threads(write(tmp_path, files), EIGHT) == 4
    assert available_threads(tmp_path, [0, 4, 5]) == 2


def test_a_system_that_says_nothing_counts_its_processors(tmp_path: Path) -> None:
    assert available_threads(tmp_path, EIGHT) == 8
    assert available_threads(tmp_path, []) == 1
    assert available_threads() >= 1
