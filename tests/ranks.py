"Several processes as the ranks of one job."
import multiprocessing
import os
import socket
import time
from queue import Empty

import torch

from causal_meta.runners.distributed import Rank

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["causal_meta.runners.evaluation"])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(target, world, *args, timeout=240):
    "Run `target(rank, queue, *args)` in `world` processes, and give back what each put into the queue, by rank."
    queue, env = PROCESSES.Queue(), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    members = [PROCESSES.Process(target=_member, args=(target, Rank(r, r, world), env, queue, args)) for r in range(world)]
    for p in members: p.start()
    found, until = {}, time.monotonic() + timeout
    while len(found) < world and time.monotonic() < until and not any(p.exitcode for p in members):
        try: found |= [queue.get(timeout=.2)]
        except Empty: pass
    for p in members: p.join(timeout)
    assert [p.exitcode for p in members] == [0]*world
    return [found[r] for r in range(world)]


def _member(target, rank, env, queue, args):
    os.environ |= env
    torch.set_num_threads(1)
    queue.put((rank.rank, target(rank, *args)))
