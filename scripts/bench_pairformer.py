"What the Pairformer costs: a step by rows and nodes and where it goes, tasks per second beside AVICI and BCNP, and the latency of a posterior."
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bench_generation import sgemm
from bench_training import batch_of

import causal_meta.models.avici  # noqa: F401  registers the model
import causal_meta.models.bcnp  # noqa: F401
import causal_meta.models.pairformer as pairformer
from causal_meta.models.base import build_model, complete
from causal_meta.models.cross_moments import gram, partial_correlations
from causal_meta.models.pairformer import pair_logits
from causal_meta.models.sequential_orders import draw_orders
from causal_meta.runners.steps import gradients, micro_batches

# models of nearly as many parameters as a small Pairformer
EQUAL = {"pairformer": {}, "avici": {"size": "small", "layers": 3, "dim": 60, "key_size": 15, "dropout": 0.}, "bcnp": {"size": "small"}}
ROWS, NODES = (50, 100, 200, 500, 1000, 2000, 5000, 10000), (5, 10, 20, 50, 100, 200)


def seconds(work: Callable[[], object], repeats: int) -> float:
    "Processor seconds, the least of some repetitions after a first that does not count."
    work()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def peak() -> int: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024


def step(model: str, shape: dict, repeats: int) -> dict:
    "An optimiser step: forward, backward and update; for a Pairformer also its parts that know of rows."
    net, batch = build_model(model, EQUAL[model]).train(), batch_of(**shape)
    optimizer, idle = torch.optim.AdamW(net.parameters()), peak()

    def one() -> None:
        gradients(net, micro_batches([batch], None), kind="fp32")
        optimizer.step()
    found = {"parameters": sum(p.numel() for p in net.parameters()), "cpu_seconds": seconds(one, repeats), "peak_bytes": peak() - idle}
    if model != "pairformer": return found
    features = net.moments.features
    with torch.no_grad(): phi = features(batch.data).flatten(2).requires_grad_()
    return found | {"product": seconds(lambda: gram(phi).sum().backward(), repeats), "features": seconds(lambda: features(batch.data).sum().backward(), repeats)}


def latency(shape: dict, repeats: int) -> dict:
    "A posterior of one task, by the number of graphs, of a batch of tasks, and the parts of it."
    net, batch, generator = build_model("pairformer").eval(), batch_of(**shape), torch.Generator().manual_seed(0)
    given = complete(batch.data, None, None)
    times: dict[int, list[float]] = {1: [], 100: [], 1000: []}
    for _ in range(repeats + 5):  # in turns, so that a slow moment is shared
        for K, of in times.items():
            begin = time.process_time()
            net.posterior(batch.data, n_samples=K, generator=generator)
            of.append(time.process_time() - begin)
    found = {"samples": {K: min(of[5:]) for K, of in times.items()}, "median": {K: statistics.median(of[5:]) for K, of in times.items()}}
    many = batch.data.expand(32, -1, -1).contiguous()
    found["of 32 at once, each"] = seconds(lambda: net.posterior(many, n_samples=1, generator=generator), max(repeats//6, 2))/32
    with torch.no_grad():
        phi, x0, x = net.moments.features(batch.data), net.moments(*given), net.pairs(*given)
        orders, probs = net.order_head(x, given[2]), pair_logits(net.pair_scores(x, given[2])).sigmoid()
        def trunk(x: torch.Tensor) -> torch.Tensor:
            for block in net.blocks: x = block(x)
            return x
        found["parts"] = {"moments and what is made of them": seconds(lambda: net.moments(*given), repeats), "of these the functions": seconds(lambda: net.moments.features(batch.data), repeats),
                          "of these the product": seconds(lambda: gram(phi.flatten(2)), repeats), "of these partial correlations": seconds(lambda: partial_correlations(batch.data), repeats),
                          "blocks": seconds(lambda: trunk(x0), repeats), "heads": seconds(lambda: (net.pair_scores(x, given[2]), net.order_head(x, given[2])), repeats)}
        for K in (1, 1000):
            found["parts"][f"draws, {K}"] = seconds(lambda: pairformer._drawn(probs, orders, K, generator), repeats)  # noqa: B023  called at once
            numbers = torch.rand(1, K, shape["d"])
            found["parts"][f"of these orders, {K}"] = seconds(lambda: draw_orders(orders, numbers), repeats)  # noqa: B023
        found["network"] = seconds(lambda: net.pairs(*given), repeats)
        try: found["network, compiled"] = seconds(partial(torch.compile(net.pairs), *given), repeats)
        except Exception as e: found["not compiled"] = type(e).__name__  # for want of a C++ compiler, as a rule
    return found


def one(what: str, **given) -> dict:
    "Measure in this process; it is started for this one measurement, so that peak memory is its own."
    torch.set_num_threads(1)
    return {**(step if what == "step" else latency)(**given), "gflops": sgemm()}


def measured(**given) -> dict:
    "What `one` says, from a process of its own."
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(given)], capture_output=True, text=True)
    if done.returncode: return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"signal {-done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench pairformer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few sizes only, for a first look")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one: return print(json.dumps(one(**json.loads(options.one))))
    found = {"machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}, "growth": [], "training": []}

    rows, nodes = ((100, 1000), (5, 20)) if options.quick else (ROWS, NODES)
    print("a step of one task: processor seconds of one thread, of these the product and the features, memory above the idle process, sgemm rate")
    for what, shapes in (("n", [{"B": 1, "n": n, "d": 20} for n in rows]), ("d", [{"B": 1, "n": 1000, "d": d} for d in nodes])):
        for shape in shapes:
            row = measured(what="step", model="pairformer", shape=shape, repeats=3 if shape["d"] > 50 or shape["n"] > 2000 else 10)
            found["growth"].append({"varied": what, **shape, **row})
            print(f"d {shape['d']:>3} n {shape['n']:>5}  " + (row.get("failed") or f"{row['cpu_seconds']:.4f} s, product {row['product']:.4f}, features {row['features']:.4f}  {row['peak_bytes']/1e9:.2f} GB  {row['gflops']:.0f} Gflop/s"), flush=True)
    print("training, tasks per processor second at equal numbers of parameters")
    for shape in ({"B": 64, "n": 100, "d": 5}, {"B": 8, "n": 1000, "d": 20}):
        for model in EQUAL:
            row = measured(what="step", model=model, shape=shape, repeats=5 if model == "pairformer" else 1)
            if "failed" not in row: row["tasks_per_second"] = shape["B"]/row["cpu_seconds"]
            found["training"].append({"model": model, **shape, **row})
            print(f"{model:10} d {shape['d']:>2} n {shape['n']:>4}  " + (row.get("failed") or f"{row['parameters']:,} parameters  {row['tasks_per_second']:.1f} tasks/s  {row['peak_bytes']/1e9:.2f} GB  {row['gflops']:.0f} Gflop/s"), flush=True)
    found["latency"] = measured(what="latency", shape={"B": 1, "n": 1000, "d": 20}, repeats=5 if options.quick else 30)
    print("a posterior, d 20, n 1000, one thread:", json.dumps(found["latency"], indent=1))
    if options.out: options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
