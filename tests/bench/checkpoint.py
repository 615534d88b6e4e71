"""The checkpoint store beside PyTorch Distributed Checkpoint (DCP): time, stall, bytes, memory and damage noticed.

Both save and load the same amount of random-looking f32 state on the same disk, alternated round by round; durable
means files and directory synced. The page cache forgets the files before each load, and both sides' files are in the
same state below it (make_cold). Ours verifies every byte it loads.

save      write and commit, caller waits     reshard   saved by N ranks, loaded by M: bytes read / bytes needed
stall     what training waits for            plan      finding what to read, without reading
load      newest checkpoint, cold            damage    one payload bit flipped: noticed by how many loads
busy      step time lost until durable       kill      a saving process is killed: newest whole step known again
                                             recovery  a rank of a job is killed: the same, by its coordinator

Every PyTorch that is found is measured beside: those of --torch-python, and the system's own. Without any, ours alone
is measured. Use --dir on the disk that matters.
"""
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

from cluster import Cluster, seconds

DESCRIPTION = "checkpoint store: save, load, reshard, memory, damage, beside PyTorch DCP"
HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LAYOUTS = ((4, 3), (3, 4), (2, 4), (8, 64), (1, 64))
MIB = 1 << 20
SYSTEM_PYTHON = "/usr/bin/python3"  # sees Debian's python3-torch
TABLES_MIB = 2  # names, boxes and sums of a segment, beside the buffers it is written through


def add_arguments(parser):
    parser.add_argument("--torch-python", action="append", default=[], metavar="PYTHON",
                        help="a Python that imports torch 2.9 or newer, or 1.13; may be repeated (default and always "
                        f"besides: {SYSTEM_PYTHON}, if it does)")
    parser.add_argument("--dir", help="where checkpoints go (default: a folder in the build folder)")
    parser.add_argument("--mib", type=int, help="of state (default: 1024, 64 with --quick)")
    parser.add_argument("--rounds", type=int, help="default: 5, 2 with --quick")
    parser.add_argument("--only", default=",".join(PARTS), help="comma separated; default: %(default)s")


class Peer:
    """peer_dcp.py as a server: PyTorch takes seconds to import."""

    def __init__(self, python):
        self.process = subprocess.Popen([python, str(HERE / "peer_dcp.py")], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.python = python

    def wait(self):
        self.version = self.read()["version"]
        self.name = "DCP " + ".".join(self.version.split(".")[:2])

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.python} {HERE / 'peer_dcp.py'} ended; run it by hand to see why")
        return json.loads(line)

    def __call__(self, what, **arguments):
        self.process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def start_peers(named):
    """One for each version: those that were named, then the system's."""
    started = []
    for python in dict.fromkeys([*named, SYSTEM_PYTHON]):
        try:
            started.append(Peer(python))
        except OSError as error:
            print(f"ops/bench checkpoint: {python}: {error.strerror}", file=sys.stderr)
    peers = {}
    for peer in started:  # PyTorch takes seconds to import: all at once
        try:
            peer.wait()
            peers.setdefault(peer.name, peer)
        except RuntimeError:
            if peer.python in named:
                print(f"ops/bench checkpoint: {peer.python} cannot import PyTorch's distributed checkpoint of 2.9 or "
                      "newer, or of 1.13", file=sys.stderr)
        if peer not in peers.values():
            peer.close()
    if not peers:
        print("ops/bench checkpoint: measured without a peer (--torch-python names one, or: apt-get install "
              "python3-torch)", file=sys.stderr)
    return list(peers.values())


