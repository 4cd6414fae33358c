"What goes wrong in long runs: a loss that is lost, a full disk, two processes on one folder, a changed configuration."
import multiprocessing
import resource
import signal
import time

import pytest
import torch

from causal_meta.datasets.streams import MetaIterableDataset
from causal_meta.datasets.validation import InputError
from causal_meta.models import avici as avici_module
from causal_meta.models.base import Loss
from causal_meta.runners.checkpoints import load_checkpoint, state_digest
from causal_meta.runners.config import load_config
from causal_meta.runners.pre_training import begin, best_model, pre_train, train_step
from causal_meta.runners.runs import create_run, read_lines
from causal_meta.runners.steps import Diverged

PROCESSES = multiprocessing.get_context("forkserver")
BASE = {"name": "base", "benchmark": "smoke-v1", "models": {"avici": {"type": "avici", "config": {"size": "tiny"}}},
        "pre_training": {"steps": 12, "global_batch": 8, "checkpoint_every": 4, "validate_every": 6, "log_every": 1, "threads": 1}}


def digest(run): return state_digest(load_checkpoint(run.checkpoints("avici")/"last.pt")["model_state_dict"])
def files(run): return sorted(p.name for p in run.checkpoints("avici").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = create_run(load_config(BASE, name="whole"), tmp_path_factory.mktemp("whole"))
    pre_train(run, "avici")
    return run


@pytest.mark.parametrize("factor, said", [(float("nan"), "the loss became nan"), (1e9, "the usual is")])
def test_a_lost_loss_stops_before_it_does_harm(tmp_path, whole, monkeypatch, factor, said):
    run, own, calls = create_run(load_config(BASE, name="lost"), tmp_path), avici_module.avici_loss, []
    def lost(model, batch):
        loss = own(model, batch)
        if model.training: calls.append(1)
        return Loss(loss.total*factor, loss.parts) if len(calls) == 7 else loss  # in the seventh step
    monkeypatch.setattr(avici_module, "avici_loss", lost)
    with pytest.raises(Diverged) as caught: pre_train(run, "avici")
    text = str(caught.value)
    assert text.startswith("avici, step 6: ") and said in text
    assert "/train/" in text and f"the last good checkpoint is '{run.checkpoints('avici')/'last.pt'}', step 4" in text
    assert load_checkpoint(run.checkpoints("avici")/"last.pt")["step"] == 4
    monkeypatch.setattr(avici_module, "avici_loss", own)
    pre_train(run, "avici")  # it was an accident: the same command goes on
    assert digest(run) == digest(whole)


def with_small_files(run, limit, said):
    "Pre-train in a process that may not write files larger than `limit` bytes, and note what it is told."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try: pre_train(run, "avici")
    except InputError as e:
        said.write_text(str(e))
        raise SystemExit(1)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, whole):
    run = create_run(load_config(BASE, name="full"), tmp_path)
    process = PROCESSES.Process(target=with_small_files, args=(run, 50_000, tmp_path/"said"))
    process.start(); process.join(120)
    assert process.exitcode == 1
    said = (tmp_path/"said").read_text()
    assert said.startswith("'") and "could not be written (File too large); what was there before is unchanged. Make room" in said
    assert [name for name in files(run) if name.endswith(".tmp") or name.endswith(".pt")] == []
    own = create_run(load_config(BASE, ["pre_training.checkpoint_every=1"], name="later"), tmp_path)
    pre_train(own, "avici")
    kept = (own.checkpoints("avici")/"last.pt").read_bytes()
    again = create_run(load_config(BASE, ["pre_training.steps=14"], name="later"), tmp_path, fork=True)
    process = PROCESSES.Process(target=with_small_files, args=(again, 50_000, tmp_path/"again"))
    process.start(); process.join(120)
    assert process.exitcode == 1
    assert (own.checkpoints("avici")/"last.pt").read_bytes() == kept
    pre_train(run, "avici")
    assert digest(run) == digest(whole)


def slowly(run):
    "Pre-train with pauses, to be there for a while."
    from causal_meta.runners import pre_training
    own = pre_training.train_step
    pre_training.train_step = lambda *given, **named: time.sleep(1.5) or own(*given, **named)
    pre_training.pre_train(run, "avici")


def test_two_processes_on_one_run(tmp_path):
    run = create_run(load_config(BASE, name="shared"), tmp_path)
    first = PROCESSES.Process(target=slowly, args=(run,))
    first.start()
    until = time.monotonic() + 60
    while len(read_lines(run.log("pre_training", "avici"))) < 1 and time.monotonic() < until: time.sleep(.05)
    with pytest.raises(InputError, match="another process is pre-training in '.*': wait for it, or end it."): pre_train(run, "avici")
    assert first.is_alive()
    first.kill(); first.join()
    pre_train(run, "avici")  # the lock went with its holder


