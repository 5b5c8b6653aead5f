"""Real sharded checkpoints of tiny models, written by two gloo processes under torchrun.

    sharded_checkpoints.py FOLDER ENGINE      zero2 (of one kind zero1), zero3 or fsdp; one folder per kind of model

Beside each checkpoint lies ``whole``: the same weights, gathered and written by save_pretrained.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import tiny_model, tiny_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full tied": {"tied": True},
    "lora": {"lora": {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}},
    "lora tied rows dora": {
        "tied": True,
        "lora": {"use_dora": True, "trainable_token_indices": {"embed_tokens": [3, 258]}},
    },
    "lora saved all": {"lora": {"bias": "all", "modules_to_save": ["lm_head", "norm"]}},
}


def build(kind: str, folder: Path) -> Any:
    """The model, or the adapter on its base, the same on every rank; the base is written once."""
    values = KINDS[kind]
    model: Any = tiny_model("qwen2", tie_word_embeddings=values.get("tied", False))
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "base")
        tiny_tokenizer().save_pretrained(folder / "base")
    dist.barrier()
    if "lora" not in values:
        return model
    from peft import LoraConfig, get_peft_model

    model.name_or_path = str(folder / "base")
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **values["lora"]))


def one_step(model: Any, step: Any) -> None:
    ids = torch.randint(259, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    step(model(input_ids=ids, labels=ids, use_cache=False).loss)


def write_whole(model: Any, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "whole", state_dict=state)
        tiny_tokenizer().save_pretrained(folder / "whole")
        for name in ("config.json", "adapter_config.json"):
            if (folder / "whole" / name).exists():
                (folder / name).write_text((folder / "whole" / name).read_text())
        tiny_tokenizer().save_pretrained(folder)
    dist.barrier()


def zero(folder: Path, kind: str, stage: int) -> None:
    import deepspeed

    model = build(kind, folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=1e-2), config=settings)

    def step(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    one_step(engine, step)
    for name, left_out in (("checkpoint-1", True), ("checkpoint-2", False)):
        engine.save_checkpoint(str(folder / name), tag="global_step1", exclude_frozen_parameters=left_out)
    with gathered(model, stage):
        write_whole(model, folder)


@contextmanager
def gathered(model: Any, stage: int) -> Iterator[None]:
    if stage < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


def fsdp(folder: Path, kind: str) -> None:
    """As accelerate saves them: whole models and adapters alone, in a folder and in a file."""
    import torch.distributed.checkpoint as dcp
    from peft import PeftModel, get_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model = build(kind, folder)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()

    one_step(model, step)
    adapter = isinstance(model, PeftModel)
    part = get_peft_model_state_dict(model) if adapter else get_model_state_dict(model)
    dcp.save({"model": part}, storage_writer=dcp.FileSystemWriter(folder / "checkpoint-1" / "pytorch_model_fsdp_0"))
    dcp.save(
        {"model": get_model_state_dict(model)},
        storage_writer=dcp.FileSystemWriter(folder / "checkpoint-2" / "pytorch_model_fsdp_0"),
    )
    for name, frozen in (("checkpoint-3", True), ("checkpoint-4", False)):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=frozen)
        state = get_model_state_dict(model, options=options)
        (folder / name).mkdir(exist_ok=True)
        if dist.get_rank() == 0:
            torch.save(state, folder / name / "pytorch_model_fsdp.bin")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not adapter and model.config.tie_word_embeddings:
        whole.pop("lm_head.weight", None)  # there are no longer two names of one tensor, but two tensors
    write_whole(model, folder, whole)


if __name__ == "__main__":
    where, name = Path(sys.argv[1]), sys.argv[2]
    if name == "fsdp":
        dist.init_process_group("gloo")
    else:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    for number, one in enumerate(KINDS):
        case = where / str(number)
        stage = 1 if name == "zero2" and one == "full tied" else int(name[-1]) if name != "fsdp" else 0
        fsdp(case, one) if name == "fsdp" else zero(case, one, stage)
    (where / f"done-{dist.get_rank()}").touch()
    dist.barrier()
    dist.destroy_process_group()
