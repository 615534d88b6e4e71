#!/usr/bin/env python3
"""Checks the source tree against the house rules, as a CTest. Prints `file:line: rule` and exits 1.

  ops/tidy.py              check the tree this script is in
  ops/tidy.py --self-test  break every rule once in a scratch tree and see each one noticed

Rules: line width; file and function length; include direction; third-party headers and banned calls only in
their one home; every source and test file in a CMake target; a .cc includes its own header first (so every
header is self-contained); TODO(kind); one title per markdown page; paths named in docs exist; metric names.
"""
import os
import re
import subprocess
import sys
import tempfile

WIDTH_MAX = 100
FILE_LINES_MAX = 800  # aim: 500
FUNCTION_LINES_MAX = 70
SOURCE_ENDINGS = (".h", ".cc", ".cu")

# What a folder may include of ours. Longest matching folder wins; itself is always allowed.
INCLUDE_DIRECTION = {
    "comm/base": [],
    "comm/run": ["comm/base"],
    "comm/control": ["comm/base", "comm/run"],
    "comm/data": ["comm/base", "comm/run"],
    "kernels": ["comm/base"],
    "checkpoint": ["comm"],
    "coordinator": ["comm", "checkpoint"],
    "worker": ["comm", "kernels", "checkpoint"],
    "ops": ["comm", "kernels", "checkpoint", "coordinator", "worker"],
    "tests": ["comm", "kernels", "checkpoint", "coordinator", "worker", "ops"],
}
PURE = ("coordinator/core/", "coordinator/plan/", "comm/run/")

# Third-party headers, and the only files that may include them.
HOMES = [
    (r"<zmq", r"comm/control/channel(_\w+)?\.cc$"),
    (r"<(capnp|kj)/|message\.capnp\.h", r"comm/control/codec(_\w+)?\.(cc|h)$|tests/control/"),
    (r"<rocksdb/", r"coordinator/store/|checkpoint/index\.cc$|tests/checkpoint/|tests/coordinator/"),
    (r"<liburing", r"checkpoint/disk_ring\.cc$"),
    (r"<boost/", r"comm/control/(event_loop|http_\w+|channel)\.cc$"),
    (r"<prometheus/", r"comm/control/metrics\.cc$"),
    (r"<yaml-cpp/", r"comm/run/\w+\.cc$"),
    (r"<spdlog/", r"comm/base/log\.cc$"),
    (r"<uc[pst]/", r"comm/data/ucx_\w+\.(cc|h)$"),
    (r"<CLI/", r"\.cc$"),
    (r"<nlohmann/json\.hpp>", r"\.cc$|_json\.h$"),
    (r"<sentencepiece", r"worker/data/\w+\.cc$"),
    (r"<(cblas|dnnl|libxsmm|hwy)", r"kernels/|ops/bench/"),
]

# (call, where it may stand, what to use instead)
BANNED = [
    (r"std::chrono::(system|steady|high_resolution)_clock", r"comm/base/clock\.cc$", "comm/base/clock.h"),
    (r"\bstd::(thread|jthread|async)\b",
     r"comm/data/(ucx_|loopback_)|comm/control/|worker/(rank|engine|agent/state_\w+)/?|coordinator/(main|driver|http)|tests/|ops/",
     "the event loop, or the transport's progress thread"),
    (r"\b(rand|srand|random|drand48)\(\)", r"$^", "comm/base/random.h"),
    (r"std::(mt19937|random_device)", r"tests/", "comm/base/random.h"),
    (r"\b(sleep|usleep|nanosleep)\(|sleep_for\(|sleep_until\(", r"tests/support/|ops/cli/", "a timer or a condition"),
    # A private constructor is out of make_unique's reach: unique_ptr<T>(new T(…)) on one line may stand.
    (r"^(?!.*unique_ptr<).*\bnew [A-Za-z_:<]+[\[({]", r"tests/", "std::make_unique"),
    (r"\bcudaMalloc\b|<<<", r"\.cu$|kernels/cuda/device\.cc$|tests/gpu/", "the device arena and a launch function in a .cu file"),
    (r"\b(system|popen)\(", r"$^", "comm/control/process.h"),
    (r"\bthrow\b", r"tests/", "Status"),
]
METRIC = re.compile(r'"(penstock_(?!node")[a-z0-9_]+)"')  # penstock_node is a label of discovered targets
METRIC_FORM = re.compile(
    r"penstock_(build|coordinator|run|worker|pipeline|alltoall|moe|checkpoint|cost)_[a-z0-9_]*[a-z0-9]$")


def listed_files(root):
    """Tracked and untracked-but-not-ignored files, relative to root."""
    out = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, check=True,
                         capture_output=True, text=True).stdout
    return sorted(f for f in out.split("\0") if f and os.path.isfile(os.path.join(root, f)))


