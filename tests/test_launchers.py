"""Each launcher really trains on two CPU processes and gives the loss of one; finetune.sh, the batch script, wrong input."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from hf_sft.launchers import from_launcher

ROOT = runs.ROOT
DEEPSPEED = sorted((ROOT / "train_args" / "deepspeed").glob("*.json"))
FSDP = sorted((ROOT / "train_args" / "fsdp").glob("*.json"))
FINETUNE = str(ROOT / "examples" / "finetune.sh")
STEPS = 3
SAME = 1e-6


# --- what accelerate launch says --------------------------------------------------------------------------------------

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_MIXED_PRECISION": "no"}
SHARD = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
}


def test_accelerate_launch_becomes_arguments():
    nvme = {
        f"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_{key}": value for key, value in (("DEVICE", "nvme"), ("NVME_PATH", "/d"))
    }
    more = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}
    found, notes, problems = from_launcher({}, {**ZERO, **nvme, **more, "ACCELERATE_MIXED_PRECISION": "bf16"})
    wanted = {"bf16": True, "zero_stage": 3, "offload_param": "nvme", "nvme_path": "/d"}
    assert found == {**wanted, "gradient_accumulation_steps": 4, "max_grad_norm": 0.5}
    assert (len(notes), problems) == (6, [])
    file = {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero2.json"}
    assert from_launcher({}, file) == (
        {"deepspeed": "zero2.json"},
        ["accelerate launch asks for deepspeed 'zero2.json'"],
        [],
    )
    layers = {**SHARD, "FSDP_TRANSFORMER_CLS_TO_WRAP": "A,B", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    assert from_launcher({}, layers)[0]["fsdp_config"] == {
        "version": 2,
        "cpu_offload": False,
        "reshard_after_forward": True,
        "transformer_layer_cls_to_wrap": ["A", "B"],
        "activation_checkpointing": True,
    }


def test_accelerate_launch_does_not_win_over_the_arguments():
    assert from_launcher({"zero_stage": 3}, ZERO) == ({}, [], [])
    found, _, (problem,) = from_launcher({"zero_stage": 2}, ZERO)
    assert (found, problem) == ({}, "zero_stage is 2, and accelerate launch says 3: say it in one place")
    steps = {**ZERO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    assert from_launcher({"gradient_accumulation_steps": 2, "zero_stage": 3}, steps)[2] == [
        "gradient_accumulation_steps is 2, and accelerate launch says 4: say it in one place"
    ]
    own = {"reshard_after_forward": False}
    found, notes, problems = from_launcher({"fsdp": True, "fsdp_config": own}, SHARD)
    assert (found, notes, problems) == ({}, ["fsdp_config is the run's own, not that of accelerate launch"], [])


def test_accelerate_launch_says_what_is_not_done():
    assert "mixed_precision fp8" in from_launcher({}, {"ACCELERATE_MIXED_PRECISION": "fp8"})[2][0]
    assert "megatron_lm" in from_launcher({}, {"ACCELERATE_USE_MEGATRON_LM": "true"})[2][0]
    one = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}
    assert any("starts one process" in note for note in from_launcher({}, one)[1])
    assert from_launcher({}, {**one, "RANK": "0"})[1] == ["accelerate launch asks for use_cpu True"]
    efficient = {**SHARD, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    assert any("max_loading_processes" in note for note in from_launcher({}, efficient)[1])
    assert from_launcher({}, {}) == ({}, [], [])


# --- finetune.sh and the batch script ---------------------------------------------------------------------------------


def shell(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("CUDA_VISIBLE_DEVICES", "MASTER_PORT", "MASTER_ADDR")
    }
    return subprocess.run([FINETUNE, *words], env={**clean, **environment}, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(
    "words, environment, told",
    [
        ("", {}, "no model is named: -m MODEL"),
        ("-m m", {}, "no data are named: -d DATA"),
        ("-m m -d", {}, "-d needs a value after it"),
        ("-m -d d", {}, "-m needs a value after it"),
        ("-m m -d d -x 1", {}, "-x is no option"),
        ("-m m -d d --deepspeed nothing.json", {}, "--deepspeed is nothing.json, and there is no such file"),
        ("-m m -d d --fsdp true", {}, "--fsdp is true, and there is no such file"),
        ("-m m -d d", {"GPUS_PER_NODE": "two"}, "GPUS_PER_NODE is two: it must be a whole number, at least 1"),
        ("-m m -d d", {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK is 2 and NNODES is 2: ranks are 0 to 1"),
    ],
)
def test_finetune_refuses_with_a_sentence(words, environment, told):
    done = shell(*words.split(), **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {told}" + done.stderr[len(f"error: {told}") :]
    assert done.stderr.count("\n") == 1


def test_finetune_shows_its_usage():
    done = shell("-h")
    assert (done.returncode, done.stderr) == (0, "")
    for name in (
        "--deepspeed",
        "--fsdp",
        "--use_lora",
        "--q_lora",
        "--cpu",
        "GPUS_PER_NODE",
        "NNODES",
        "NODE_RANK",
        "MASTER_PORT",
    ):
        assert name in done.stdout


def test_finetune_hands_everything_to_torchrun():
    zero, shard = str(DEEPSPEED[3]), str(FSDP[0])
    done = shell("-m", "m", "--data=my data", "--deepspeed", zero, "--q_lora", "True", "--weight_decay", "-1", PYTHON="echo",
                 GPUS_PER_NODE="8", NNODES="2", NODE_RANK="1", MASTER_ADDR="head", MASTER_PORT="7000")  # fmt: skip
    launcher, _, rest = done.stdout.strip().partition(f"{Path(FINETUNE).parent}/../train.py ")
    assert launcher == (
        "-m torch.distributed.run --nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr head --master_port 7000 "
    )
    more = f"--deepspeed {zero} --q_lora True --weight_decay -1"
    assert rest == f"{more} --model_name_or_path m --train_file my data --output_dir output/finetune"
    done = shell("--train_args_file", "run.json", "--cpu", "--fsdp", shard, PYTHON="echo")
    assert "--nproc_per_node 1 --nnodes 1 --node_rank 0 --master_addr localhost --master_port 6001" in done.stdout
    assert done.stdout.strip().endswith(
        f"train.py --fsdp true --fsdp_config {shard} --train_args_file run.json --use_cpu true"
    )
    assert "--nproc_per_node 3 " in shell("-m", "m", "-d", "d", PYTHON="echo", CUDA_VISIBLE_DEVICES="0,2,5").stdout


@pytest.mark.parametrize("script", ["examples/finetune.sh", "examples/slurm/finetune.sbatch"])
def test_scripts_are_valid_shell(script):
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- real processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Model, data and a cache for all runs of this file."""
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def base(folder) -> dict[str, Any]:
    """A run of two processes; its file is ``run.json``, for the launchers."""
    values = runs.arguments(folder, max_steps=STEPS, warmup_steps=0, per_device_train_batch_size=1)
    values["data_cache_dir"] = str(folder / "cache")
    (folder / "run.json").write_text(json.dumps({key: value for key, value in values.items() if key != "output_dir"}))
    return values


