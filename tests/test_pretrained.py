"Weights that ship are what their cards say, load offline, and answer where no method is named; whoever has a run can make such weights."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import causal_meta
from causal_meta.datasets.tables import Table, read_table
from causal_meta.datasets.validation import InputError
from causal_meta.models.weights import DEFAULT, FORMAT, pack, pretrained_folder, pretrained_names, read_card, stored_weights, unpack
from causal_meta.runners.config import load_config
from causal_meta.runners.pre_training import load_model, pre_train
from causal_meta.runners.pretrained import BEYOND, check_pretrained, export_pretrained, load_pretrained, rounding
from causal_meta.runners.runs import create_run
from causal_meta.runners.shift import shift_p

ROOT = Path(__file__).parents[1]
GARDEN = ROOT/"nbs/data/garden.csv"
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run with a tiny network, two steps old."
    config = {"name": "mine", "benchmark": "smoke-v1", "models": {"net": {"type": "pairformer", "config": {"size": "tiny"}}},
              "pre_training": {"steps": 2, "global_batch": 8, "threads": 1}}
    made = create_run(load_config(config), tmp_path_factory.mktemp("pretrained")/"experiments")
    pre_train(made, "net")
    return made


CARD = {"description": "A test.", "breaks": ["Everywhere."], "frozen": {"tasks": 2, "families": ["id/linear_er"]}}


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    "Its weights, as a file with a card."
    return export_pretrained(run, "net", "mine", tmp_path_factory.mktemp("exported"), CARD, tables=100)


def copied(path: Path, to: Path) -> Path:
    "Both files in another folder."
    for suffix in (".safetensors", ".json"): shutil.copy(path.with_suffix(suffix), to/(path.stem + suffix))
    return to/path.name


def test_there_is_a_default_and_all_of_it_is_small():
    assert DEFAULT in pretrained_names()
    assert {p.stem for p in pretrained_folder().iterdir()} == set(pretrained_names())
    assert sum(p.stat().st_size for p in pretrained_folder().iterdir()) <= 8*MEBIBYTE


@pytest.mark.parametrize("name", pretrained_names())
def test_shipped_weights_do_what_their_card_says(name):
    found = load_pretrained(name)
    card = read_card(name)
    assert found.card == card and card["name"] == name == found.name and card["format"] <= FORMAT
    assert card["weights"]["bytes"] == (pretrained_folder()/f"{name}.safetensors").stat().st_size
    assert card["model"]["parameters"] == sum(p.numel() for p in found.model.parameters())
    assert card["frozen"] and card["breaks"] and card["licence"] == "Apache-2.0"
    change = card["weights"]["rounding"]
    assert 0 <= change["mean"] <= .002 and change["mean"] <= change["largest"] < .1 and change["tasks"] > 0
    assert (found.facts["benchmark"], found.facts["benchmark_sha256"]) == (card["data"]["benchmark"], card["data"]["sha256"])
    assert sorted(found.shift) == card["weights"]["shift"]
    assert check_pretrained(found, 1e-4) == []
    with torch.no_grad():
        for p in found.model.parameters(): p.mul_(1.1)
    assert check_pretrained(found, 1e-4) != []  # the check can fail


