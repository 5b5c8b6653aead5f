"""What a step must not cost: waits for the device in a micro-batch, more than one clipping, an optimizer tensor by tensor."""

from __future__ import annotations

import collections
import contextlib

import pytest
import tiny
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sft import losses
from hf_sft.arguments import DataArguments, WeDLMArguments
from hf_sft.training.dpo import DPOTrainer
from hf_sft.training.trainer import SFTTrainer
from hf_sft.training_arguments import TrainingArguments

# Operations whose result the host has to read, or whose shape depends on values: on an accelerator they wait for it.
WAITS = {
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "unique2",
    "_unique2",
    "repeat_interleave",
}


class Operations(TorchDispatchMode):
    """Names of the operations that run, and waits among them."""

    def __init__(self):
        super().__init__()
        self.names, self.waits = collections.Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names[name] += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1] or ()
        )
        if by_mask or (name in WAITS and not (name == "repeat_interleave" and isinstance(args[-1], int))):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


class Counted:
    """Watches each micro-batch, each clipping and each step of the optimizer of the trainer that it is put before."""

    def __init__(self, *args, **kwargs):
        self.micro_batches, self.optimizer_steps, self.clippings = [], [], 0
        super().__init__(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        with Operations() as seen:
            loss = super().training_step(*args, **kwargs)
        self.micro_batches.append(seen)
        return loss

    def _clip_grad_norm(self, *args, **kwargs):
        self.clippings += 1
        return super()._clip_grad_norm(*args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        step = optimizer.step

        def counted(*a, **k):
            with Operations() as seen:
                result = step(*a, **k)
            self.optimizer_steps.append(seen)
            return result

        optimizer.step = counted
        return optimizer


class CountedSFT(Counted, SFTTrainer):
    pass


class CountedDPO(Counted, DPOTrainer):
    pass


def test_what_is_counted_on_the_host_goes_to_the_device_without_a_wait(monkeypatch, tmp_path):
    """Totals of an optimizer step, by the way that does not wait; a plain copy would, for all that the device has still to do."""
    from hf_sft.training import bin_trainer

    sent = []
    send = bin_trainer.sent_to
    monkeypatch.setattr(bin_trainer, "sent_to", lambda made, device: sent.append(made.dtype) or send(made, device))
    trainer = SFTTrainer(
        tiny.tiny_model(), TrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none"),
        train_dataset=[{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8, data_args=DataArguments(max_seq_length=8),
    )  # fmt: skip
    trainer.train()
    assert sent == [torch.float64] * 2


class Awake:
    """CUDA raises where the host waits for it, from the second step on: in the first one kernels are loaded."""

    def get_batch_samples(self, *args, **kwargs):
        with self.awake():
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        with self.awake():
            return super().training_step(*args, **kwargs)

    @contextlib.contextmanager
    def awake(self):
        torch.cuda.set_sync_debug_mode("error" if self.state.global_step else "default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class AwakeSFT(Awake, SFTTrainer):
    pass


class AwakeDPO(Awake, DPOTrainer):
    pass


def rows(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(256, (length,), generator=generator).tolist() for length in range(10, 10 + count)]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in made]


LORA = dict(peft_config=LoraConfig(target_modules=["q_proj", "up_proj"]))
WEDLM = dict(
    data_args=DataArguments(max_seq_length=64, objective="wedlm"),
    wedlm_args=WeDLMArguments(mask_token="<|mask|>", block_size=8),
)
KINDS = {
    "full": {}, "lora": LORA, "head": dict(peft_config=LoraConfig(target_modules=["q_proj", "lm_head"])),
    "wedlm": WEDLM, "wedlm-lora": {**WEDLM, **LORA}, "bf16": dict(bf16=True),
    "dpo": dict(data_args=DataArguments(max_seq_length=64, task_type="dpo")),
    "dpo-lora": dict(data_args=DataArguments(max_seq_length=64, task_type="dpo"), **LORA),
}  # fmt: skip


def made(folder, kind, trainers=(CountedSFT, CountedDPO), backend="segment", **values):
    """A trainer of three steps of three micro-batches."""
    options = {"data_args": DataArguments(max_seq_length=64), **KINDS[kind]}
    args = TrainingArguments(
        output_dir=str(folder), max_steps=3, gradient_accumulation_steps=3, per_device_train_batch_size=1, logging_steps=10,
        save_strategy="no", report_to="none", disable_tqdm=True, **{"bf16": options.pop("bf16", False), **values},
    )  # fmt: skip
    pairs = kind.startswith("dpo")
    data = [
        {"prompt_ids": r["input_ids"][:5], "chosen_ids": r["input_ids"][5:], "rejected_ids": [7, 8]} for r in rows(40)
    ]
    return trainers[pairs](
        tiny.tiny_model(), args, train_dataset=data if pairs else rows(40), processing_class=tiny.tiny_tokenizer(),
        attention_backend=backend, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_waits_for_nothing_and_a_step_is_one_kernel(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "_is_one", lambda factor: False)  # looks on the CPU alone
    trainer = made(tmp_path, kind, use_cpu=True)
    trainer.train()
    assert len(trainer.micro_batches) == 9 and trainer.clippings == 3
    for seen in trainer.micro_batches:
        assert sum(seen.names.values()) > 100 and not seen.waits
    assert trainer.args.optim == "adamw_torch_fused" and len(trainer.optimizer_steps) == 3
    for seen in trainer.optimizer_steps:
        assert 1 <= seen.names["_fused_adamw_"] <= 2, "one for each group of parameters"
        assert not seen.names["addcdiv_"] and not any("_foreach_addc" in name for name in seen.names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["segment", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_is_waited_for_in_no_micro_batch(kind, backend, tmp_path):
    made(tmp_path, kind, (AwakeSFT, AwakeDPO), backend, bf16=True).train()


def test_what_is_counted_as_a_wait():
    values = torch.arange(4.0)
    with Operations() as seen:
        values.sum().item(), values[values > 1], bool(values[0]), values.tolist()
    assert len(seen.waits) >= 3