@pytest.fixture(scope="module")
def one_process(base, folder) -> dict[str, list[float]]:
    """Losses of one process, for full training and LoRA."""
    found = {}
    for mode in ("full", "lora"):
        values = {
            **base,
            "per_device_train_batch_size": 2,
            "train_mode": mode,
            "output_dir": str(folder / f"one-{mode}"),
        }
        found[mode] = runs.history(runs.train(values))
    assert len(found["full"]) == STEPS
    assert found["full"][-1] < found["full"][0] - 0.1
    return found


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=_environment(**environment), capture_output=True, text=True, timeout=180
    )


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": python, "PYTHON": sys.executable, **more}


def assert_same(done: subprocess.CompletedProcess[str], output: Path, wanted: list[float]) -> None:
    """Judged by the result: gloo may abort when processes leave."""
    assert (output / "trainer_state.json").is_file(), done.stdout[-2000:] + done.stderr[-4000:]
    assert runs.history(output) == pytest.approx(wanted, abs=SAME)
    assert list(output.glob("*.safetensors"))
    args = json.loads((output / "args.json").read_text())
    assert args["run"]["processes"] == 2


@pytest.mark.slow
def test_torchrun_with_the_ready_files(base, folder, one_process):
    pytest.importorskip("deepspeed")
    files = [*FSDP[:2], DEEPSPEED[1], DEEPSPEED[3]]  # DeepSpeed last: it stays in a process
    engines: dict[str, dict[str, Any]] = {"plain": {}}
    for path in files:
        engines[path.stem] = {"fsdp": True, "fsdp_config": str(path)} if path in FSDP else {"deepspeed": str(path)}
    several = [{**base, **engine, "output_dir": str(folder / name)} for name, engine in engines.items()]
    (folder / "several.json").write_text(json.dumps(several))
    done = runs.launch([str(ROOT / "tests" / "engine_runs.py"), str(folder / "several.json")], 2)
    assert list(engines) == ["plain", "full_shard", "full_shard_offload", "zero2", "zero3"]
    for name in engines:
        assert_same(done, folder / name, one_process["full"])


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device, which processes take unasked")
def test_processes_meet_on_a_machine_without_a_gpu(base, folder, one_process):
    """Nobody has said use_cpu: without a word accelerate connects none, and each would train alone and write where all write."""
    output = folder / "unsaid"
    values = {key: value for key, value in base.items() if key != "use_cpu"} | {"output_dir": str(output)}
    done = runs.train_process(values, 2)
    assert_same(done, output, one_process["full"])
    assert "2 processes, DDP, on cpu" in done.stderr


