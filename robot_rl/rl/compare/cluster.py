"""Jobs on a Ray cluster, whose machines see the same files and have the same packages."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robot_rl.rl.compare.jobs import GRACE_SECONDS, POLL_SECONDS, Job, Places, spawn, stop_processes
from robot_rl.rl.remote import connect_ray


class RayPlaces(Places):
    """Tasks on a Ray cluster, whose machines see the same files and have the same packages.

    Args:
        count: jobs at once, 0 for as many as the cluster has processors.
        address: of the cluster, as for `connect_ray`.
    """

    def __init__(self, count: int = 0, address: str = "") -> None:
        self._ray = connect_ray("compare --cluster", address)
        processors = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        self.count = min(count or processors, processors)
        self.threads = max(1, processors // self.count)

    def start(self, job: Job) -> Any:
        """Submit the job."""
        task = self._ray.remote(num_cpus=self.threads, max_retries=0)(_run_remotely)
        return task.remote(job.arguments, str(job.log.resolve()), self.threads, str(Path.cwd()))

    def poll(self, handle: Any) -> int | None:
        """Return the exit status, or None while it runs or waits; a lost machine counts as a failure."""
        ready, _ = self._ray.wait([handle], timeout=0)
        if not ready:
            return None
        try:
            return int(self._ray.get(handle))
        except self._ray.exceptions.RayError:
            return -signal.SIGKILL

    def stop(self, handles: Sequence[Any]) -> None:
        """Cancel the jobs; each stops its process."""
        for handle in handles:
            self._ray.cancel(handle)
        if handles:
            self._ray.wait(list(handles), num_returns=len(handles), timeout=GRACE_SECONDS + 5)


def _run_remotely(arguments: Sequence[str], log: str, threads: int, directory: str) -> int:
    """Run a job inside a Ray task and return its exit status."""
    process = spawn(arguments, Path(log), threads, None, directory)
    try:
        # Not `wait`, which a cancelled task would sit out.
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
    except BaseException:
        stop_processes([process])
        raise
    return int(process.returncode)
