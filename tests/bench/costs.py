"""What three things cost a run: recording its trace, recomputing activations, and checkpoints being read over beside it.

Recording is always on. Here it is off in every other step of one run, so that neighbouring steps differ in nothing
else: a pair of them gives one ratio. Recomputing (training.recompute) saves memory for time: runs without, with norms
and with norms and MLA's up-projections are alternated, and each round gives one ratio per setting. So are runs alone
and beside a process that reads a checkpoint over as the coordinator does, at its default rate. All ranks are processes
on UCX, as in production.
"""
import json
import pathlib
import resource
import statistics
import subprocess
import tempfile
import threading

import train

DESCRIPTION = "what recording, training.recompute and reading checkpoints over cost a step, and the memory saved"
SCRUB_RATE = 8 << 20  # of a coordinator, unless --scrub-rate says otherwise
SETTINGS = ([], ["norms"], ["norms", "mla_up"])


def add_arguments(parser):
    parser.add_argument("--spec", default=str(train.ROOT / "docs/examples/quickstart.yaml"))
    parser.add_argument("--pairs", type=int, default=120, help="of steps, with recording and without")
    parser.add_argument("--rounds", type=int, default=9, help="of runs, one per recompute setting")
    parser.add_argument("--steps", type=int, default=10, help="of such a run; the first two are dropped")
    parser.add_argument("--only-scrubbing", action="store_true", help="measure nothing else")


def run_steps(options, spec, steps, *flags):
    """(seconds by step after the warm-up, bytes of memory of all ranks) of one run."""
    command = [str(pathlib.Path(options.build) / "bin/penstock-standalone"), "--processes", "--json", "--spec",
               str(spec), "--steps", str(steps), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited {done.returncode}: {done.stderr.strip()[-400:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    seconds = [line["seconds"] for line in lines if "seconds" in line][train.WARMUP_STEPS:]
    memory = sum(line["memory_bytes"] for line in lines if "memory_bytes" in line)
    if len(seconds) != steps - train.WARMUP_STEPS or memory == 0:
        raise RuntimeError(f"{' '.join(command)} printed {len(seconds)} steps after the warm-up, of {steps}")
    return seconds, memory


def row(what, seconds, ratios, memory):
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {"what": what, "seconds a step": statistics.median(seconds), "ratio": statistics.median(ratios),
            "middle half": f"{quarters[0]:.4f}..{quarters[2]:.4f}", "ratios": len(ratios),
            "MiB of all ranks": memory / 2**20}


def recording(options, pairs):
    """Steps 3, 5 … are recorded, 4, 6 … not."""
    seconds, memory = run_steps(options, options.spec, train.WARMUP_STEPS + 2 * pairs, "--record-odd-steps")
    on, off = seconds[0::2], seconds[1::2]
    return row("recording on, over off", on, [a / b for a, b in zip(on, off)], memory)


def recomputing(options, rounds, steps):
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        resolved = subprocess.run([str(pathlib.Path(options.build) / "bin/penstock"), "submit", options.spec,
                                   "--dry-run", "-o", "json"], capture_output=True, text=True, timeout=60, check=True)
        for setting in SETTINGS:
            spec = json.loads(resolved.stdout)
            spec["training"]["recompute"] = setting
            paths.append(pathlib.Path(folder) / f"{'-'.join(setting) or 'none'}.json")
            paths[-1].write_text(json.dumps(spec), encoding="utf-8")
        rows = []
        measured = [[run_steps(options, path, steps) for path in paths] for _ in range(rounds)]
    for index, path in enumerate(paths):
        medians = [statistics.median(done[index][0]) for done in measured]
        ratios = [a / statistics.median(done[0][0]) for a, done in zip(medians, measured)]
        rows.append(row(f"recompute {path.stem}", medians, ratios, measured[0][index][1]))
    return rows


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Scrubbing:
    """Reads the checkpoints of a directory over and over, at the coordinator's rate, until it is left."""

    def __init__(self, options, directory):
        self.command = [str(pathlib.Path(options.build) / "bin/penstock"), "checkpoint", "scrub", str(directory),
                        "--rate", str(SCRUB_RATE), "-o", "json"]

    def __enter__(self):
        self.over = threading.Event()
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        while not self.over.is_set():
            process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and not self.over.wait(0.1):
                pass
            process.terminate()
            process.wait()

    def __exit__(self, *_):
        self.over.set()
        self.reader.join()


def scrubbing(options, rounds, steps):
    binary = str(pathlib.Path(options.build) / "bin/penstock-standalone")
    with tempfile.TemporaryDirectory() as folder:
        store = pathlib.Path(folder) / "checkpoints"
        spec = pathlib.Path(folder) / "spec.json"
        resolved = subprocess.run([str(pathlib.Path(options.build) / "bin/penstock"), "submit", options.spec,
                                   "--dry-run", "-o", "json"], capture_output=True, text=True, timeout=60, check=True)
        saving = json.loads(resolved.stdout)
        saving["checkpoint"] |= {"interval": 1, "keep_last": 4}  # four are read in turn
        spec.write_text(json.dumps(saving), encoding="utf-8")
        subprocess.run([binary, "--spec", str(spec), "--checkpoint-dir", str(store), "--steps", "4"],
                       capture_output=True, timeout=600, check=True)
        size = sum(path.stat().st_size for path in store.glob("*.segment"))
        before = cpu_seconds()
        subprocess.run([str(pathlib.Path(options.build) / "bin/penstock"), "checkpoint", "verify", str(store)],
                       capture_output=True, timeout=600, check=True)
        share = (cpu_seconds() - before) / size * SCRUB_RATE
        alone, beside = [], []
        for _ in range(rounds):
            alone.append(statistics.mean(run_steps(options, options.spec, steps)[0]))
            with Scrubbing(options, store):
                seconds, memory = run_steps(options, options.spec, steps)
                beside.append(statistics.mean(seconds))
    return row(f"scrubbing, {100 * share:.1f}% of a core", beside, [b / a for a, b in zip(alone, beside)], memory)


def run(options):
    pairs, rounds, steps = (6, 1, 5) if options.quick else (options.pairs, options.rounds, options.steps)
    if options.only_scrubbing:
        return {"rows": [scrubbing(options, rounds, steps)], "bars": []}
    rows = [recording(options, pairs)] + recomputing(options, rounds, steps) + [scrubbing(options, rounds, steps)]
    return {"rows": rows, "bars": [{"what": "step time with recording over without", "unit": "x", "bar": 1.01,
                                    "value": rows[0]["ratio"], "at_least": False}]}
