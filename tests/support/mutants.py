"""A copy of the tree in which rules can be taken away one at a time, each by a switch, so that it is built only once.

A mutation names a file and a text in it (an expression, or statements; between ‹ and ›, where it takes more to say
which) and what stands in its place while the environment variable MUTANT holds its number; several numbers, with blanks
between them, are several switches. Used by tests/checkpoint/mutations.py and tests/simulation/mutations.py.
"""
import os
import re
import subprocess
import sys

SWITCH = """#ifndef PENSTOCK_MUTANTS
#define PENSTOCK_MUTANTS
#include <bitset>
#include <cstdlib>
#include <string>
namespace penstock {
inline bool mutant(int number) {
  static const std::bitset<512> chosen = [] {
    std::bitset<512> numbers;
    const char* text = std::getenv("MUTANT");
    std::string left = text == nullptr ? "" : text;
    for (; !left.empty(); left.erase(0, left.find(' ')).erase(0, 1)) numbers.set(std::stoul(left));
    return numbers;
  }();
  return chosen[number];
}
}  // namespace penstock
#endif
"""


def numbers_of(mutations, mutation):
    if not mutation.both:
        return [mutations.index(mutation)]
    return [number for number, other in enumerate(mutations) if other.what in mutation.both]


def span_of(text, mutation):
    before, core, after = re.fullmatch(r"(?s)(?:(.*)‹)?(.*?)(?:›(.*))?", mutation.old).groups()
    whole = (before or "") + core + (after or "")
    if text.count(whole) != 1:
        sys.exit(f"{mutation.what}: {mutation.file} holds {text.count(whole)} times:\n{whole}")
    begin = text.index(whole) + len(before or "")
    return begin, begin + len(core)


def with_switches(text, mutations, number_of):
    spans = {}
    for mutation in mutations:
        spans.setdefault(span_of(text, mutation), []).append(mutation)
    for (begin, end), here in sorted(spans.items(), reverse=True):
        core = text[begin:end]
        switched = core
        for mutation in here:
            number = number_of(mutation)
            if core.endswith((";", "\n")):
                switched = f"if (mutant({number})) {{\n{mutation.new}}} else {{\n{switched}}}\n"
            else:
                switched = f"(mutant({number}) ? ({mutation.new}) : ({switched}))"
        text = text[:begin] + switched + text[end:]
    return SWITCH + text


def make_source(root, to, mutations, folder):
    """The files of the working tree with every mutation in, whose files are named from `folder`. What did not change is
    left untouched, so that it is not built again."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, check=True,
                            capture_output=True, text=True).stdout.splitlines()
    contents = {name: (root / name).read_bytes() for name in listed if (root / name).is_file()}
    by_file = {}
    for mutation in mutations:
        if not mutation.both:
            by_file.setdefault(os.path.normpath(os.path.join(folder, mutation.file)), []).append(mutation)
    for name, here in by_file.items():
        contents[name] = with_switches(contents[name].decode(), here, mutations.index).encode()
    for name, content in contents.items():
        target = to / name
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def build(source, targets):
    if not (source / "build/release/build.ninja").exists():
        subprocess.run(["cmake", "--preset", "release"], cwd=source, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", "build/release", "--target"] + targets, cwd=source, check=True)
