#!/usr/bin/env python3
"""Takes away one sync, check or ordering of the checkpoint store at a time and sees which test notices.

  tests/checkpoint/mutations.py --build DIR

Copies the tree to DIR/source with every mutation of mutation_list.py in it, each behind a switch, and builds that once
(preset release). With no switch on, all tests concerned must pass; then each mutation is switched on alone (the
environment variable MUTANT names it) and its tests run until one fails. Writes docs/checkpoint-mutations.md. The exit
code is 1 when no test notices a mutation and no reason is given.
"""
import argparse
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))
import mutants  # noqa: E402
from mutation_list import MUTATIONS, SECTIONS  # noqa: E402

DOCUMENT = ROOT / "docs/checkpoint-mutations.md"
HEAD = """# Every sync, check and ordering is needed

One sync, ordering or check of the checkpoint store is taken away at a time, in a copy of the sources, and tests are run
on what is left until one fails; {noticed} of {all} were noticed, and of the others the table says why nothing can be.
Not among them are `PENSTOCK_CHECK`s, which hold what callers promise. `tests/checkpoint/mutations.py --build DIR`
writes this page; the list is `tests/checkpoint/mutation_list.py`.
"""

def binary(test):
    name = test.split()[0]
    return (name if name.startswith("base_") else "checkpoint_" + name) + "_test"


def run(source, numbers, test):
    """The name of the first test that fails with these mutations on, or None; and how many ran."""
    command = [source / "build/release/bin" / binary(test), "--gtest_fail_fast", f"--gtest_filter={test.split()[1]}"]
    with tempfile.TemporaryDirectory() as folder:  # for what an aborted test leaves behind
        environment = dict(os.environ, MUTANT=" ".join(map(str, numbers)), TMPDIR=folder)
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=3600, cwd=folder,
                                  env=environment)
        except subprocess.TimeoutExpired:
            return f"`{binary(test)}`, which does not end", 0
    begun = re.findall(r"\[ RUN      \] (\S+)", done.stdout)
    if done.returncode == 0:
        return None, len(begun)
    failed = re.findall(r"\[  FAILED  \] (\w+\.\w+)", done.stdout)
    return f"`{failed[0]}`" if failed else f"`{begun[-1]}`, which aborts", len(begun)


def try_one(source, mutation):
    for test in mutation.tests:
        noticed, _ = run(source, mutants.numbers_of(MUTATIONS, mutation), test)
        if noticed:
            break
    print(f"{mutation.what}: {noticed or 'LIVES'}", flush=True)
    return noticed


def page(results):
    text = HEAD.format(noticed=sum(map(bool, results.values())), all=len(results))
    for title, section in SECTIONS.items():
        text += f"\n## {title}\n\n| taken away | in | noticed by |\n|---|---|---|\n"
        for mutation in section:
            noticed = results[mutation] or (f"nothing: {mutation.harmless}" if mutation.harmless else "**nothing**")
            name = os.path.normpath("checkpoint/" + mutation.file)
            text += f"| {mutation.what} | `{name}` | {noticed} |\n"
    return text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", required=True, type=pathlib.Path)
    source = parser.parse_args().build.resolve() / "source"
    mutants.make_source(ROOT, source, MUTATIONS, "checkpoint")
    mutants.build(source, sorted({binary(test) for mutation in MUTATIONS for test in mutation.tests}))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        tests = sorted({test for mutation in MUTATIONS for test in mutation.tests})
        for test, (failed, ran) in zip(tests, pool.map(lambda test: run(source, [], test), tests)):
            if failed or ran == 0:
                sys.exit(f"{test}: " + (f"{failed} fails with nothing taken away" if failed else "no such test"))
        results = dict(zip(MUTATIONS, pool.map(lambda mutation: try_one(source, mutation), MUTATIONS)))
    DOCUMENT.write_text(page(results))
    return int(any(not noticed and not mutation.harmless for mutation, noticed in results.items()))


if __name__ == "__main__":
    sys.exit(main())
