"A study of several training seeds by the command line: two pieces at a time, killed in between, run again, and aggregated."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from causal_meta.pipeline import run_stage
from causal_meta.runners.config import load_config
from causal_meta.runners.evaluation import evaluate
from causal_meta.runners.inference import infer
from causal_meta.runners.runs import create_run, write_json

STUDY = """
name: study
benchmark: smoke-v1
tasks: 1
likelihood: none
study: {training_seeds: [0, 1]}
models:
  avici: {type: avici, config: {size: tiny}}
  pairformer: {type: pairformer, config: {size: tiny}}
  exact: {type: exact}
  random: {type: random}
pre_training: {steps: 12, global_batch: 8, validate_every: 6, checkpoint_every: 2, threads: 1}
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "causal_meta", *words]


def tables(folder: Path) -> dict[str, str]:
    "What was written that does not speak of time."
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*.csv")) if p.stem not in ("results", "cost", "break_even")}


def said(report: Path) -> str:
    "The words of an executed report."
    return "\n".join(o["data"]["text/markdown"] if isinstance(o["data"]["text/markdown"], str) else "".join(o["data"]["text/markdown"])
                     for cell in json.loads(report.read_text())["cells"] for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {}))


@pytest.mark.slow
def test_a_study_that_is_killed_ends_as_one_that_is_not(tmp_path):
    for name in ("whole", "broken"):
        (tmp_path/name).mkdir()
        (tmp_path/name/"study.yaml").write_text(STUDY)
    whole, broken = tmp_path/"whole", tmp_path/"broken"
    run = ["run", "study.yaml", "--jobs", "2"]
    done = subprocess.run(command(*run), cwd=whole, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "all together: causal-meta aggregate experiments/study-0 experiments/study-1 --out study" in done.stdout
    assert "training seeds 0 and 1" in said(whole/"experiments"/"study-report.ipynb")
    for number, when in ((signal.SIGKILL, "experiments/study-0/checkpoints/avici/last.pt"), (signal.SIGTERM, "experiments/study-1/checkpoints/pairformer/last.pt")):
        process = subprocess.Popen(command(*run), cwd=broken, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        until = time.monotonic() + 200
        while not (broken/when).exists() and process.poll() is None and time.monotonic() < until: time.sleep(.02)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
            process.wait()
        else:
            process.send_signal(number)
            stderr = process.communicate(timeout=120)[1]
            assert process.returncode in (85, -number), stderr
    done = subprocess.run(command(*run), cwd=broken, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for folder in (whole, broken):
        made = subprocess.run(command("aggregate", "experiments/study-0", "study-1", "--out", "out"), cwd=folder, capture_output=True, text=True, timeout=300)
        assert made.returncode == 0, made.stderr
        assert "2 runs, " in made.stdout and "left out" not in made.stdout
    assert tables(whole/"out") == tables(broken/"out") and len(tables(whole/"out")) >= 3
    for seed in (0, 1):  # explicit posteriors were computed once
        counts = [json.loads(line) for line in (whole/f"experiments/study-{seed}/logs/inference.jsonl").read_text().splitlines()]
        assert sum(c["computed"] for c in counts) == (6 if seed == 0 else 0)


@pytest.mark.slow
def test_the_report_says_what_the_numbers_say(tmp_path):
    "The same run with the scores of its two models exchanged."
    run = create_run(load_config({"name": "two", "benchmark": "smoke-v1", "likelihood": "none", "models": {"exact": {"type": "exact"}, "random": {"type": "random"}}}), tmp_path)
    infer(run, say=lambda *_: None)
    evaluate(run, say=lambda *_: None)
    before = said(run_stage("report", run))
    raw, other = json.loads(run.raw.read_text()), {"exact": "random", "random": "exact"}
    for record in raw["records"]: record["model"] = other[record["model"]]
    write_json(run.raw, raw)
    after = said(run_stage("report", run))
    assert "By edge_log_prob_mean, *exact* comes first" in before and "By edge_log_prob_mean, *random* comes first" in after
    price = [text.split("A posterior takes")[1].split("of processor time")[0] for text in (before, after)]
    assert price[0].index("random") < price[0].index("exact") and price[1].index("exact") < price[1].index("random")


def test_a_study_says_what_is_missing(tmp_path, refused):
    (tmp_path/"study.yaml").write_text(STUDY)
    assert "must be distinct" in refused("run", str(tmp_path/"study.yaml"), "--set", "study.training_seeds=[1, 1]")
    assert "there is no run 'nothing'" in refused("aggregate", "nothing", "--out", "out")
    assert "there is no run 'nothing'" in refused("report", "nothing", "neither")
