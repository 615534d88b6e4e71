"""A cluster whose hosts are network namespaces, with a network between them that loses packets or cuts a host off.

This process looks on from the coordinator's host: its thread that makes the cluster is in that namespace until the end.
"""
import ctypes
import json
import os
import pathlib
import subprocess
import tempfile
import time

from cluster import Cluster, PATIENCE_SECONDS

CLONE_NEWNET = 0x40000000


class NetworkCluster(Cluster):
    """The coordinator has a host of its own. The workers have one each (`apart`), and their ranks talk over the network;
    or one together, on which all that the ranks say to each other stays. A share of all packets is lost, both ways."""

    def __init__(self, build, devices, workers, apart, loss=0.0):
        super().__init__(build, devices, workers)
        self.bin, self.apart, self.loss, self.running = pathlib.Path(build) / "bin", apart, loss, []

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.home = os.open("/proc/self/ns/net", os.O_RDONLY)
        try:
            members = 1 + (self.workers if self.apart else 1)
            self.network = subprocess.Popen([str(self.bin / "penstock-lossy-network"), "--members", str(members),
                                             "--loss", str(self.loss)],
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            line = self.network.stdout.readline()
            if not line:
                raise RuntimeError("no network of namespaces here: it needs root, or the right to make them")
            self.hosts = json.loads(line)["members"]
            enter_namespace(f"/proc/{self.hosts[0]}/ns/net")
            self.server = f"http://10.73.0.1:{self.start_coordinator()['http_port']}"
            for i in range(self.workers):
                self.start_worker(i)
            self.environment = dict(os.environ, PENSTOCK_SERVER=self.server)
            wait_for("every worker", lambda: len(self.get("workers")["items"]) == self.workers)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in self.running:
            process.kill()
            process.wait()
        enter_namespace(self.home)
        self.network.stdin.close()
        self.network.wait()
        os.close(self.home)
        self.folder.cleanup()

    def spawn(self, name, host, program, *arguments, environment=None):
        with open(f"{self.folder.name}/{name}.log", "a", encoding="utf-8") as log:
            self.running.append(subprocess.Popen(
                ["nsenter", f"--target={self.hosts[host]}", "--net", "--mount", "--", str(self.bin / program),
                 "--state-dir", f"{self.folder.name}/{name}", *arguments],
                stdout=log, stderr=log, env=environment))

    def start_coordinator(self):
        self.spawn("coordinator", 0, "penstock-coordinator", "--bind", "10.73.0.1", "--http-port", "0", "--control-port",
                   "0")
        path = pathlib.Path(self.folder.name) / "coordinator/endpoints.json"
        wait_for("the coordinator", path.exists)
        self.endpoints = json.loads(path.read_text(encoding="utf-8"))
        return self.endpoints

    def start_worker(self, i):
        """UCX would see that all is one machine, and have ranks on two hosts talk through memory."""
        flags = ["--data-interface", "link0"] if self.apart else ["--data-interface", "lo"]
        environment = dict(os.environ, UCX_TLS="tcp") if self.apart else None
        self.spawn(f"worker-{i}", self.host_of(i), "penstock-worker", "--coordinator",
                   f"tcp://10.73.0.1:{self.endpoints['control_port']}", "--devices", str(self.devices), "--name",
                   f"worker-{i}", "--http-port", "0", *flags, environment=environment)

    def host_of(self, worker):
        return 1 + worker if self.apart else 1

    def set_cut_off(self, worker, cut_off):
        """From when on nothing reaches the worker's host or comes from it; or everything again."""
        line = f"{'cut' if cut_off else 'heal'} {self.host_of(worker)}\n"
        begin = time.time()
        self.network.stdin.write(line)
        self.network.stdin.flush()
        if self.network.stdout.readline() != line:
            raise RuntimeError("the network did not obey")
        return begin


def enter_namespace(which):
    """Of this thread, and of what it starts."""
    fd = which if isinstance(which, int) else os.open(which, os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET) != 0:
        raise RuntimeError(f"enter a network namespace: {os.strerror(ctypes.get_errno())}")
    if not isinstance(which, int):
        os.close(fd)


def wait_for(what, there):
    end = time.monotonic() + PATIENCE_SECONDS
    while not there():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not come in {PATIENCE_SECONDS} s")
        time.sleep(0.02)
