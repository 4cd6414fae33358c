"The train stream is the same under any number of ranks and loader workers, and goes on after an interruption where it stopped."
import hashlib

import pytest
import torch
from torch.utils.data import DataLoader

from causal_meta.datasets.benchmarks import load_benchmark
from causal_meta.datasets.randomness import key
from causal_meta.datasets.schema import Benchmark
from causal_meta.datasets.streams import MetaIterableDataset, standardise, validation_batches
from causal_meta.datasets.tasks import MetaFixedDataset, draw_task
from causal_meta.datasets.validation import InputError, parse

LINEAR = {"graph": {"type": "er", "edges_per_node": 1}, "mechanism": {"type": "linear", "noise_scale": "per_row"}}
NEURAL = {"graph": {"type": "sf", "m": 1}, "mechanism": {"type": "neural_net"}}
ABOUT = {"tasks": 3, "factor": "in distribution", "why": "It is a train family."}


def make(**changes) -> Benchmark:
    "A benchmark of several families and sizes, with interventional rows."
    values = {"name": "stream-v1", "version": 1, "description": "For the tests of streams.", "validation": 20,
              "train": {"families": {"linear": {"weight": 2, "scm": LINEAR}, "neural": {"scm": NEURAL}}, "d": [3, 5], "n": [20, 33], "size_block": 32,
                        "interventional_rows": {"tasks": .5, "rows": .3}},
              "test": {"id/linear": {"scm": LINEAR, "d": 4, "n": 30, **ABOUT}, "id/neural": {"scm": NEURAL, "d": 3, "n": 30, **ABOUT}},
              "n_test": 25, "interventions": {"targets": "each", "pairs": 1, "rows": 10}, "seeds": {"train": 1, "validation": 1, "test": {"a": 1, "b": 1}}}
    return parse(Benchmark, values | changes, "stream-v1")


BENCHMARK, BATCH, STEPS = make(generator="pcg64"), 16, 125  # 2000 tasks; 10,000 under scripts/test --all


@pytest.fixture(autouse=True)
def one_thread():
    "Small tensors: on a busy machine threads only wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def content(batch) -> bytes:
    "All that is in a batch, as bytes."
    return b"".join(t.contiguous().numpy().tobytes() for t in (batch.data, batch.graphs, batch.intervened, batch.node_mask)) + repr(batch.keys).encode()


def content_of(batch, b: int) -> bytes:
    "All that is in one task, as bytes."
    return b"".join(getattr(batch, name)[b].contiguous().numpy().tobytes() for name in ("data", "graphs", "intervened")) + repr(batch.keys[b]).encode()


def digest(batches) -> str:
    "One hash of the tasks of a step of one size, whichever way they are divided."
    joined = [torch.cat([getattr(b, name) for b in batches]) for name in ("data", "graphs", "intervened", "node_mask")]
    keys = [k for b in batches for k in b.keys]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in joined) + repr(keys).encode()).hexdigest()


def stream_digests(ranks: int, workers: int, start: int = 0, steps: int = STEPS, batch: int = BATCH) -> list[str]:
    "The hash of each global step, from as many loaders as there are ranks."
    loaders = [DataLoader(MetaIterableDataset(BENCHMARK, global_batch=batch, rank=r, world_size=ranks, start=start), batch_size=None, num_workers=workers)
               for r in range(ranks)]
    return [digest([part for share in shares for part in share]) for _, *shares in zip(range(steps), *loaders)]


@pytest.fixture(scope="module")
def plain() -> list[str]:
    torch.set_num_threads(1)
    return stream_digests(1, 0)