def test_a_damaged_file_is_refused(exported, tmp_path):
    path = copied(exported, tmp_path)
    content = path.read_bytes()
    for place in (0, 9, len(content)//2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        with pytest.raises(InputError, match="'mine.safetensors' are damaged, or the card beside them is another's"): load_pretrained(path)
    path.write_bytes(content[:-5])
    with pytest.raises(InputError, match="are damaged"): load_pretrained(path)
    path.write_bytes(content)
    load_pretrained(path)


def test_a_damaged_or_missing_card_is_refused(exported, tmp_path):
    path = copied(exported, tmp_path)
    for text, said in (("{", "cannot be read"), ("[]", "it has no digest"), ("{}", "it has no digest")):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(InputError, match=said): load_pretrained(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match="'mine.json' is missing beside the weights"): load_pretrained(path)
    with pytest.raises(InputError, match="there is no weights file"): load_pretrained(tmp_path/"other.safetensors")
    with pytest.raises(InputError, match="did you mean 'pairformer-small'"): load_pretrained("pairformer-smal")


def test_a_file_of_a_later_version_is_named(monkeypatch):
    monkeypatch.setattr("causal_meta.models.weights.FORMAT", FORMAT + 1)
    content = pack({"w": torch.zeros(2)}, {}, {})
    monkeypatch.undo()
    with pytest.raises(InputError, match=f"x has format {FORMAT + 1}"): unpack(content, "x")


def test_export_keeps_the_network(run, exported, tmp_path):
    "Without rounding, it is the checkpoint's to the last bit; with it, the change is the one on the card."
    net, facts = load_model(run.checkpoints("net")/"best.pt")
    whole = load_pretrained(export_pretrained(run, "net", "whole", tmp_path, half=False))
    assert all(torch.equal(t, whole.model.state_dict()[k]) for k, t in net.state_dict().items())
    assert whole.card["weights"]["rounding"]["largest"] == 0 and whole.facts == facts
    half = load_pretrained(exported)
    assert rounding(net, half.model, run.benchmark()) == half.card["weights"]["rounding"]
    assert 0 < half.card["weights"]["rounding"]["largest"] < .05
    assert exported.stat().st_size < .7*(tmp_path/"whole.safetensors").stat().st_size
    assert all(t.dtype == torch.float32 for t in half.model.state_dict().values())
    assert shift_p(half.shift, torch.randn(1, 100, 5)).item() > 0 and check_pretrained(half) == []


def test_export_is_the_same_each_time(run, exported, tmp_path):
    again = export_pretrained(run, "net", "mine", tmp_path, CARD, tables=100)
    assert again.read_bytes() == exported.read_bytes()
    assert again.with_suffix(".json").read_text() == exported.with_suffix(".json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "mine.safetensors"]  # no temporary file


@pytest.mark.parametrize("kind,config", [("avici", {}), ("bcnp", {}), ("pairformer", {"head": "dags"}), ("pairformer", {"head": "edges"})])
def test_every_amortised_model_can_be_given_away(tmp_path, kind, config):
    made = create_run(load_config({"name": "any", "benchmark": "smoke-v1", "models": {"net": {"type": kind, "config": {"size": "tiny", **config}}},
                                   "pre_training": {"steps": 1, "global_batch": 4, "threads": 1}}), tmp_path)
    pre_train(made, "net")
    found = load_pretrained(export_pretrained(made, "net", "mine", tmp_path/"out", CARD))
    assert check_pretrained(found) == []
    assert found.posterior(GARDEN, 5).graphs.shape == (5, 4, 4)


def test_buffers_and_vectors_are_not_rounded(run):
    net, _ = load_model(run.checkpoints("net")/"best.pt")
    net.register_buffer("reference", torch.full((2, 2), 1/3))
    kept = stored_weights(net)
    assert kept["reference"].dtype == torch.float32
    assert {t.ndim > 1 for k, t in kept.items() if t.dtype == torch.bfloat16} == {True}


@pytest.mark.parametrize("card,said", [({"figurs": []}, "did you mean 'figures'"), ({"frozen": {"benchmark": "audt-v1"}}, "did you mean 'audit-v1'"),
                                       ({"frozen": {"families": ["id/linear"]}}, "unknown test family"), ({"figures": [{"what": "x", "value": 1}]}, "is missing")])
def test_a_wrong_card_is_one_sentence(run, tmp_path, card, said):
    with pytest.raises(InputError, match=said): export_pretrained(run, "net", "mine", tmp_path, card)
    assert list(tmp_path.iterdir()) == []


def test_the_global_generator_is_left_alone(exported):
    before = torch.get_rng_state()
    load_pretrained(exported)
    assert torch.equal(torch.get_rng_state(), before)


def test_both_ways_of_asking_agree(tmp_path):
    "A path, a frame, a table and interventions; and the default is the shipped model."
    model = causal_meta.load_pretrained()
    table = read_table(GARDEN)
    frame = pd.DataFrame(table.data.numpy(), columns=table.names)
    frame["set"] = ["grass" if i % 4 == 0 else "" for i in range(len(frame))]
    for data, target in ((GARDEN, None), (table, None), (frame, "set")):
        a, b = model.posterior(data, 20, target_column=target, seed=3), causal_meta.posterior(data, samples=20, target_column=target, seed=3)
        assert torch.equal(a.edge_probs, b.edge_probs) and torch.equal(a.graphs, b.graphs) and a.names == table.names
        assert a.info["method"] == b.info["method"] == DEFAULT
    assert a.info["intervened_rows"] == 100
    scaled = Table(table.data*50 + 9, table.intervened, table.names, "scaled")
    torch.testing.assert_close(model.posterior(scaled, 5).edge_probs, model.posterior(table, 5).edge_probs, atol=1e-4, rtol=0)


def test_wide_tables(exported):
    model, noise = load_pretrained(exported), torch.Generator().manual_seed(0)
    assert model.posterior(torch.randn(100, 5, generator=noise).numpy(), 2).info["remarks"] == []
    wide = model.posterior(torch.randn(100, 5*BEYOND, generator=noise).numpy(), 2)
    assert wide.info["remarks"] == [f"the model was trained on tables of 5 columns, this one has {5*BEYOND}"]
    assert wide.info["remarks"][0] in causal_meta.describe(wide)
    with pytest.raises(InputError, match=f"the table has {5*BEYOND + 1} columns, and 'mine' supports at most {5*BEYOND}"):
        model.posterior(torch.randn(100, 5*BEYOND + 1, generator=noise).numpy())


def test_names(run, exported, monkeypatch, tmp_path):
    "Shipped weights are found before a run of that name; the run by its folder, the file by its path."
    shutil.copytree(run.path, tmp_path/"experiments"/DEFAULT)
    assert causal_meta.find_method(DEFAULT, tmp_path/"experiments").model.config.size == read_card(DEFAULT)["model"]["config"].get("size", "small")
    assert causal_meta.find_method(tmp_path/"experiments"/DEFAULT).name == "net"
    assert causal_meta.find_method(exported).name == "mine"
    with pytest.raises(InputError, match=f"name some that ship with the package \\({', '.join(pretrained_names())}"): causal_meta.find_method("pairformer")
    with pytest.raises(InputError, match=f"nor weights that ship \\({', '.join(pretrained_names())}"): causal_meta.find_method("nothing", tmp_path)


OFFLINE = """
import sys, time
began = time.perf_counter()
asked, leaving = [], {"socket." + what for what in ("connect", "getaddrinfo", "gethostbyname", "sendto", "sendmsg")}
sys.addaudithook(lambda event, _: asked.append(event) if event in leaving else None)
import causal_meta
assert "torch" not in sys.modules
light = time.perf_counter() - began
model = causal_meta.load_pretrained()
print(f"import {light:.2f} s, load_pretrained {time.perf_counter() - began - light:.2f} s")
posterior = model.posterior(sys.argv[1], samples=10)
print(f"with the posterior {time.perf_counter() - began:.2f} s")
assert posterior.graphs.shape == (10, 4, 4)
assert asked == [], asked
import socket
socket.getaddrinfo("127.0.0.1", 9)
assert asked  # the hook does see them
"""


def test_three_lines_without_a_network_connection(tmp_path):
    done = subprocess.run([sys.executable, "-c", OFFLINE, GARDEN], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_the_command_needs_no_model(cli, tmp_path):
    done = cli("posterior", GARDEN, "--out", "answer", "--samples", 20)
    assert done.returncode == 0, done.stderr
    assert f"method {DEFAULT}" in done.stdout
    assert f"method {DEFAULT}" in (tmp_path/"answer/summary.txt").read_text()
    frame = pd.read_csv(tmp_path/"answer/edge_probabilities.csv")
    assert len(frame) == 12 and frame.probability.between(0, 1).all()


def test_commands_for_cards(monkeypatch, capsys, tmp_path, run):
    "list, show, verify, export: in this process, as to start one costs seconds."
    from causal_meta.cli import main

    def said(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["causal-meta", *map(str, words)])
        with pytest.raises(SystemExit) as left: main()
        printed = capsys.readouterr().out
        assert left.value.code in (code, None if code == 0 else code), printed
        return printed

    assert [line.split()[0] for line in said("pretrained", "list").splitlines()] == pretrained_names()
    (tmp_path/"card.yaml").write_text("description: A test.\nbreaks: [Everywhere.]\nfrozen: {tasks: 1, families: [id/linear_er]}\n")
    said("export", "mine/net", "mine-v1", "--out", tmp_path/"out", "--card", tmp_path/"card.yaml", "--float32", "--tables", "100", "--experiments", run.path.parent)
    path = tmp_path/"out/mine-v1.safetensors"
    page = said("pretrained", "show", path)
    assert "## mine-v1" in page and "- Everywhere." in page and "smoke-v1" in page
    assert "gives its 1 frozen figures" in said("pretrained", "verify", path)
    card = json.loads(path.with_suffix(".json").read_text())
    card["frozen"][0]["edge_cross_entropy"] += .001
    path.with_suffix(".json").write_text(json.dumps(card))
    assert "edge_cross_entropy on smoke-v1" in said("pretrained", "verify", path, code=1)


def test_mistakes_on_the_command_line(refused, run):
    assert "did you mean 'pairformer-small'" in refused("pretrained", "show", "pairformer-smal")
    assert "there is no run 'nowhere'" in refused("export", "nowhere", "mine")
    assert "unknown amortised model of run 'mine' 'nett'" in refused("export", "mine/nett", "x", "--experiments", run.path.parent)
    assert "must be small letters" in refused("export", "mine", "My Net", "--experiments", run.path.parent)
    assert "is that of a registered model" in refused("export", "mine", "pairformer", "--experiments", run.path.parent)
