"""How much of dispatch and combine hides behind compute, on a network of given rate and delay.

Every rank is a process in a network namespace of its own whose only link has the given rate and delay
(tests/support/shaped_network.h). Compute is timed waits in the proportions of DeepSeek-V3's published trace, tokens
are real bytes through UCX over TCP. Three runs: compute only (every exchange empty), communication only (no waits),
both; each for DualPipe, whose overlapped pairs interleave a forward and a backward, and for 1F1B, which does not.

All is of the steady state: each run is made with two numbers of micro-batches, and the difference of the two, over
the micro-batches that one has more, is one forward and one backward without filling and draining the pipeline.

exposed     what a rank's compute waited for dispatch and combine
hidden      1 - exposed in the run of both / exposed in the run of communication only
efficiency  (Tc + Tm - Tboth) / min(Tc, Tm)
Needs root, network namespaces and /dev/net/tun; says so and stops with exit code 1 where they are missing.
"""
import statistics

import timed

DESCRIPTION = "share of dispatch and combine hidden behind compute, on a shaped network"
PIPELINE = 2
# Milliseconds per MoE layer in DeepSeek-V3's published profile.
COSTS_MS = {"attn(F)": 4.6, "mlp(F)": 4.6, "mlp(B)": 5.4, "attn(B)": 9.5, "mlp(W)": 5.1, "attn(W)": 2.4}
RUNS = ("compute", "communication", "both")
FP32_BYTES = 4


def add_arguments(parser):
    parser.add_argument("--transfer-share", type=float, default=0.65,
                        help="time the links need for a layer's four exchanges over the compute of its pair; what communication "
                        "alone takes is about a tenth of the compute more (default: %(default)s)")
    parser.add_argument("--scale", type=float,
                        help="times the profile's durations (default: 4, 2.5 with --quick): many ranks share few cores, "
                        "each hand-over costs some 0.3 ms")
    parser.add_argument("--delay-us", type=float, default=200.0, help="one way")
    parser.add_argument("--expert", type=int, default=4, help=f"ranks of an expert group; the pipeline has {PIPELINE}")
    parser.add_argument("--tokens", type=int, default=32, help="per micro-batch and rank")
    parser.add_argument("--hidden", type=int, default=256)


def costs_ms(options):
    scale = options.scale or (2.5 if options.quick else 4.0)
    return {name: scale * milliseconds for name, milliseconds in COSTS_MS.items()}


def payload_bytes(options):
    """What one rank sends in the four exchanges of one layer: every token to every other rank of the group."""
    rows = options.tokens * (options.expert - 1)
    routing_words, gate_gradient_words = 1 + 2 * options.expert, 1
    return rows * FP32_BYTES * (4 * options.hidden + routing_words + gate_gradient_words)


def step_means(options, schedule, what, layers, microbatches, steps, rate):
    """(seconds of all passes, seconds waited for experts) of a step, mean over ranks, median over steps but the first."""
    arguments = ["--schedule", schedule, "--pipeline", PIPELINE, "--expert", options.expert, "--microbatches",
                 microbatches, "--layers", layers, "--tokens", options.tokens, "--hidden", options.hidden, "--top-k",
                 options.expert, "--steps", steps, "--rate", rate, "--delay-us", options.delay_us]
    if what == "compute":
        arguments.append("--no-tokens")
    ranks = timed.run_timed(options.build, arguments, {} if what == "communication" else costs_ms(options))
    return [statistics.median(statistics.mean(rank[step][key] for rank in ranks) for step in range(1, steps))
            for key in ("passes_seconds", "expert_wait_seconds")]


def steady_state(options, schedule, what, layers, rate):
    """Milliseconds of one forward and one backward, and what of them was waiting for experts."""
    (few, many), steps = ((4, 8), 2) if options.quick else ((6, 14), 3)
    short = step_means(options, schedule, what, layers, few, steps, rate)
    long = step_means(options, schedule, what, layers, many, steps, rate)
    return [1e3 * (b - a) / (many - few) for a, b in zip(short, long)]


def rows_of(options, schedule, layers, rate):
    measured = {what: steady_state(options, schedule, what, layers, rate) for what in RUNS}
    (compute, _), (communication, bare), (both, exposed) = (measured[what] for what in RUNS)
    wanted = layers * sum(costs_ms(options).values())
    if abs(compute - wanted) > 0.05 * wanted or min(communication, bare, both) <= 0:
        raise RuntimeError(f"{schedule}: {wanted:.1f} ms of timed compute alone took {compute:.1f} ms; this machine is too "
                           "busy with other things to measure overlap")
    rows = [{"schedule": schedule, "run": what, "forward_and_backward_ms": measured[what][0],
             "exposed_ms": measured[what][1], "hidden_percent": "", "efficiency": ""} for what in RUNS]
    rows[-1]["hidden_percent"] = 100 * (1 - exposed / bare)
    rows[-1]["efficiency"] = (compute + communication - both) / min(compute, communication)
    return rows


def run(options):
    layers = 2 if options.quick else 4
    rate = payload_bytes(options) / (options.transfer_share * 1e-3 * sum(costs_ms(options).values()))
    overlapped = rows_of(options, "dualpipe", layers, rate)
    serial = rows_of(options, "1f1b", layers, rate)
    compute, communication, both = overlapped
    return {"network": {"bytes_per_second": rate, "delay_us": options.delay_us, "ranks": PIPELINE * options.expert},
            "rows": overlapped + serial, "bars": [
                {"what": "dispatch and combine hidden in overlapped pairs", "unit": "%", "bar": 95.0,
                 "value": both["hidden_percent"]},
                {"what": "overlap efficiency of overlapped pairs", "unit": "", "bar": 0.9, "value": both["efficiency"]},
                {"what": "communication alone over compute alone, overlapped pairs (wanted: 0.6 to 0.9)", "unit": "x",
                 "bar": 0.6, "value": communication["forward_and_backward_ms"] / compute["forward_and_backward_ms"]}]}