@pytest.mark.parametrize("ranks, workers", [(1, 3), (2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_elastic_determinism(plain, ranks, workers):
    assert stream_digests(ranks, workers) == plain
    assert len(set(plain)) == STEPS, "two steps with the same tasks"


@pytest.mark.slow
def test_elastic_determinism_of_ten_thousand_tasks():
    plain = stream_digests(1, 0, steps=625)
    assert len(set(plain)) == 625
    for ranks, workers in [(1, 3), (2, 2), (4, 1)]: assert stream_digests(ranks, workers, steps=625) == plain


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 1), (4, 0)])
def test_steps_of_several_sizes(plain, ranks, workers):
    "A global batch of two blocks: the same tasks in the same order, cut into parts of one size wherever ranks are cut."
    def tasks(world, loaders):
        for _, *shares in zip(range(10), *loaders):
            for part in (p for share in shares for p in share):
                assert part.node_mask.all(), "padding"
                yield from (content_of(part, b) for b in range(len(part)))
    def loaders(batch, world, workers):
        return [DataLoader(MetaIterableDataset(BENCHMARK, global_batch=batch, rank=r, world_size=world), batch_size=None, num_workers=workers) for r in range(world)]
    small = [t for step in range(40) for part in MetaIterableDataset(BENCHMARK, global_batch=16).at(step) for t in (content_of(part, b) for b in range(len(part)))]
    assert list(tasks(ranks, loaders(64, ranks, workers))) == small
    assert len({p.data.shape for step in range(10) for p in MetaIterableDataset(BENCHMARK, global_batch=64).at(step)}) == 4


def test_threads(plain):
    torch.set_num_threads(2)
    assert stream_digests(1, 0, steps=2) == plain[:2]


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 2)])
def test_resume_continues(plain, ranks, workers):
    assert stream_digests(ranks, workers, start=57, steps=6) == plain[57:63]


def test_state(plain):
    stream = MetaIterableDataset(BENCHMARK, global_batch=BATCH)
    steps = iter(stream)
    for _ in range(7):
        next(steps)
        stream.advance()
    state = stream.state_dict()
    assert state["step"] == 7
    assert digest(next(steps)) == plain[7], "advance must not disturb a running iterator"
    fresh = MetaIterableDataset(BENCHMARK, global_batch=BATCH)
    fresh.load_state_dict(state)
    assert digest(next(iter(fresh))) == plain[7]


@pytest.mark.parametrize("other", [{"global_batch": 32}, {"training_seed": 1}, {"benchmark": make(validation=21, generator="pcg64")}])
def test_state_of_another_stream(other):
    state = MetaIterableDataset(BENCHMARK, global_batch=BATCH).state_dict()
    stream = MetaIterableDataset(**{"benchmark": BENCHMARK, "global_batch": BATCH, **other})
    with pytest.raises(InputError, match="cannot be resumed"): stream.load_state_dict(state)


@pytest.mark.parametrize("wrong, says", [({"global_batch": 24}, "divisor or a multiple of its size_block, 32"), ({"global_batch": 0}, "divisor"), ({"global_batch": 16, "world_size": 3}, "multiple of the number of processes, 3"),
                                         ({"global_batch": 16, "rank": 2, "world_size": 2}, "from 0 to 1"), ({"global_batch": 16, "split": "trian"}, "did you mean 'train'")])
def test_refused(wrong, says):
    with pytest.raises(InputError, match=says): MetaIterableDataset(BENCHMARK, **wrong)