def strip_comments_and_strings(text):
    """The code alone, line structure kept, so that rules about calls do not read prose."""
    def blank(match):
        return re.sub(r"[^\n]", " ", match.group(0))
    pattern = r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\''
    return re.sub(pattern, blank, text, flags=re.S)


def check_lengths(path, text):
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > WIDTH_MAX and "http://" not in line and "https://" not in line:
            yield number, f"line of {len(line)} columns; at most {WIDTH_MAX}"
        if line != line.rstrip():
            yield number, "trailing white space"
    count = text.count("\n")
    if count > FILE_LINES_MAX:
        yield 1, f"file of {count} lines; at most {FILE_LINES_MAX}"


def check_functions(path, code):
    """Function bodies by the layout clang-format gives: an opening line ending in ') {', closed by '}' at the
    same indentation."""
    lines = code.split("\n")
    opening = re.compile(r"^(\s*)\S.*\)( const| noexcept| override| mutable|->\s*\S+)* \{\s*$")
    skip = re.compile(r"^\s*(namespace|class|struct|enum|union|extern)\b")
    for number, line in enumerate(lines):
        match = opening.match(line)
        if not match or skip.match(line) or len(match.group(1)) > 2 or line.strip().startswith("TEST"):
            continue
        indent = match.group(1)
        for end in range(number + 1, len(lines)):
            if lines[end].startswith(indent + "}"):
                length = end - number - 1
                if length > FUNCTION_LINES_MAX and not path.startswith("tests/"):
                    yield number + 1, f"function of {length} lines; at most {FUNCTION_LINES_MAX}"
                break


def check_includes(path, text):
    folder = max((f for f in INCLUDE_DIRECTION if path.startswith(f + "/")), key=len, default=None)
    first = None
    for number, line in enumerate(text.split("\n"), 1):
        match = re.match(r'#include "([^"]+)"', line)
        if match:
            target = match.group(1)
            first = first or target
            top = target.split("/")[0]
            if folder and top in ("comm", "kernels", "checkpoint", "coordinator", "worker", "ops", "tests"):
                allowed = [folder] + INCLUDE_DIRECTION[folder]
                if not any(target.startswith(a + "/") for a in allowed):
                    yield number, f"{folder}/ may not include {target}; allowed: {', '.join(allowed)}"
        for pattern, home in HOMES:
            if line.startswith("#include ") and re.search(pattern, line) and not re.search(home + "|^tests/", path):
                yield number, f"{line.split()[1]} belongs behind its wrapper ({home})"
    header = re.sub(r"\.(cc|cu)$", ".h", path)
    if path.endswith((".cc", ".cu")) and os.path.exists(os.path.join(ROOT, header)) and first != header:
        yield 1, f'the first of our includes must be "{header}", which proves the header self-contained'
    if path.endswith(".h") and "#pragma once" not in text:
        yield 1, "header without #pragma once"


def check_calls(path, code):
    for number, line in enumerate(code.split("\n"), 1):
        for pattern, home, instead in BANNED:
            if re.search(pattern, line) and not re.search(home, path):
                yield number, f"{re.search(pattern, line).group(0).strip()} is banned here; use {instead}"
        if path.startswith(PURE) and re.search(r"\b(wall_now|monotonic_ns|getenv|open_file|read_file)\(", line):
            yield number, "pure folder: time, environment and files come as arguments"


def check_comments(path, text):
    for number, line in enumerate(text.split("\n"), 1):
        if re.search(r"(//|#).*\b(TODO|FIXME|XXX|HACK)\b", line) and not re.search(r"TODO\([a-z]+\):", line):
            yield number, "TODO needs a kind: TODO(kind): text"
        if re.search(r"TODO\(now\)", line):
            yield number, "TODO(now) is never committed"


def check_metrics(path, text, documented):
    if not path.startswith(("comm/", "coordinator/", "worker/", "checkpoint/")):
        return
    for number, line in enumerate(text.split("\n"), 1):
        for name in METRIC.findall(line):
            if not METRIC_FORM.match(name):
                yield number, f"metric {name} does not start with a known folder or run prefix"
            elif documented is not None and name not in documented:
                yield number, f"metric {name} is not in docs/metrics.md"


def check_markdown(path, text, files):
    fence = re.compile(r"^```")
    inside, titles = False, 0
    folders = {os.path.dirname(f) for f in files}
    folders |= {os.path.dirname(f) for f in folders}
    for number, line in enumerate(text.split("\n"), 1):
        if fence.match(line):
            inside = not inside
        elif not inside and line.startswith("# "):
            titles += 1
        if inside:
            continue
        for name in re.findall(r"`((?:comm|kernels|checkpoint|coordinator|worker|ops|tests|docs)/[\w./-]+)`", line):
            clean = name.rstrip("/.")
            if clean not in files and clean not in folders and not any(f.startswith(clean + ".") for f in files):
                yield number, f"names {name}, which does not exist"
    if titles != 1:
        yield 1, f"{titles} top-level titles; a page has one"