def test_a_changed_configuration_is_refused_unless_forked(tmp_path):
    run = create_run(load_config(BASE, name="forked"), tmp_path)
    pre_train(run, "avici")
    longer = load_config(BASE, ["pre_training.steps=18", "pre_training.learning_rate=.0005"], name="forked")
    with pytest.raises(InputError, match=r"pre_training.learning_rate was 0.001, is now 0.0005; pre_training.steps was 12, is now 18.*--fork"): create_run(longer, tmp_path)
    run = create_run(longer, tmp_path, fork=True)
    assert run.config.pre_training.steps == 18
    pre_train(run, "avici")
    last = load_checkpoint(run.checkpoints("avici")/"last.pt")
    assert last["step"] == 18 and len(last["facts"]["forked_from"]) == 1
    assert [line["step"] for line in read_lines(run.log("pre_training", "avici"))] == list(range(1, 19))
    net, facts = best_model(run, "avici")
    assert facts["best"]["val_loss"] == min(line["val_loss"] for line in read_lines(run.log("pre_training", "avici")) if "val_loss" in line)
    wider = create_run(load_config(BASE, ["pre_training.steps=20", "models.avici.config.size=small"], name="forked"), tmp_path, fork=True)
    with pytest.raises(InputError, match="a fork may not change the architecture"): pre_train(wider, "avici")


def test_early_stop_is_the_same_after_a_resume(tmp_path):
    "At this rate nothing gets better; the run ends two validations after its best, and a second start knows that it has ended."
    wild = ["pre_training.learning_rate=.3", "pre_training.steps=60", "pre_training.validate_every=2", "pre_training.patience=2"]
    run = create_run(load_config(BASE, wild, name="early"), tmp_path)
    t = pre_train(run, "avici")
    assert t.step < 60 and t.step == t.best["step"] + 4
    before = read_lines(run.log("pre_training", "avici"))
    assert pre_train(run, "avici").step == t.step and read_lines(run.log("pre_training", "avici")) == before


def test_how_the_work_is_done_does_not_change_what_is_learned(tmp_path, whole):
    "Micro-batches give the same curve up to rounding; a TensorBoard log changes nothing at all."
    run = create_run(load_config(BASE, ["pre_training.tensorboard=true"], name="board"), tmp_path)
    pre_train(run, "avici")
    assert digest(run) == digest(whole) and list((run.path/"logs"/"tensorboard"/"avici").glob("events.*"))
    run = create_run(load_config(BASE, ["pre_training.micro_batch=3"], name="micro"), tmp_path)
    pre_train(run, "avici")
    a, b = ([line["loss"] for line in read_lines(r.log("pre_training", "avici"))] for r in (whole, run))
    assert a != b and max(abs(x - y)/abs(x) for x, y in zip(a, b)) < 1e-3


def test_bfloat16_learns_alike(tmp_path, whole):
    run = create_run(load_config(BASE, ["pre_training.precision=bf16"], name="half"), tmp_path)
    t = pre_train(run, "avici")
    assert {p.dtype for p in t.model.parameters()} == {torch.float32}
    a, b = ([line["loss"] for line in read_lines(r.log("pre_training", "avici"))] for r in (whole, run))
    assert a != b and max(abs(x - y)/abs(x) for x, y in zip(a, b)) < .05


@pytest.mark.slow
@pytest.mark.parametrize("model", ["avici", "bcnp"])
def test_compiled_blocks_give_the_same_curve(tmp_path, model):
    config = {**BASE, "models": {model: {"type": model, "config": {"size": "tiny"}}}}
    runs = [create_run(load_config(config, [f"pre_training.compile={word}"], name=f"compile-{word}"), tmp_path) for word in ("false", "true")]
    for run in runs: pre_train(run, model)
    a, b = ([line["loss"] for line in read_lines(r.log("pre_training", model))] for r in runs)
    assert max(abs(x - y)/abs(x) for x, y in zip(a, b)) < 1e-3
    assert load_checkpoint(runs[0].checkpoints(model)/"last.pt")["model_state_dict"].keys() == load_checkpoint(runs[1].checkpoints(model)/"last.pt")["model_state_dict"].keys()



@pytest.mark.parametrize("name", ["exact5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pairs", "bcnp20", "audit"))])
def test_every_shipped_configuration_trains(tmp_path, name):
    "Two steps of the first model at a small size, on the benchmark that the configuration is for."
    config = load_config(name, ["pre_training.steps=2", "pre_training.global_batch=4", "pre_training.rows=12", "pre_training.workers=0", "pre_training.threads=1",
                                "pre_training.checkpoint_every=2", "pre_training.validate_every=2"])
    for model in config.of_kind("amortised"):
        small = load_config(config.model_dump(), [f"models.{model}.config.size=tiny"])
        run = create_run(small, tmp_path/model)
        benchmark = run.benchmark()
        t = begin(small, model, benchmark)
        for step in range(2): train_step(t, MetaIterableDataset(benchmark, global_batch=4).at(step), small.training_of(model))
        assert t.step == 2 and t.usual < 1000
