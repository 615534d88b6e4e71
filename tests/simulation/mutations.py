#!/usr/bin/env python3
"""Takes away one safety rule of the control plane at a time and counts the seeds until the simulation notices.

  tests/simulation/mutations.py --build DIR [--seeds N]

Copies the tree to DIR/source with every mutation of mutation_list.py in it, each behind a switch, and builds `simulate`
and the unit tests of core and agent there once (preset release). With no switch on no seed may be violated and no test
fail; then each mutation is switched on alone and seeds of all scenarios, mixed, run until one is violated. Where none
is, the unit tests run. Writes docs/simulation-mutations.md. The exit code is 1 when a mutation lives through both and
no reason is given.
"""
import argparse
import os
import pathlib
import re
import subprocess
import sys
import typing

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))
import mutants  # noqa: E402
from mutation_list import MUTATIONS, SECTIONS  # noqa: E402

DOCUMENT = ROOT / "docs/simulation-mutations.md"
HEAD = """# Every safety rule of the control plane is needed

One rule of the coordinator's core or of the worker's agent is taken away at a time, in a copy of the sources, and seeds
of all scenarios of the simulation (`tests/simulation/scenarios.cc`), mixed, run until one is violated. Without {noticed} of
the {all} rules one is, half of the time within {median} seeds. The others another rule makes good, or they save only time,
or what they prevent takes a coincidence that {seeds} seeds do not have: without {tested} of them a unit test fails, which
the table names, and of {harmless} it says why nothing can show them. With all rules in place the same seeds violate nothing
and no test fails. `tests/simulation/mutations.py --build DIR` writes this page; the list is
`tests/simulation/mutation_list.py`.
"""
TESTS = ["coordinator_core_test", "coordinator_records_test", "worker_agent_test", "worker_agent_memory_test",
         "worker_agent_report_queue_test"]
MINUTES_MAX = 5


def run(source, numbers, seeds, scenarios=()):
    """How many seeds it took, which one it was, and what was violated; None: nothing was."""
    command = [source / "build/release/bin/simulate", "--seeds", str(seeds), "--stop"]
    environment = dict(os.environ, MUTANT=" ".join(map(str, numbers)))
    try:
        done = subprocess.run(command + list(scenarios), capture_output=True, text=True, errors="replace", env=environment,
                              timeout=60 * MINUTES_MAX)
    except subprocess.TimeoutExpired:
        return 1, "", "a seed does not end"
    if done.returncode == 0:
        return None
    done.stderr = done.stderr.replace(f"{source}/", "")
    aborted = re.search(r"aborted in seed (\d+) of scenario (\S+), after (\d+) seeds", done.stderr)
    if aborted:
        check = re.search(r"check failed: ([^\n]*)|([^\n]*)\n", done.stderr)
        return int(aborted[3]), f"{aborted[2]} {aborted[1]}", "a check: " + (check[1] or check[2]).strip()
    found = re.search(r"scenario (\S+), seed (\d+), after (\d+) seeds: (?:at [\d.]+ s: )?([^\n]*)", done.stderr)
    if not found:
        return 1, "", f"ends with code {done.returncode}"
    return int(found[3]), f"{found[1]} {found[2]}", found[4]


def failing_test(source, numbers):
    """The name of a unit test that fails, or None."""
    environment = dict(os.environ, MUTANT=" ".join(map(str, numbers)))
    for program in TESTS:
        try:
            done = subprocess.run([source / "build/release/bin" / program, "--gtest_brief=1"], capture_output=True, text=True,
                                  errors="replace", env=environment, timeout=60 * MINUTES_MAX)
        except subprocess.TimeoutExpired:
            return f"{program}, which does not end"
        if done.returncode != 0:
            failed = re.search(r"^\[  FAILED  \] ([\w./]+)", done.stdout, re.M)
            return failed[1] if failed else f"{program}, which aborts"
    return None


class Found(typing.NamedTuple):
    seed: tuple | None  # what run() returns
    test: str | None  # tried where no seed is violated

    def noticed(self):
        return self.seed or self.test


def try_one(source, mutation, seeds):
    numbers = mutants.numbers_of(MUTATIONS, mutation)
    seed = run(source, numbers, seeds)
    found = Found(seed, None if seed else failing_test(source, numbers))
    print(f"{mutation.what}: " + (f"{seed[0]} seeds, {seed[1]}: {seed[2]}" if seed else found.test or "LIVES"), flush=True)
    return found


def words(found, mutation):
    if found.seed is None:
        tested = [f"`{found.test}`"] if found.test else []
        return "none", "", ": ".join(filter(None, [mutation.harmless, *tested])) or "**nothing**"
    found = found.seed
    what = re.sub(r"\|", "/", found[2])
    return str(found[0]), found[1], what if len(what) <= 160 else what[:157] + "…"


def page(results, seeds):
    counts = sorted(found.seed[0] for found in results.values() if found.seed)
    tested = sum(found.test is not None for found in results.values())
    text = HEAD.format(noticed=len(counts), all=len(results), median=counts[len(counts) // 2] if counts else 0, seeds=seeds,
                       tested=tested, harmless=len(results) - len(counts) - tested)
    for title, section in SECTIONS.items():
        text += f"\n## {title}\n\n| taken away | in | seeds | the last | what was violated; or a test that fails, or why none can |\n|---|---|---|---|---|\n"
        for mutation in section:
            count, seed, what = words(results[mutation], mutation)
            text += f"| {mutation.what} | `{mutation.file}` | {count} | {seed} | {what} |\n"
    return text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=3000, help="for each mutation")
    parser.add_argument("--only", help="mutations whose name contains this; the page is not written")
    options = parser.parse_args()
    source = options.build.resolve() / "source"
    mutants.make_source(ROOT, source, MUTATIONS, "")
    mutants.build(source, ["simulate", *TESTS])
    if options.only is None and (run(source, [], options.seeds) or failing_test(source, [])):
        sys.exit("seeds are violated, or tests fail, with nothing taken away")
    chosen = [mutation for mutation in MUTATIONS if options.only is None or options.only in mutation.what]
    results = {mutation: try_one(source, mutation, options.seeds) for mutation in chosen}
    if options.only is None:
        DOCUMENT.write_text(page(results, options.seeds), encoding="utf-8")
    return int(any(not found.noticed() and not mutation.harmless for mutation, found in results.items()))


if __name__ == "__main__":
    sys.exit(main())
