"""Several ranks of one run as real processes: forked from a warm parent, without a launcher; or this file under torchrun.

A job is JSON: ``values`` (arguments of train.py), ``fault`` (a function below, its rank and its numbers), ``env``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


# ---- faults: called in a rank before its training ----


def raise_after(owner: Any, name: str, calls: int, note: Path, what: Any) -> None:
    """Let the ``calls``-th call of a function do ``what`` first, and write the time of that."""
    original, count = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == calls:
            note.write_text(str(time.time()))
            what()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def boom() -> None:
    raise RuntimeError("boom, said the test")


def sentence() -> None:
    raise ValueError("a sentence for the user")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    time.sleep(7)


WHAT = {each.__name__: each for each in (boom, sentence, die, sleep)}


def slow_loading(note: Path) -> None:
    """Let loading take half a second, and write when it began and ended."""
    from hf_sft.models import loading

    original = loading._load_weights

    def slow(*args: Any) -> Any:
        began = time.time()
        loaded = original(*args)
        time.sleep(0.5)
        with note.open("a") as file:
            file.write(f"{began} {time.time()}\n")
        return loaded

    loading._load_weights = slow


def slow_to_leave(seconds: float) -> None:
    """Let a process need this long to leave the group, as on a busy machine."""
    from hf_sft.training import failures

    original = failures._leave_process_group

    def slow(**options: Any) -> None:
        time.sleep(seconds)
        original(**options)

    failures._leave_process_group = slow


def die_while_tokenising(note: Path) -> None:
    """Be killed when the others wait and two more processes tokenise."""
    import multiprocessing

    from hf_sft.data import pipeline

    original = pipeline._counted

    def dying(chunks: Any, *args: Any) -> Any:
        for rows in original(chunks, *args):
            workers = [child.pid for child in multiprocessing.active_children()]
            (note.parent / "workers").write_text(" ".join(map(str, workers)))
            time.sleep(1.5)
            note.write_text(str(time.time()))
            die()
            yield rows

    pipeline._counted = dying


def install(fault: dict[str, Any]) -> None:
    from hf_sft.collators import CausalCollator
    from hf_sft.data import rows
    from hf_sft.models import loading
    from hf_sft.training.trainer import SFTTrainer

    note = Path(fault["note"])
    if "slow_to_leave" in fault:
        slow_to_leave(fault["slow_to_leave"])
    if fault["what"] == "slow":
        return slow_loading(note)
    if fault["what"] == "die while tokenising":
        return die_while_tokenising(note)
    owner, name = {
        "collator": (CausalCollator, "__call__"),
        "compute_loss": (SFTTrainer, "compute_loss"),
        "loading": (loading, "_load_weights"),
        "tokenising": (rows.RowEncoder, "encode"),
        "saving": (SFTTrainer, "_save"),
    }[fault["where"]]
    return raise_after(owner, name, fault.get("calls", 1), note, WHAT[fault["what"]])


def train(job: dict[str, Any]) -> int:
    """One rank."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import runs

    from hf_sft.cli import main

    if "ddp_timeout" in job["values"]:  # transformers leaves it out on CPUs
        import torch.distributed.distributed_c10d as backend

        backend.default_pg_timeout = timedelta(seconds=job["values"]["ddp_timeout"])
    fault = job.get("fault")
    if fault is not None and int(os.environ["RANK"]) in fault["ranks"]:
        install(fault)
    return main(["train", *runs.words(job["values"])])


# ---- forking ----


def serve() -> None:
    """Import everything once, then fork the ranks of each job that stdin brings; answer with exit codes and seconds."""
    import torch  # noqa: F401

    import hf_sft.commands.train
    import hf_sft.tasks  # noqa: F401

    for line in sys.stdin:
        ranks: dict[int, tuple[int, int]] = {}  # process -> (job, rank)
        jobs = json.loads(line)
        for number, job in enumerate(jobs):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            ranks |= {_fork(job, rank, port): (number, rank) for rank in range(job["processes"])}
        ended: list[dict[int, tuple[int, float]]] = [{} for _ in jobs]
        while ranks:
            pid, status = os.waitpid(-1, 0)
            if pid in ranks:
                number, rank = ranks.pop(pid)
                ended[number][rank] = (os.waitstatus_to_exitcode(status), time.time())
        print(json.dumps([[each[rank] for rank in sorted(each)] for each in ended]), flush=True)


def _fork(job: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"]),
            "LOCAL_WORLD_SIZE": str(job["processes"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **job["env"],
        }  # fmt: skip
        if job.get("own_cache"):
            os.environ["HF_SFT_CACHE"] += f"-{rank}"
        log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            code = train(job)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class Forks:
    """A warm parent, as a process of its own; see :func:`serve`."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, values: dict[str, Any], **job: Any) -> Ended:
        """Train in ``processes`` (2) ranks."""
        return self.run_all([{"folder": folder, "values": values, **job}])[0]

    def run_all(self, jobs: list[dict[str, Any]]) -> list[Ended]:
        """Several trainings at the same time."""
        assert self.process.stdin is not None and self.process.stdout is not None
        requests = []
        for job in jobs:
            folder = job["folder"]
            env = {"HF_SFT_CACHE": str(folder / "cache"), **job.get("env", {})}
            requests.append({"processes": 2, **job, "folder": str(folder), "log": str(folder / "log"), "env": env})
        self.process.stdin.write(json.dumps(requests) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the parent of the ranks has ended"
        found = []
        for request, ranks in zip(requests, json.loads(answer), strict=True):
            codes, times = zip(*ranks, strict=True)
            output = [Path(f"{request['log']}.{rank}").read_text() for rank in range(len(ranks))]
            found.append(Ended(list(codes), list(times), output))
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Ended:
    """Exit codes, times of the end (seconds since the epoch) and output of all ranks."""

    def __init__(self, codes: list[int], times: list[float], output: list[str]) -> None:
        self.codes, self.times, self.output = codes, times, output


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        sys.exit(train(json.loads(sys.argv[1])))
