"Bad input to the command line is one sentence and exit code 2, and leaves nothing behind."
import subprocess
import sys

import pytest

from causal_meta.runners.checkpoints import save_checkpoint
from causal_meta.runners.config import load_config
from causal_meta.runners.pre_training import pre_train
from causal_meta.runners.runs import create_run

GOOD = "a,b,c\n1,2,3\n2,1,5\n4,4,4.5\n0,1,0\n"

TABLES = {
    "text": (GOOD.replace("4.5", "high"), "high"),
    "nan": (GOOD.replace("4.5", ""), "c"),
    "constant": ("a,b\n1,2\n1,3\n1,4\n", "a"),
    "duplicate": (GOOD.replace("a,b,c", "a,b,a"), "a"),
    "one_row": ("a,b,c\n1,2,3\n", "row"),
    "empty": ("", "empty"),
    "wide": (",".join("abcdefghijklmnopq") + "\n" + "\n".join(",".join(str((i + j)**3 % 101) for j in range(17)) for i in range(9)), "at most 16"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_bad_tables(refused, tmp_path, kind):
    text, word = TABLES[kind]
    (tmp_path/"table.csv").write_text(text)
    assert word in refused("posterior", "table.csv", "--model", "exact")


def test_missing_file_and_unknown_models(refused, tmp_path):
    assert "nowhere.csv" in refused("posterior", "nowhere.csv", "--model", "exact")
    (tmp_path/"table.csv").write_text(GOOD)
    assert "unknown model 'exat'" in refused("posterior", "table.csv", "--model", "exat")
    assert "needs weights" in refused("posterior", "table.csv", "--model", "avici")
    assert "target" in refused("posterior", "table.csv", "--model", "exact", "--target-column", "where")


def test_configurations(refused, tmp_path):
    assert "did you mean 'smoke_test'" in refused("run", "smoke_tset")
    assert "did you mean 'steps'" in refused("run", "smoke_test", "--set", "pre_training.stps=1")
    assert "did you mean 'size'" in refused("run", "smoke_test", "--set", "models.avici.config.sise=tiny")
    assert "executor" in refused("run", "smoke_test", "--executor", "slrum")
    (tmp_path/"bad.yaml").write_text("name: [")
    assert "not valid YAML" in refused("run", "bad.yaml")
    (tmp_path/"typo.yaml").write_text("name: x\nbenchmark: smoke-v1\nmodles: {}\nmodels: {a: {type: exact}}\n")
    assert "did you mean 'models'" in refused("run", "typo.yaml")
    (tmp_path/"none.yaml").write_text("name: x\nbenchmark: smke-v1\nmodels: {a: {type: exact}}\n")
    assert "did you mean 'smoke-v1'" in refused("run", "none.yaml")


def test_runs_and_benchmarks(refused):
    for command in ("pretrain", "infer", "evaluate", "report"): assert "there is no run 'nowhere'" in refused(command, "nowhere")
    assert "did you mean 'smoke-v1'" in refused("benchmark", "show", "smok-v1")
    assert "i/n" in refused("infer", "nowhere", "--shard", "2/2")


def test_corrupt_checkpoint(refused, tmp_path):
    (tmp_path/"table.csv").write_text(GOOD)
    (tmp_path/"random.pt").write_bytes(bytes(range(256))*20)
    assert "damaged or not a checkpoint" in refused("posterior", "table.csv", "--model", "random.pt")
    torn = save_checkpoint(tmp_path/"torn.pt", {"facts": {}, "step": 3})
    torn.write_bytes(torn.read_bytes()[:-300])
    assert "damaged" in refused("posterior", "table.csv", "--model", "torn.pt")
    save_checkpoint(tmp_path/"foreign.pt", {"step": 3})
    assert "holds no model" in refused("posterior", "table.csv", "--model", "foreign.pt")


def test_more_columns_than_the_weights_were_trained_on(refused, tmp_path):
    only = {"name": "small", "benchmark": "smoke-v1", "models": {"avici": {"type": "avici", "config": {"size": "tiny"}}},
            "pre_training": {"steps": 2, "global_batch": 8}}
    pre_train(create_run(load_config(only), tmp_path/"experiments"), "avici")
    (tmp_path/"wide.csv").write_text(TABLES["wide"][0])
    assert "the table has 17 columns, and 'avici' supports at most 5" in refused("posterior", "wide.csv", "--model", "small")


def test_misspelled_papermill_parameter(tmp_path):
    from causal_meta.datasets.validation import InputError
    from causal_meta.pipeline import execute, stage_notebook

    with pytest.raises(InputError, match="did you mean 'config'"): execute(stage_notebook("report"), tmp_path/"out.ipynb", {"confg": "x"})
    assert list(tmp_path.iterdir()) == []
    bare = subprocess.run([sys.executable, "-m", "papermill", str(stage_notebook("report")), "out.ipynb", "-p", "confg", "smoke_test", "-k", "python3"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert bare.returncode != 0 and "did you mean 'config'" in bare.stderr


def test_posterior_of_a_table(cli, tmp_path):
    (tmp_path/"table.csv").write_text("a,b,targets\n" + "\n".join(f"{i % 7},{(i % 7)*2 + (i*5) % 3},{'b' if i % 4 == 0 else ''}" for i in range(60)))
    done = cli("posterior", "table.csv", "--model", "exact", "--samples", 50, "--target-column", "targets", "--out", "answer")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path/"answer").iterdir()) == ["edge_probabilities.csv", "graph.png", "graphs.json", "heatmap.png",
                                                                     "posterior.safetensors", "summary.txt"]
    assert (tmp_path/"answer"/"edge_probabilities.csv").read_text().splitlines()[0] == "cause,effect,probability"
    assert "2 variables, 60 rows (15 with interventions), method exact" in done.stdout


def test_help_is_light(cli):
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "causal_meta", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "posterior" in done.stdout
    for heavy in ("torch", "pandas", "matplotlib", "papermill", "networkx"): assert f" {heavy}\n" not in done.stderr, heavy
