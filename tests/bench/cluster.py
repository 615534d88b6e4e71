"""A cluster for benchmarks: penstock dev up in a folder that is gone afterwards, with everything that runs in it."""
import calendar
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

PATIENCE_SECONDS = 240


class Cluster:
    def __init__(self, build, devices, workers=1):
        """Of so many worker daemons with so many devices each."""
        self.program = str(pathlib.Path(build) / "bin/penstock")
        self.devices, self.workers = devices, workers

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.environment = dict(os.environ, PENSTOCK_DEV_STATE_DIR=self.folder.name)
        try:
            self.server = self.up("--workers", str(self.workers), "--devices-per-worker", str(self.devices), "--port",
                                  "0")["server"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        subprocess.run([self.program, "dev", "down"], env=self.environment, capture_output=True, timeout=60)
        self.folder.cleanup()

    def penstock(self, *arguments):
        done = subprocess.run([self.program, *arguments, "-o", "json"], env=self.environment, capture_output=True,
                              text=True, timeout=60)
        if done.returncode != 0:
            raise RuntimeError(f"penstock {' '.join(arguments)} exited {done.returncode}: {done.stderr.strip()[-400:]}")
        return json.loads(done.stdout)

    def popen(self, *arguments):
        return subprocess.Popen([self.program, *arguments], env=self.environment, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)

    def up(self, *flags):
        """Starts the cluster, or what is missing of it; ends when every worker has registered."""
        return self.penstock("dev", "up", *flags)

    def kill(self, name):
        """Kills the coordinator or a worker daemon by name; once it has ended, returns when that was ordered."""
        pid = next(p["pid"] for p in self.penstock("dev", "status")["processes"] if p["name"] == name)
        begin = time.time()
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + PATIENCE_SECONDS
        while is_running(pid) and time.monotonic() < end:
            time.sleep(0.001)
        return begin

    def spec(self, spec_path, name, changes):
        """The canonical spec of that file under that name, with these keys changed: {section: {key: value}}."""
        spec = self.penstock("submit", str(spec_path), "--dry-run")
        for section, keys in changes.items():
            spec[section].update(keys)
        spec["metadata"]["name"] = name
        return spec

    def submit(self, spec_path, name, changes):
        """That spec as a job; its id."""
        spec = self.spec(spec_path, name, changes)
        path = pathlib.Path(self.folder.name) / f"{name}.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        return self.penstock("submit", str(path))["id"]

    def get(self, path):
        with urllib.request.urlopen(f"{self.server}/api/v1/{path}", timeout=90) as answer:
            return json.load(answer)

    def post_job(self, spec):
        """The id of the job of that canonical spec, as soon as the coordinator says it."""
        request = urllib.request.Request(f"{self.server}/api/v1/jobs", json.dumps(spec).encode(), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)["id"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"a submission was refused: {error.read(1000).decode()}") from None

    def items(self, job, path):
        return self.get(f"jobs/{job}/{path}?limit=10000")["items"]

    def items_when(self, job, path, enough):
        """The job's items as soon as `enough` of them."""
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            items = self.items(job, path)
            if enough(items):
                return items
            time.sleep(0.2)
        raise RuntimeError(f"no such {path} of {job} in {PATIENCE_SECONDS} s, at {items[-1:]}")

    def rank_pid(self, rank):
        """Of the one job that runs."""
        for entry in pathlib.Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if words and words[0].endswith(b"penstock-rank") and self.folder.name.encode() in b"\0".join(words):
                    if words[words.index(b"--rank") + 1] == str(rank).encode():
                        return int(entry.name)
            except (OSError, ValueError):
                continue  # it ended meanwhile
        raise RuntimeError(f"no process of rank {rank}")


def is_running(pid):
    """False also of a process that waits for its parent to take note, but not before its last thread has ended."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
        return state not in "ZX" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def seconds(item):
    """When that was, as time.time() counts."""
    return calendar.timegm(time.strptime(item["time"][:19], "%Y-%m-%dT%H:%M:%S")) + float(item["time"][19:-1])