def check_targets(files, read):
    cmake = "\n".join(read(f) for f in files if f.endswith("CMakeLists.txt") or f.endswith(".cmake"))
    # foreach(NAME a b) … ${NAME}_test.cc … endforeach() lists a_test.cc and b_test.cc.
    for variable, values, body in re.findall(r"foreach\((\w+)\s+([^)]*)\)(.*?)endforeach", cmake, flags=re.S):
        cmake += "".join("\n" + body.replace("${" + variable + "}", value) for value in values.split())
    for path in files:
        if path.endswith((".cc", ".cu", ".capnp")):
            name = os.path.basename(path)
            if not re.search(rf"(^|[\s/]){re.escape(name)}([\s)]|$)", cmake):
                yield path, 1, "in no CMake target"


def check_tree(root):
    global ROOT
    ROOT = root
    files = listed_files(root)
    cache = {}

    def read(path):
        if path not in cache:
            with open(os.path.join(root, path), encoding="utf-8", errors="replace") as handle:
                cache[path] = handle.read()
        return cache[path]

    documented = read("docs/metrics.md") if "docs/metrics.md" in files else None
    problems = list(check_targets(files, read))
    for path in files:
        found = []
        if path.endswith(SOURCE_ENDINGS):
            text = read(path)
            code = strip_comments_and_strings(text)
            for rule in (check_lengths(path, text), check_functions(path, code), check_includes(path, text),
                         check_calls(path, code), check_comments(path, text), check_metrics(path, text, documented)):
                found += rule
        elif path.endswith(".md"):
            found += check_markdown(path, read(path), set(files))
        elif path.endswith((".py", ".cmake", "CMakeLists.txt")) and not path.endswith("tidy.py"):
            found += check_comments(path, read(path))
        problems += [(path, number, message) for number, message in found]
    return problems


# One file per rule, each breaking it once: (path, content, part of the message expected).
VIOLATIONS = [
    ("comm/base/wide.h", "#pragma once\n// " + "x" * 130 + "\n", "columns"),
    ("comm/base/long.h", "#pragma once\n" + "\n" * 900, "file of"),
    ("comm/base/body.cc", "void f(int a) {\n" + "  a++;\n" * 80 + "}\n", "function of"),
    ("comm/base/up.h", '#pragma once\n#include "worker/model/stage.h"\n', "may not include"),
    ("coordinator/core/twin.h", '#pragma once\n#include "worker/agent/agent.h"\n', "may not include"),
    ("comm/run/zmq.cc", "#include <zmq.hpp>\n", "belongs behind its wrapper"),
    ("kernels/now.cc", "auto t = std::chrono::steady_clock::now();\n", "is banned here"),
    ("kernels/naked.cc", "auto p = new Thing();\n", "is banned here"),
    ("tests/base/nap_test.cc", "void f() { sleep(5); }\n", "is banned here"),
    ("coordinator/core/impure.cc", "auto t = wall_now();\n", "pure folder"),
    ("kernels/todo.cc", "// TODO fix\n", "TODO needs a kind"),
    ("kernels/guard.h", "int x;\n", "pragma once"),
    ("kernels/order.h", "#pragma once\n", None),
    ("kernels/order.cc", '#include "kernels/now.h"\n#include "kernels/order.h"\n', "must be"),
    ("worker/metric.cc", 'auto n = "penstock_wrongprefix_total";\n', "does not start with"),
    ("kernels/orphan.cc", "int orphan;\n", "in no CMake target"),
    ("docs/two.md", "# one\n# two\n", "titles"),
    ("docs/lost.md", "# lost\nsee `kernels/absent.h`\n", "does not exist"),
]


def self_test():
    with tempfile.TemporaryDirectory() as root:
        subprocess.run(["git", "init", "-q"], cwd=root, check=True)
        for path, content, _ in VIOLATIONS:
            os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
            with open(os.path.join(root, path), "w", encoding="utf-8") as handle:
                handle.write(content)
        problems = check_tree(root)
        missed = [(path, wanted) for path, _, wanted in VIOLATIONS if wanted and not any(
            p == path and wanted in message for p, _, message in problems)]
    for path, wanted in missed:
        print(f"not noticed: {wanted!r} in {path}")
    print(f"tidy self-test: {len(VIOLATIONS)} violations, {len(missed)} missed")
    return 1 if missed else 0


def main():
    if sys.argv[1:] == ["--self-test"]:
        return self_test()
    if sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    problems = check_tree(root)
    for path, number, message in problems:
        print(f"{path}:{number}: {message}")
    print(f"tidy: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
