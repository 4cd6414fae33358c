"The main job, end to end through the command line: what it leaves behind, and that doing it again changes nothing."
import json
import re
import subprocess
from importlib.resources import files

import jsonschema
import pytest
from alike import alike
from cluster import ROOT

QUICK = ["--set", "pre_training.steps=4", "--set", "pre_training.validate_every=2", "--set", "pre_training.checkpoint_every=2"]


def schema(name):
    return json.loads((files("causal_meta")/"schemas"/f"{name}.schema.json").read_text())


def results(run):
    "Raw results without timings, and the summary; both checked against their schemas."
    raw, summary = (json.loads((run/"results"/f"{name}.json").read_text()) for name in ("metrics_raw", "metrics_summary"))
    jsonschema.validate(raw, schema("metrics_raw"))
    jsonschema.validate(summary, schema("metrics_summary"))
    return [{k: v for k, v in r.items() if k not in ("compute", "made_of")} for r in raw["records"]], {k: v for k, v in summary.items() if k not in ("compute", "break_even")}


def smoke_job(cli, tmp_path, tasks):
    "Run it, with so many tasks of each family, and look at what it leaves."
    first = cli("run", "smoke_test", *QUICK, "--set", "seed_lists=[a,b]", "--set", f"tasks={tasks}")
    assert first.returncode == 0, first.stderr
    assert "auroc" in first.stdout and "report   experiments/smoke_test/notebooks/report.ipynb" in first.stdout
    run = tmp_path/"experiments"/"smoke_test"
    for file in ("config.yaml", "benchmark.json", "environment.json", "checkpoints/avici/best.pt", "checkpoints/bcnp/last.pt",
                 "inference/exact/id/linear_er/0.safetensors", f"inference/random/id/neural_net_er@b/{tasks - 1}.safetensors",
                 "results/metrics_raw.json", "results/metrics_summary.json", "logs/pre_training-avici.jsonl",
                 *(f"notebooks/{s}.ipynb" for s in ("pre_training", "inference", "evaluation", "report"))):
        assert (run/file).is_file(), file
    assert not [p for p in run.rglob("*") if re.search(r"\.(tmp|part|running\.ipynb|failed\.ipynb)$", p.name)]
    records, summary = results(run)
    assert len(records) == 5*3*tasks*2 and set(summary["models"]) == {"avici", "bcnp", "pairformer", "exact", "random"}
    assert {(r["model"], r["seed_list"]) for r in records} == {(m, s) for m in summary["models"] for s in "ab"}
    return run, records, summary


@pytest.fixture(scope="module")
def local_results():
    "What the local executor found in `test_smoke_job`, for the same under SLURM."
    return {}


def test_smoke_job(cli, tmp_path, local_results):
    run, records, summary = smoke_job(cli, tmp_path, tasks=1)
    local_results["found"] = records, summary
    # the same run with another setting is refused; nothing is changed
    other = cli("run", "smoke_test", *QUICK, "--set", "seed_lists=[a,b]", "--set", "tasks=1", "--set", "training_seed=1")
    assert other.returncode == 2 and "training_seed was 0, is now 1" in other.stderr
    alike(results(run), (records, summary))


@pytest.mark.slow
def test_smoke_job_again(cli, tmp_path):
    run, records, summary = smoke_job(cli, tmp_path, tasks=2)
    weights = (run/"checkpoints/bcnp/last.pt").read_bytes()
    # a stage can be run alone, and a shard of it: it keeps what is whole
    part = cli("infer", "smoke_test", "--shard", "1/2")
    assert part.returncode == 0 and "0 posteriors computed, 12 kept" in part.stdout, part.stderr
    # the same again finds nothing to do but to mend a torn artifact
    torn = run/"inference/exact/id/linear_sf@b/1.safetensors"
    torn.write_bytes(torn.read_bytes()[:50])
    again = cli("run", "smoke_test", *QUICK, "--set", "seed_lists=[a,b]", "--set", "tasks=2")
    assert again.returncode == 0, again.stderr
    assert "nothing left to do" in again.stdout and "1 posteriors computed, 23 kept" in again.stdout and "linear_sf@b/1.safetensors: damaged" in again.stdout
    alike(results(run), (records, summary))
    assert (run/"checkpoints/bcnp/last.pt").read_bytes() == weights


@pytest.mark.slurm
def test_smoke_job_under_slurm(cluster, tmp_path, local_results):
    "The same run, on two nodes: pre-training on one, the explicit posteriors on the other."
    words = ("smoke_test", *QUICK, "--set", "seed_lists=[a,b]", "--set", "tasks=1", "--experiments", tmp_path/"experiments", "--wait")
    done = cluster(*words, command=ROOT/"slurm/submit")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert re.findall(r"^(\w+), .*: done", done.stdout, re.M)[-2:] == ["evaluation", "report"] and "auroc" in done.stdout
    run = tmp_path/"experiments"/"smoke_test"
    if "found" not in local_results: pytest.skip("there is nothing to compare with: test_smoke_job was not run, or failed")
    alike(results(run), local_results["found"])
    assert {p.name for p in (run/"notebooks").glob("*.ipynb")} == {f"{s}.ipynb" for s in ("pre_training", "inference", "evaluation", "report")}
    assert sorted(p.name.rsplit("_", 2)[0] for p in (tmp_path/"experiments"/"slurm").glob("*.out")) == sorted(f"smoke_test-{s}" for s in ("pre_training", "inference", "evaluation", "report"))


def test_without_slurm(refused, capsys, tmp_path, monkeypatch):
    "What would be typed can be seen anywhere; sending needs SLURM, and says so."
    from causal_meta.cli import main

    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "there is no sbatch on this machine" in refused("run", "smoke_test", "--executor", "slurm")
    assert "unknown configuration 'smoke_tset'" in refused("run", "smoke_tset", "--executor", "slurm", "--dry-run")
    assert "--wait is for --executor slurm" in refused("run", "smoke_test", "--wait")
    assert "there is no run 'nothing'" in refused("status", "nothing")
    monkeypatch.setattr("sys.argv", ["causal-meta", "run", "smoke_test", "--executor", "slurm", "--dry-run", "--jobs", "4"])
    with pytest.raises(SystemExit) as left: main()
    shown = capsys.readouterr().out
    assert left.value.code == 0 and shown.count("$(sbatch --parsable") == 4 and "--array=0-3" in shown and not list(tmp_path.iterdir())
    assert subprocess.run(["bash", "-n"], input=shown, text=True).returncode == 0


def test_broken_config_leaves_no_folder(refused, tmp_path):
    refused("run", "smoke_test", "--set", "benchmark=smoke-v9")
    refused("run", "smoke_test", "--set", "seed_lists=[q]")
    assert not (tmp_path/"experiments").exists()


def test_schemas_refuse():
    good = {"schema": 1, "records": [{"model": "m", "training_seed": 0, "seed_list": "a", "family": "id/x", "index": 0, "metrics": {"auroc": None},
                                      "compute": {"seconds": 1.0, "peak_rss_bytes": 5}}]}
    jsonschema.validate(good, schema("metrics_raw"))
    for change in ({"index": "0"}, {"metrics": {"auroc": "high"}}, {"position": 3}):
        bad = {**good, "records": [{**good["records"][0], **change}]}
        with pytest.raises(jsonschema.ValidationError): jsonschema.validate(bad, schema("metrics_raw"))