def test_processes_that_nothing_connects_are_refused(monkeypatch):
    """As on a device of a kind for which accelerate has no backend."""
    from hf_sft.training_arguments import refuse_unconnected

    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"the launcher has started 2 processes \(WORLD_SIZE\), and nothing connects them"
    ):
        refuse_unconnected(1)
    refuse_unconnected(2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_unconnected(1)


@pytest.mark.slow
@pytest.mark.parametrize("local_rank", [True, False], ids=["local_rank", "no_local_rank"])
def test_the_deepspeed_launcher(base, folder, one_process, local_rank):
    pytest.importorskip("deepspeed")
    output = folder / f"deepspeed-{local_rank}"
    command = [
        "deepspeed",
        "--num_gpus",
        "2",
        "--master_port",
        free_port(),
        *([] if local_rank else ["--no_local_rank"]),
        "train.py",
    ]
    command += [str(folder / "run.json"), "--zero_stage", "2", "--output_dir", str(output)]
    done = start(command, DS_ACCELERATOR="cpu")
    assert ("--local_rank=1" in done.stdout + done.stderr) is local_rank
    assert_same(done, output, one_process["full"])


ACCELERATE = "compute_environment: LOCAL_MACHINE\nmachine_rank: 0\nnum_machines: 1\nnum_processes: 2\nuse_cpu: false\n"
ACCELERATE_CONFIGS = {
    "MULTI_GPU": "mixed_precision: 'no'\n",
    "DEEPSPEED": """\
mixed_precision: 'no'
deepspeed_config:
  zero_stage: 3
  gradient_accumulation_steps: 1
  gradient_clipping: 1.0
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: true
  zero3_save_16bit_model: true
""",
    "FSDP": """\
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_offload_params: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: true
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ACCELERATE_CONFIGS)
def test_accelerate_launch(base, folder, one_process, kind):
    if kind == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    output, config = folder / f"accelerate-{kind}", folder / f"accelerate-{kind}.yaml"
    config.write_text(f"{ACCELERATE}distributed_type: {kind}\n{ACCELERATE_CONFIGS[kind]}")
    command = ["accelerate", "launch", "--config_file", str(config), "--main_process_port", free_port(), "train.py"]
    done = start(
        [
            *command,
            str(folder / "run.json"),
            "--output_dir",
            str(output),
            "--save_strategy",
            "steps",
            "--save_steps",
            "2",
        ]
    )
    assert_same(done, output, one_process["full"])
    args = json.loads((output / "args.json").read_text())
    assert bool(args["training"]["deepspeed"]) is (kind == "DEEPSPEED")
    assert bool(args["training"]["fsdp"]) is (kind == "FSDP")
    assert (output / "checkpoint-2").is_dir()


@pytest.mark.slow
def test_finetune_with_lora_and_deepspeed(base, folder, one_process):
    pytest.importorskip("deepspeed")
    output = folder / "finetune"
    command = [
        FINETUNE,
        "-m",
        base["model_name_or_path"],
        "-d",
        base["train_file"],
        "-o",
        str(output),
        "--cpu",
        "--use_lora",
        "True",
    ]
    command += ["--deepspeed", str(DEEPSPEED[1]), "--train_args_file", str(folder / "run.json")]
    done = start(command, GPUS_PER_NODE="2", MASTER_PORT=free_port())
    assert_same(done, output, one_process["lora"])
    assert (output / "adapter_model.safetensors").is_file()


STAND_INS = {  # a cluster of two nodes in one folder: the parts of Slurm that the batch script calls
    "scontrol": """\
echo "scontrol $*" >>"$CLUSTER/calls"
[ "$1" != show ] || printf 'localhost\\nlocalhost\\n'
""",
    "srun": """\
echo "srun $*" >>"$CLUSTER/calls"
while [[ $1 == --* ]]; do shift; done
trap 'kill -KILL $(cat "$CLUSTER/tasks"); exit 1' TERM
: >"$CLUSTER/tasks"
code=0
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    echo $! >>"$CLUSTER/tasks"
done
for task in $(cat "$CLUSTER/tasks"); do wait "$task" || code=$?; done
exit $code
""",
    "scancel": """\
echo "scancel $*" >>"$CLUSTER/calls"
for task in $(cat "$CLUSTER/tasks"); do kill -TERM "$task" $(cat "/proc/$task/task/$task/children"); done
""",
}


def submit(folder: Path, words: list[str]) -> subprocess.Popen[str]:
    """Run the batch script as Slurm would on two nodes."""
    slurm = {"SUBMIT_DIR": str(ROOT), "JOB_NODELIST": "node[1-2]", "JOB_NUM_NODES": "2", "JOB_ID": "77"}
    environment = {f"SLURM_{key}": value for key, value in slurm.items()}
    environment |= {"MASTER_PORT": free_port(), "GPUS_PER_NODE": "1", "CLUSTER": str(folder)}
    environment = _environment(**environment)
    environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
    script = ROOT / "examples" / "slurm" / "finetune.sbatch"
    with open(folder / "log", "a") as log:
        return subprocess.Popen(
            ["bash", str(script), *words], env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
        )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="the stand-in for scancel finds child processes in /proc")
def test_the_batch_script_trains_on_two_nodes_and_goes_on_after_a_stop(base, folder, one_process, tmp_path):
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text("#!/usr/bin/env bash\n" + text)
        (tmp_path / name).chmod(0o755)
    output, log, steps = tmp_path / "out", tmp_path / "log", 120
    words = ["-m", base["model_name_or_path"], "-d", base["train_file"], "-o", str(output), "--cpu"]
    words += [
        "--train_args_file",
        str(folder / "run.json"),
        "--max_steps",
        str(steps),
        "--lr_scheduler_type",
        "constant",
    ]
    job = submit(tmp_path, words)
    deadline = time.monotonic() + 90
    while " loss=" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0, log.read_text()[-3000:]  # the stand-in's scontrol requeue
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "scontrol show hostnames node[1-2]"
    assert calls[1].startswith("srun --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 ")
    assert calls[2:] == ["scancel --signal=TERM 77", "scontrol requeue 77"]
    (checkpoint,) = output.glob("checkpoint-*")
    done = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 0 < done < steps
    assert not list(output.glob("*.safetensors")), "the first part has written no final model"

    job = submit(tmp_path, words)
    assert job.wait(90) == 0, log.read_text()[-3000:]
    assert (tmp_path / "calls").read_text().splitlines()[4:] == [*calls[:2]]
    assert len(runs.history(output)) == steps
    assert runs.history(output)[:2] == pytest.approx(one_process["full"][:2], abs=SAME)  # then learning rates differ
    assert list(output.glob("*.safetensors"))
