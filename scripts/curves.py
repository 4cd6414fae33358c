"What a finished run shows, as a small JSON for the pages: distances from the exact posterior or from the truth along training, or metrics of each task of `pairs`."
import argparse
import json
from pathlib import Path

from causal_meta.datasets.benchmarks import Benchmark
from causal_meta.datasets.randomness import torch_generator
from causal_meta.datasets.tasks import MetaFixedDataset, Task
from causal_meta.metrics.equivalence import class_posterior
from causal_meta.runners.evaluation import evaluate
from causal_meta.runners.learning import against_exact, against_truth, along_training, calibration, kept, of_prior, reference, side_by_side, tasks_of
from causal_meta.runners.pre_training import load_model
from causal_meta.runners.runs import RunDir, find_run

METRICS = ("e_shd2", "e_f1", "edge_log_prob", "orientation_accuracy", "valid_dag_rate", "auroc")


def trained(run: RunDir, model: str) -> dict:
    "Settings, effort and losses of one pre-training."
    lines = [json.loads(line) for line in run.log("pre_training", model).read_text().splitlines()]
    return {"config": run.config.models[model].config, "pre_training": run.config.training_of(model).model_dump(),
            "steps": lines[-1]["step"], "tasks_seen": lines[-1]["tasks"], "cpu_seconds": lines[-1]["cpu_seconds"],
            "losses": [{k: line[k] for k in ("step", "cpu_seconds", "loss", "val_loss") if k in line} for line in lines[::5] + [line for line in lines if "val_loss" in line]]}


def ceilings(benchmark: Benchmark, groups: dict[str, list[Task]]) -> dict[str, dict]:
    "What a perfect learner of the equivalence class scores on the linear families with a noise scale for each node."
    found, K = {}, benchmark.posterior_samples
    for family, tasks in groups.items():
        kind = benchmark.test[family].scm
        if kind is None or (getattr(kind.mechanism, "type", ""), getattr(kind.mechanism, "noise_scale", "")) != ("linear", "per_node"): continue
        posteriors = [class_posterior(t.graph, K, torch_generator(0, "ceiling", family, t.index, "posterior/equivalence_class")) for t in tasks]
        found[family] = against_truth(posteriors, tasks, K)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/curves", description=__doc__)
    parser.add_argument("run", help="a run's name under experiments/, or its folder")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--beside", nargs="*", default=[], help="other runs, finished or not, whose losses go beside")
    parser.add_argument("--models", nargs="*", help="amortised models of the run; all of them unless said")
    parser.add_argument("--most", type=int, help="checkpoints at most: the last, and others whose steps are in a constant ratio; all unless said")
    parser.add_argument("--calibrate", type=int, default=0, metavar="N", help="with an exact posterior: the calibration of the last checkpoint on so many further tasks of each family")
    parser.add_argument("--side-by-side", type=int, default=0, metavar="N", help="instead of the test tasks: the losses of all models on N batches of held-out tasks, compared with the first model's")
    options = parser.parse_args()
    run = find_run(options.run)
    benchmark, models = run.benchmark(), options.models or run.config.of_kind("amortised")
    found = {"run": run.name, "benchmark": benchmark.name, "models": {model: trained(run, model) for model in models},
             "beside": {other.name: {model: trained(other, model) for model in other.config.of_kind("amortised") if other.log("pre_training", model).exists()}
                        for other in map(find_run, options.beside)}}
    if options.side_by_side: found["side_by_side"] = side_by_side(run, models, options.side_by_side)
    elif benchmark.name.startswith("exact"):
        refs = [reference(benchmark, family) for family in benchmark.test]
        found["prior"] = {ref.family: of_prior(ref) for ref in refs}
        found["exact"] = {ref.family: {"log_prob": ref.log_prob} for ref in refs}
        found["curves"] = [row for model in models for row in against_exact(run, model, refs, say=lambda row: print(row, flush=True), most=options.most)]
        found["calibration"] = {model: {family: calibration(load_model(kept(run, model)[-1])[0], benchmark, family, options.calibrate) for family in benchmark.test}
                                for model in (models if options.calibrate else ())}
    elif not benchmark.name.startswith("pairs"):
        groups, K = tasks_of(benchmark), benchmark.posterior_samples
        found["ceiling"] = ceilings(benchmark, groups)
        found["curves"] = [row for model in models for row in along_training(run, model, groups, K, say=lambda row: print(row, flush=True), most=options.most)]
    else:
        edges = {(t.family, t.index): int(t.graph.sum()) for tasks in [MetaFixedDataset(benchmark)] for t in (tasks[i] for i in range(len(tasks)))}
        evaluate(run, [*models, *(m for m in run.config.of_kind("explicit"))])
        found["results"] = [{"model": r["model"], "family": r["family"], "index": r["index"], "edges": edges[r["family"], r["index"]],
                             **{k: None if v is None else round(v, 4) for k, v in r["metrics"].items() if k in METRICS}}
                            for r in json.loads(run.raw.read_text())["records"]]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__": main()
