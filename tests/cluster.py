"""A cluster as an operator starts one: `ray start`, its own ports, token authentication, `ray job`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

BINARIES = Path(sys.executable).parent
PROJECT = Path(__file__).parents[1]

PATIENCE_SECONDS = 600
"""How long a test waits for what takes seconds on an idle machine: only what never comes fails."""


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def assert_all_is_free(cpus=2.0, seconds=120):
    """Every placement group is gone and every CPU free, at the latest after `seconds`."""
    import ray
    from ray.util import placement_group_table

    end = time.monotonic() + seconds
    while True:
        groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
        free = ray.available_resources().get("CPU", 0.0)
        if not groups and free == cpus:
            return
        assert time.monotonic() < end, (groups, free)
        time.sleep(0.5)


class Cluster:
    """A head and any number of worker nodes, each a raylet of its own on this machine.

    Args:
        folder: where the nodes' logs and the token go. Ray keeps its sockets below `/tmp`, whose path is short.
        cpus: of the head.
        binaries: the folder of the nodes' Python and Ray.
        growth: nodes of two CPUs that Ray's autoscaler may add where work waits for them, here as well.
    """

    def __init__(self, folder: Path, cpus: int = 2, binaries: Path = BINARIES, growth: int = 0) -> None:
        home = folder / "home"
        home.mkdir(parents=True)
        self.folder, self._ray = folder, str(binaries / "ray")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self._scratch = tempfile.mkdtemp(prefix="r", dir="/tmp")
        self.environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_TMPDIR": self._scratch}
        # A job that is stopped gets the time to save even where the machine has much else to do.
        self.environment["RAY_JOB_STOP_WAIT_TIME_S"] = "60"
        self.environment["PATH"] = f"{binaries}:{os.environ['PATH']}"
        self.environment["SUPMER_HOME"] = os.environ.get("SUPMER_HOME", str(Path.home() / ".cache" / "supmer"))
        self.ray("get-auth-token", "--generate")
        gcs, dashboard, agent, client, metrics = free_ports(5)
        self.address, self.dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        self.nodes: list[subprocess.Popen] = []
        growing = self._autoscaler(gcs, growth) if growth else []
        try:
            self._start(
                "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
                f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", f"--num-cpus={cpus}",
                *growing,
            )  # fmt: skip
            self.wait_for(lambda: self.alive() == 1, "the head")
        except BaseException:
            self.close()
            raise

    def _autoscaler(self, gcs: int, growth: int) -> list[str]:
        """What the head is started with so that Ray's autoscaler starts raylets on this machine, as in its tests."""
        head = "f" * 51 + "00000"
        worker = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": growth}
        config = {
            "cluster_name": "growing", "max_workers": growth, "upscaling_speed": 1.0, "idle_timeout_minutes": 60,
            "provider": {
                "type": "fake_multinode", "head_node_id": head, "gcs_address": f"127.0.0.1:{gcs}",
                "use_node_id_as_ip": True, "disable_node_updaters": True,
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0}, "worker": worker,
            },
            "auth": {"ssh_user": "nobody"}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [],
            "file_mounts_sync_continuously": False, "initialization_commands": [], "setup_commands": [],
            "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
        }  # fmt: skip
        self.environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        self.environment["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] = head
        (self.folder / "autoscaler.json").write_text(json.dumps(config))
        return [f"--autoscaling-config={self.folder / 'autoscaler.json'}"]

    def join(self, cpus: int = 1) -> subprocess.Popen:
        """Start a worker node; returns its process."""
        agent, metrics = free_ports(2)
        alive = self.alive()
        node = self._start(
            f"--address={self.address}", f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={agent}",
            f"--metrics-export-port={metrics}",
        )  # fmt: skip
        self.wait_for(lambda: self.alive() == alive + 1, "a worker node")
        return node

    def _start(self, *options: str) -> subprocess.Popen:
        with (self.folder / f"node{len(self.nodes)}.log").open("w") as log:
            command = [self._ray, "start", "--block", "--disable-usage-stats", *options]
            node = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )
        self.nodes.append(node)
        return node

    def alive(self) -> int:
        """How many nodes the head counts."""
        assert all(node.poll() is None or node.returncode < 0 for node in self.nodes), "a node could not start"
        text = self.ray("status", check=False).stdout
        active = text.partition("Active:")[2].partition("Pending:")[0]
        return sum(int(count) for count in re.findall(r"^ (\d+) \S", active, re.MULTILINE))

    def ray(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A `ray` command against this cluster."""
        where = ["--address", self.address] if arguments[0] == "status" else []
        done = subprocess.run(
            [self._ray, *arguments, *where], env=self.environment, capture_output=True, text=True, cwd=PROJECT
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def submit(self, *entrypoint: object, installed: bool = False, environment: str | None = None) -> str:
        """Submit a job as `jobs/` documents it, without waiting; returns its id.

        Args:
            installed: run the project where it is installed, not from a copy of its folder. Nodes that share a
                machine share these copies, and a node that joins clears them.
            environment: a file with the runtime environment.
        """
        job = f"supmer-{time.monotonic_ns()}"
        command = ["job", "submit", "--address", self.dashboard, "--no-wait", "--submission-id", job]
        if environment:
            command += ["--runtime-env", environment]
        words = [
            str(PROJECT / word) if installed and str(word).startswith("jobs/") else str(word) for word in entrypoint
        ]
        self.ray(*command, *([] if installed else ["--working-dir", "."]), "--", *words)
        return job

    def stop(self, job: str) -> None:
        """`ray job stop`, without waiting for the end."""
        self.ray("job", "stop", "--address", self.dashboard, "--no-wait", job)

    def follow(self, job: str) -> str:
        """`ray job logs --follow`: what it prints until the job ends."""
        return self.ray("job", "logs", "--follow", "--address", self.dashboard, job, check=False).stdout

    def api(self, path: str) -> Any:
        """What the dashboard answers."""
        token = (Path(self.environment["HOME"]) / ".ray" / "auth_token").read_text().strip()
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return self.api(f"/api/jobs/{job}")["status"]

    def wait_for_end(self, job: str, state: str = "SUCCEEDED") -> str:
        """Wait until a job ended, as it should; returns its log."""

        def ended() -> bool:
            with suppress(OSError):  # a dashboard may be slow to answer while nodes come and go
                return self.state(job) in ("SUCCEEDED", "FAILED", "STOPPED")
            return False

        self.wait_for(ended, f"the end of {job}")
        log = self.api(f"/api/jobs/{job}/logs")["logs"]
        assert self.state(job) == state, log
        return log

    @staticmethod
    def wait_for(condition, what):
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}"
            time.sleep(0.5)

    @staticmethod
    def kill(node: subprocess.Popen) -> None:
        """SIGKILL a node and everything that it started, as a power cut would."""
        import psutil

        parent = psutil.Process(node.pid)
        # The parent first: seeing its children die, it would end by itself, as a node does that could not start.
        for process in [parent, *parent.children(recursive=True)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        node.wait()

    def close(self) -> None:
        import psutil

        started = [
            child for node in self.nodes if node.poll() is None for child in psutil.Process(node.pid).children(True)
        ]
        for node in reversed(self.nodes):
            if node.poll() is None:
                node.send_signal(signal.SIGTERM)
        for node in self.nodes:
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                self.kill(node)
        for process in started:  # the nodes of an autoscaler outlive it
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
