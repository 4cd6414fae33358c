"What scripts/curves writes of a run whose checkpoints were kept."
import json
import runpy
import sys
from pathlib import Path

import pytest

import causal_meta.models.pairformer  # noqa: F401  registers the model
from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.validation import InputError
from causal_meta.metrics.summary import METRICS
from causal_meta.runners.config import load_config
from causal_meta.runners.learning import kept
from causal_meta.runners.pre_training import pre_train
from causal_meta.runners.runs import create_run

ROOT = Path(__file__).parents[1]


def test_metrics_along_training_and_the_ceiling(tmp_path, monkeypatch):
    run = create_run(load_config({"name": "r", "benchmark": "smoke-v1", "models": {"m": {"type": "pairformer", "config": {"size": "tiny", "layers": 1}}},
                                  "pre_training": {"steps": 4, "global_batch": 4, "keep_every": 1, "validate_every": 4, "log_every": 1, "threads": 1}}), tmp_path)
    pre_train(run, "m")
    out = tmp_path/"found.json"
    monkeypatch.setattr(sys, "argv", ["curves", str(run.path), "--most", "3", "--out", str(out)])
    runpy.run_path(str(ROOT/"scripts"/"curves.py"), run_name="__main__")
    found, smoke = json.loads(out.read_text()), load_benchmark("smoke-v1")
    assert found["models"]["m"]["steps"] == 4 and found["models"]["m"]["tasks_seen"] == 16
    assert [(r["step"], r["family"]) for r in found["curves"]] == [(step, f) for step in (1, 2, 4) for f in sorted(smoke.test)]
    for row in found["curves"]:
        assert row["n"] == smoke.test[row["family"]].tasks and 0 <= row["ece"] <= 1
        assert {k for k in row if k in METRICS} == {"e_shd2", "e_f1", "auroc", "auprc", "edge_log_prob", "log_prob_graph", "ece"}
    linear = {f for f, kind in smoke.test.items() if kind.scm.mechanism.type == "linear" and kind.scm.mechanism.noise_scale == "per_node"}
    assert set(found["ceiling"]) == linear
    for top in found["ceiling"].values(): assert top["log_prob_graph"][0] <= 0 and top["auroc"][0] > .8


def test_a_run_without_a_trail_is_refused(tmp_path):
    run = create_run(load_config({"name": "r", "benchmark": "smoke-v1", "models": {"m": {"type": "pairformer"}}}), tmp_path)
    with pytest.raises(InputError, match="keep_every"): kept(run, "m")


def test_published_figures_are_whole():
    published = json.loads((ROOT/"nbs"/"data"/"published_bcnp20.json").read_text())
    cells = {family.removeprefix("id/") for family in load_benchmark("bcnp20-v1").test}
    for method in ("bcnp", "avici", "dibs", "bayesdag"):
        assert set(published[method]) == cells
        for values in published[method].values():
            assert len(values) == (4 if method == "bcnp" else 3) and 0 < values[0] < 120 and all(0 < v < 1 for v in values[1:3])
    assert all(values[3] < 0 for values in published["bcnp"].values())
