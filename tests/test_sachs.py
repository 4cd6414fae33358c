"A posterior over graphs for a real table: the 853 observational cells of Sachs et al. (2005)."
import pandas as pd
import pytest

from causal_meta.datasets.real import load_sachs
from causal_meta.runners.config import load_config
from causal_meta.runners.pre_training import pre_train
from causal_meta.runners.runs import create_run


@pytest.fixture
def table(sachs_folder, tmp_path):
    data = load_sachs(transform="log")
    frame = pd.DataFrame(data.data.numpy(), columns=data.names)
    assert frame.shape == (853, 11)
    frame.to_csv(tmp_path/"sachs.csv", index=False)
    frame.iloc[:, :5].to_csv(tmp_path/"five.csv", index=False)
    return frame


def test_exact_on_the_first_five(cli, table, tmp_path):
    done = cli("posterior", "five.csv", "--model", "exact", "--out", "answer")
    assert done.returncode == 0, done.stderr
    assert "5 variables, 853 rows" in done.stdout
    probs = pd.read_csv(tmp_path/"answer"/"edge_probabilities.csv").set_index(["cause", "effect"])["probability"]
    assert len(probs) == 20 and probs.between(0, 1).all()
    assert probs["raf", "mek"] + probs["mek", "raf"] > .99  # the one relation nobody doubts


@pytest.mark.slow  # the network that ships answers the same table in 50a_ask
@pytest.mark.parametrize("model", ["avici", "bcnp"])
def test_amortised_on_all_eleven(cli, table, tmp_path, model):
    quick = ["pre_training.steps=2", "pre_training.global_batch=4"]
    config = {"name": "tiny", "benchmark": "sachs11-v1", "models": {model: {"type": model, "config": {"size": "tiny"}}}}
    pre_train(create_run(load_config(config, quick), tmp_path/"experiments"), model)
    done = cli("posterior", "sachs.csv", "--model", "tiny", "--samples", 20, "--out", "answer")
    assert done.returncode == 0, done.stderr
    assert "11 variables, 853 rows" in done.stdout
    assert len(pd.read_csv(tmp_path/"answer"/"edge_probabilities.csv")) == 110
    if model == "bcnp": assert "100% acyclic" in done.stdout