def test_global_random_numbers_are_left_alone():
    import random

    import numpy as np
    torch.manual_seed(0)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    MetaIterableDataset(BENCHMARK, global_batch=BATCH).at(0)
    draw_task(BENCHMARK, "id/neural", 0)
    assert before[0].equal(torch.random.get_rng_state()) and (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


def test_splits_cannot_collide():
    "All root seeds of this benchmark are equal, and still no two splits share a key or a task."
    splits = ["train/0", "train/1", "validation", "test/a", "test/b"]
    keys = {key(1, split, family, i, purpose) for split in splits for family in ("linear", "id/linear") for i in range(50) for purpose in ("graph", "noise/train")}
    assert len(keys) == len(splits)*2*50*2
    rows = set()
    batches = [MetaIterableDataset(BENCHMARK, split, global_batch=32, training_seed=seed).at(0) for split, seed in (("train", 0), ("train", 1), ("validation", 0))]
    for (batch,) in batches: rows |= {x.numpy().tobytes() for x in batch.data}
    tasks = [task for s in ("a", "b") for task in MetaFixedDataset(BENCHMARK, s)]
    rows |= {task.data.numpy().tobytes() for task in tasks}
    assert len(rows) == 3*32 + len(tasks)


def test_families_do_not_share_graphs():
    twice = make(test={name: {"scm": LINEAR, "d": 8, "n": 20, "tasks": 20, "factor": "none", "why": "The same family under two names."} for name in ("id/one", "id/two")})
    graphs = [task.graph.numpy().tobytes() for task in MetaFixedDataset(twice)]
    assert len(set(graphs)) == 40


def test_validation_is_fixed_and_sees_every_size():
    first, again = validation_batches(BENCHMARK), validation_batches(BENCHMARK)
    assert [content(b) for b in first] == [content(b) for b in again]
    assert {tuple(b.data.shape[1:]) for b in first} == {(n, d) for n in (20, 33) for d in (3, 5)}
    assert sorted(k[2] for b in first for k in b.keys) == list(range(20))


def test_test_tasks():
    for task in MetaFixedDataset(BENCHMARK):
        d = task.graph.shape[0]
        assert task.data.mean(0).abs().max() < 1e-5 and (task.data.std(0, correction=0) - 1).abs().max() < 1e-4
        assert task.held_out.shape == (25, d) and len(task.interventional) == d + 1 and not task.intervened.any()
        for s in task.interventional:
            assert (s.rows[:, s.targets] == s.values).all() and s.intervened.all(0).nonzero().flatten().tolist() == s.targets
        overlap = {x.numpy().tobytes() for x in task.data} & {x.numpy().tobytes() for x in task.held_out}
        assert not overlap, "held-out rows among those given to the method"


def test_far_ahead(plain):
    "Ten million steps further, and back: nothing is replayed."
    stream = MetaIterableDataset(BENCHMARK, global_batch=BATCH)
    stream.advance(10_000_000)
    assert next(iter(stream))[0].keys[0][2] == 160_000_000 and stream.state_dict()["step"] == 10_000_000
    stream.advance(-10_000_000)
    assert digest(next(iter(stream))) == plain[0]


def test_both_generators():
    "The tasks of the two generators are different, and each is the same in any batch."
    old = MetaIterableDataset(make(), global_batch=BATCH).at(0)[0]
    assert not old.data.equal(MetaIterableDataset(BENCHMARK, global_batch=BATCH).at(0)[0].data)
    halves = [MetaIterableDataset(make(), global_batch=BATCH, rank=r, world_size=2).at(0)[0] for r in (0, 1)]
    assert digest([old]) == digest(halves)


def test_number_of_held_out_rows_leaves_data_alone():
    assert draw_task(make(n_test=50, generator="pcg64"), "id/linear", 1).fingerprint == draw_task(BENCHMARK, "id/linear", 1).fingerprint


def test_not_standardised_where_the_benchmark_says_so():
    raw, z = draw_task(make(standardise_input=False, generator="pcg64"), "id/linear", 0), draw_task(BENCHMARK, "id/linear", 0)
    assert raw.mean.eq(0).all() and raw.sd.eq(1).all()
    assert torch.allclose(raw.data, z.data*z.sd + z.mean, atol=1e-4) and torch.allclose(raw.held_out, z.held_out*z.sd + z.mean, atol=1e-4)


def test_standardise_is_per_task():
    scales = torch.tensor([1., 100.])[:, None, None]
    x = torch.randn(2, 200, 3, generator=torch.Generator().manual_seed(0))*scales
    z = standardise(x)[0]
    assert (z.std(1, correction=0) - 1).abs().max() < 1e-4, "a batch must not be standardised as one"
    assert standardise(torch.full((10, 2), 1e6))[0].eq(0).all()
    assert standardise(x[0], torch.ones(200, 3, dtype=torch.bool))[0].isfinite().all(), "every entry was set"


def test_smoke_stream_has_one_size():
    benchmark = load_benchmark("smoke-v1")
    assert {tuple(MetaIterableDataset(benchmark, global_batch=64).at(s)[0].data.shape) for s in range(3)} == {(64, 100, 5)}
