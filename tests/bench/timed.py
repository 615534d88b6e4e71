"""What the benchmarks of schedules and overlap share: runs penstock-timed and reads what its ranks measured."""
import json
import pathlib
import subprocess
import tempfile

COMPUTE = ("attn(F)", "mlp(F)", "mlp(B)", "attn(B)", "mlp(W)", "attn(W)")


def run_timed(build, arguments, costs_ms, timeout_s=300, environment=None):
    """One run: by rank a list of what each step measured."""
    program = pathlib.Path(build) / "bin/penstock-timed"
    if not program.exists():
        raise RuntimeError(f"{program} is missing; build the target penstock-timed")
    with tempfile.TemporaryDirectory(prefix="penstock-timed-") as output:
        command = [str(program), "--output", output] + [str(a) for a in arguments]
        for name, milliseconds in costs_ms.items():
            command += ["--cost", name, str(milliseconds)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} exited {done.returncode}: {done.stderr.strip()[-600:]}")
        files = sorted(pathlib.Path(output).glob("rank-*.jsonl"), key=lambda p: int(p.stem.split("-")[1]))
        return [[json.loads(line) for line in p.read_text(encoding="utf-8").splitlines()] for p in files]