class Bench:
    def __init__(self, options):
        self.program = pathlib.Path(options.build) / "bin/checkpoint_bench"
        if not self.program.exists():
            raise RuntimeError(f"{self.program} is missing; build the target checkpoint_bench")
        self.folder = pathlib.Path(options.dir or options.build) / "bench-checkpoint"
        self.tensors = max(1, (options.mib or (64 if options.quick else 1024)) // 4)
        self.rounds = options.rounds or (2 if options.quick else 5)
        self.quick = options.quick
        self.peers = start_peers(options.torch_python)
        self.rows, self.bars = [], []

    def fresh(self, name):
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def size(self, tensors=None, rows=1024, columns=1024):
        return {"tensors": tensors or self.tensors, "rows": rows, "columns": columns}

    def command(self, what, folder, **flags):
        command = [str(self.program), what, "--dir", str(folder)]
        for flag, value in flags.items():
            command += ["--" + flag.replace("_", "-"), str(value)]
        return command

    def ours(self, what, folder, **flags):
        done = subprocess.run(self.command(what, folder, **flags), capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            raise RuntimeError(f"checkpoint_bench {what} exited {done.returncode}: {done.stderr.strip()[-400:]}")
        return json.loads(done.stdout)

    def theirs(self, what, results=None, **arguments):
        """{peer's name: what it answers}, appended to its list in `results` if that is given. `directory` is emptied for
        each."""
        answers = {}
        for peer in self.peers:
            if "directory" in arguments:
                arguments["directory"] = str(self.fresh("theirs"))
            answers[peer.name] = peer(what, **arguments)
            if results is not None:
                results.setdefault(peer.name, []).append(answers[peer.name])
        return answers

    def row(self, what, unit, values, bar="", peers=None):
        """One line of the table: the median of each side, and the spread of ours. `peers`: {name: values}."""
        row = {"what": what, "unit": unit, "spread": f"{min(values):.3g}..{max(values):.3g}",
               "value": statistics.median(values), "bar": bar}
        for peer in self.peers:
            row[peer.name] = statistics.median(peers[peer.name]) if peers else ""
        self.rows.append(row)

    def bar(self, what, unit, value, bar, at_least=True):
        self.bars.append({"what": what, "unit": unit, "value": value, "bar": bar, "at_least": at_least})

    def ratio_bar(self, what, peers, ours, bar):
        """Theirs over ours, the median of the rounds, for each peer; not measured without one."""
        for name, theirs in peers.items():
            self.bar(f"{what}, {name} over ours", "x", statistics.median(t / o for t, o in zip(theirs, ours)), bar)
        if not peers:
            self.bar(f"{what}, DCP over ours", "x", None, bar)


def forget(folder):
    """The page cache forgets the folder's files, so that the next read is of the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def rest(seconds):
    """What the disk owes is done (writeback, discards); and time passes for burst limits that cloud disks have."""
    os.sync()
    time.sleep(seconds)


def make_cold(folder):
    """The next read of the folder's files is of the disk, and alike for both sides: each file is read once first, so
    that caches below this machine's own know both sides' files equally well and the memory a page cache takes has
    been used before (a hypervisor gives unused memory slowly), and then forgotten."""
    chunk = bytearray(4 * MIB)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(chunk):
                    pass
    forget(folder)


def of(results, key, scale=1.0):
    return pick(results, lambda result: result[key] * scale)


def pick(results, choose):
    """Of ours, a list, or of the peers', {name: list}."""
    if isinstance(results, dict):
        return {name: pick(theirs, choose) for name, theirs in results.items()}
    return [choose(result) for result in results]


def measure_save_and_load(bench, parts):
    saves, loads, peer_saves, peer_loads = [], [], {}, {}
    pause = 0.2 if bench.quick else 1

    def save_and_load_ours(folder, what):
        if what == "save":
            saves.append(bench.ours("save", folder, saves=1, **bench.size()))
        else:
            loads.append(bench.ours("load", folder, **bench.size()))

    def side_of(peer):
        def save_and_load(folder, what):
            results = peer_saves if what == "save" else peer_loads
            results.setdefault(peer.name, []).append(peer(what, directory=str(folder), **bench.size()))
        return save_and_load
    sides = [save_and_load_ours, *map(side_of, bench.peers)]
    for turn in range(bench.rounds):
        first = turn % len(sides)  # who goes first alternates
        order = [(side, bench.fresh(f"side{i}")) for i, side in enumerate(sides)]
        order = order[first:] + order[:first]
        for side, folder in order:
            rest(pause)
            side(folder, "save")
        for side, folder in order:
            if "load" in parts:
                make_cold(folder)
                rest(pause)
                side(folder, "load")
    payload = saves[0]["payload_bytes"]
    gib = 2**30 / payload
    ours, theirs = [s["seconds"][0] * gib for s in saves], of(peer_saves, "seconds", gib)
    if "save" in parts:
        bench.row("save, durable", "s/GiB", ours, "peer / 2.5", theirs)
        bench.ratio_bar("durable save", theirs, ours, 2.5)
        disk = [s["disk_bytes"] / payload for s in saves]
        bench.row("save, bytes on disk / payload", "x", disk, 1.01)
        bench.bar("bytes on disk / payload", "x", max(disk), 1.01, at_least=False)
        extra = [s["extra_bytes"] / MIB for s in saves]
        budget = saves[0]["budget_bytes"] / MIB + TABLES_MIB
        bench.row("save, memory beyond the state", "MiB", extra, f"{budget:.4g}", of(peer_saves, "extra_bytes", 1 / MIB))
        bench.bar("memory of a save", "MiB", max(extra), budget, at_least=False)
    if "load" in parts:
        ours, theirs = of(loads, "seconds", gib), of(peer_loads, "seconds", gib)
        bench.row("load, cold, verified (peer: not verified)", "s/GiB", ours, "peer / 1.3", theirs)
        bench.ratio_bar("cold load", theirs, ours, 1.3)
        bench.row("load, memory beyond the state", "MiB", of(loads, "extra_bytes", 1 / MIB), "",
                  of(peer_loads, "extra_bytes", 1 / MIB))
        verifying = [r["seconds"] / (r["seconds"] - r["checksum_seconds"]) for r in loads]
        bench.row("load, with checksums / without", "x", verifying, 1.10)
        bench.bar("load with checksums / without", "x", statistics.median(verifying), 1.10, at_least=False)


def measure_stall(bench, _):
    ours, theirs = [], {}
    for _ in range(bench.rounds):
        ours.append(bench.ours("stall", bench.fresh("ours"), saves=3, **bench.size()))
        bench.theirs("stall", theirs, directory="", saves=3, **bench.size())
    gib = 2**30 / ours[0]["payload_bytes"]

    def first(results):
        return pick(results, lambda r: r["stall_seconds"][0] * gib)

    def later(results, key, begin=1):
        return pick(results, lambda r: statistics.median(r[key][begin:]) * gib)
    bench.row("stall, first save", "s/GiB", first(ours), "peer / 5", first(theirs))
    bench.ratio_bar("first stall", first(theirs), first(ours), 5.0)
    stalls, copies = later(ours, "stall_seconds"), later(ours, "memcpy_seconds")
    bench.row("stall, later saves", "s/GiB", stalls, "1.2 memcpy", later(theirs, "stall_seconds"))
    bench.row("memcpy of the state", "s/GiB", copies)
    bench.bar("later stall / memcpy", "x", statistics.median(a / b for a, b in zip(stalls, copies)), 1.2, at_least=False)
    measure_optimizer_step(bench)
    bench.row("save in the background, until durable", "s/GiB", later(ours, "durable_seconds", 0), "",
              later(theirs, "durable_seconds", 0))
    bench.row("save in the background, memory beyond what was set aside", "MiB", of(ours, "extra_bytes", 1 / MIB), "",
              of(theirs, "extra_bytes", 1 / MIB))


def measure_optimizer_step(bench):
    """What a save without a copy costs every step: the optimizer writes to other memory than it reads."""
    command = [str(bench.program.parent / "optimizer_bench"), "--mib", str(min(1024, 4 * bench.tensors)),
               "--rounds", str(2 * bench.rounds + 1)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    result = json.loads(done.stdout)
    for key, what in (("in_place_seconds", "optimizer step in place"),
                      ("to_the_other_seconds", "optimizer step from one generation to another"),
                      ("copy_seconds", "copy of the same state")):
        bench.row(what, "s/GiB of state", [s * 2**30 / result["payload_bytes"] for s in result[key][1:]])


def measure_busy(bench, _):
    shape = {"saves": 3, "steps": 10 if bench.quick else 20, **bench.size()}
    ours, theirs = [], {}
    for _ in range(1 if bench.quick else bench.rounds):
        ours.append(bench.ours("busy", bench.fresh("ours"), step_ms=50, **shape))
        bench.theirs("busy", theirs, directory="", step_ms=50, **shape)

    def lost(results):
        return [seconds * 2**30 / ours[0]["payload_bytes"] for r in results for seconds in r["lost_seconds"]]
    peers = {name: lost(results) for name, results in theirs.items()}
    bench.row("step time lost to a save, two busy threads", "s/GiB", lost(ours), "peer", peers)
    for name, values in (peers or {"DCP": None}).items():
        bench.bar(f"step time lost to a save, ours over {name}", "x",
                  statistics.median(lost(ours)) / statistics.median(values) if values else None, 1.0, at_least=False)


def measure_reshard(bench, _):
    tensors = 4 if bench.quick else 16
    for rows, columns, barred in ((1024, 1024, True), (1000, 1037, False)):
        for ranks_from, ranks_to in LAYOUTS:
            shape = bench.size(tensors, rows, columns)
            ours = bench.ours("reshard", bench.fresh("ours"), **{"from": ranks_from}, to=ranks_to, **shape)
            theirs = bench.theirs("reshard", directory="", ranks_from=ranks_from, ranks_to=ranks_to,
                                  **shape) if barred else {}
            value = ours["rchar"] / ours["needed_bytes"]
            bench.row(f"reshard {ranks_from} to {ranks_to} of [{rows}, {columns}], bytes read / needed", "x", [value],
                      1.05 if barred else "", {name: [r["rchar"] / r["needed_bytes"]] for name, r in theirs.items()})
            if barred:
                bench.bar(f"reshard {ranks_from} to {ranks_to}, bytes read / needed", "x", value, 1.05, at_least=False)


def measure_plan(bench, _):
    few, many = 32768, 262144
    fewer = 1024 if bench.quick else 4096  # DCP's search of 1.13 is quadratic
    ours = {n: [bench.ours("plan", bench.fresh("ours"), pieces=n)["seconds"] for _ in range(bench.rounds)]
            for n in (few, many)}
    peers = bench.theirs("plan", pieces=fewer)
    bench.row(f"plan {few} pieces into {few - 1}", "s", ours[few])
    bench.row(f"plan {many} pieces into {many - 1}", "s", ours[many], "10 times the above")
    if peers:
        bench.row(f"plan {fewer} pieces into {fewer - 1}", "s",
                  [bench.ours("plan", bench.fresh("ours"), pieces=fewer)["seconds"]], "",
                  {name: [r["seconds"]] for name, r in peers.items()})
    bench.bar("plan time, 8 times the pieces", "x", statistics.median(ours[many]) / statistics.median(ours[few]), 10.0,
              at_least=False)


def measure_damage(bench, _):
    shape = {"places": 12 if bench.quick else 64, **bench.size(4, 256, 1024)}
    ours = bench.ours("damage", bench.fresh("ours"), **shape)
    theirs = bench.theirs("damage", directory="", **shape)
    bench.row(f"payload bits flipped, noticed of {ours['places']}", "", [ours["detected"]], ours["places"],
              {name: [r["detected"]] for name, r in theirs.items()})
    bench.bar("flipped payload bits noticed", "of 1", ours["detected"] / ours["places"], 1.0)


def measure_kill(bench, _):
    """SIGKILL in the middle of a save; then: how soon another process knows the newest whole step, and has loaded it."""
    known, loaded = [], []
    for _ in range(bench.rounds):
        folder = bench.fresh("ours")
        saving = subprocess.Popen(bench.command("save", folder, saves=1000, **bench.size()), stdout=subprocess.DEVNULL)
        while len(list(folder.glob("*.manifest"))) == 0 or len(list(folder.glob("*.segment"))) < 3:
            if saving.poll() is not None:
                raise RuntimeError("the process that saves ended by itself")
            time.sleep(0.01)
        begin = time.monotonic()
        saving.send_signal(signal.SIGKILL)
        saving.wait()
        result = bench.ours("load", folder, **bench.size())
        overhead = time.monotonic() - begin - result["seconds"] - result["checksum_seconds"]
        known.append(result["newest_seconds"])
        loaded.append(overhead + result["seconds"])
    bench.row("kill: newest whole step known", "s", known)
    bench.row("kill: process replaced, state loaded", "s", loaded)


def measure_recovery(bench, _):
    """The same in a job: one of its ranks is killed; the coordinator looks at the store and says from which step it
    starts again; then every rank of the next epoch has loaded that."""
    known, ready = [], []
    with Cluster(bench.program.parent.parent, 4) as cluster:
        cluster.submit(ROOT / "docs/examples/quickstart.yaml", "killed",
                       {"training": {"steps": 100000, "evaluation_interval": 0}, "checkpoint": {"interval": 10},
                        "recovery": {"from_memory": False}})
        for turn in range(bench.rounds):
            cluster.items_when("killed", "steps", lambda steps: steps and steps[-1]["step"] >= 25 * (turn + 1))
            before = len(cluster.items("killed", "events"))
            begin = time.time()
            os.kill(cluster.rank_pid(turn % 4), signal.SIGKILL)
            events = cluster.items_when("killed", "events",
                                        lambda events: any(e["code"] == "running" for e in events[before:]))
            good = max(int(re.search("step ([0-9]+)", e["message"])[1]) for e in events
                       if e["code"] == "checkpoint_committed" and seconds(e) < begin)
            start, running = (next(e for e in events[before:] if e["code"] == code) for code in ("starting", "running"))
            if int(re.search("step ([0-9]+)", start["message"])[1]) < good:
                raise RuntimeError(f"step {good} was committed; the coordinator is {start['message']}")
            known.append(seconds(start) - begin)
            ready.append(seconds(running) - begin)
    bench.row("rank of a job killed: newest good step known", "s", known)
    bench.row("rank of a job killed: every new rank has loaded it", "s", ready)


PARTS = {"save": measure_save_and_load, "load": measure_save_and_load, "stall": measure_stall, "busy": measure_busy,
         "reshard": measure_reshard, "plan": measure_plan, "damage": measure_damage, "kill": measure_kill,
         "recovery": measure_recovery}


def run(options):
    parts = options.only.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise RuntimeError(f"--only: no measurement {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    bench = Bench(options)
    try:
        for measure in dict.fromkeys(PARTS[part] for part in PARTS if part in parts):
            measure(bench, parts)
    finally:
        for peer in bench.peers:
            peer.close()
        shutil.rmtree(bench.folder, ignore_errors=True)
    return {"peers": [f"PyTorch {peer.version}" for peer in bench.peers], "state_mib": 4 * bench.tensors,
            "rounds": bench.rounds, "rows": bench.rows, "bars": bench.bars}
