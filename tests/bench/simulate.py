"""The control plane's simulation (tests/simulation): the real core and real agents under faults drawn from seeds.

--write puts the table into docs/benchmarks/simulate.md.
"""
import json
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
DESCRIPTION = "the control plane under seeded faults: seeds a second, events, faults by kind, violations"
PAGE = ROOT / "docs/benchmarks/simulate.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"
BAR_SEEDS = 100_000


def add_arguments(parser):
    parser.add_argument("--seeds", type=int, default=BAR_SEEDS, help="over all scenarios; with --quick 3000")
    parser.add_argument("--first", type=int, default=1, help="the first seed of each scenario")
    parser.add_argument("--threads", type=int, default=0, help="0: one a core")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")


def rows_of(result):
    rows = [{"what": "seeds", "count": result["seeds"]},
            {"what": "seconds", "count": round(result["seconds"], 1)},
            {"what": "seeds a second", "count": round(result["seeds"] / result["seconds"])},
            {"what": "events of the coordinator's core", "count": result["core_events"]},
            {"what": "events of worker agents", "count": result["worker_events"]},
            {"what": "attempts ended by failures", "count": result["restarts"]},
            {"what": "ranks restored from memory", "count": result["memory_starts"]},
            {"what": "ranks restored from a copy", "count": result["copy_starts"]},
            {"what": "restarts to move experts", "count": result["rebalances"]},
            {"what": "suspended jobs resumed", "count": result["suspensions"]}]
    rows += [{"what": "fault: " + name, "count": count} for name, count in result["faults"].items()]
    return rows + [{"what": "faults of all kinds", "count": sum(result["faults"].values())},
                   {"what": "violations", "count": len(result["violations"])}]


def write_page(rows, result):
    text = PAGE.read_text(encoding="utf-8")
    table = "| | |\n|---|---:|\n" + "".join(f"| {row['what']} | {row['count']:,} |\n" for row in rows)
    table += "\n| scenario | seeds | |\n|---|---:|---|\n"
    table += "".join(f"| {s['name']} | {s['seeds']:,} | {s['what']} |\n" for s in result["scenarios"])
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(head + BEGIN + "\n" + table + "\n" + END + tail, encoding="utf-8")


def run(options):
    program = pathlib.Path(options.build) / "bin/simulate"
    seeds = min(options.seeds, 3000) if options.quick else options.seeds
    command = [str(program), "--json", "--seeds", str(seeds), "--first", str(options.first)]
    if options.threads > 0:
        command += ["--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        raise RuntimeError(f"{program} says: {done.stderr.strip()}")
    result = json.loads(done.stdout)
    for violation in result["violations"]:
        print(f"scenario {violation['scenario']}: {violation['what']}\n  again: {violation['again']}")
    rows = rows_of(result)
    if options.write:
        write_page(rows, result)
    return {"rows": rows,
            "bars": [{"what": "violations", "value": len(result["violations"]), "unit": "seeds", "bar": 0, "at_least": False},
                     {"what": "seeds", "value": result["seeds"], "unit": "", "bar": BAR_SEEDS}]}
