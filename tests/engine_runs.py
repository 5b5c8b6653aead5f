"""Several runs of train.py one after the other in the same processes, which a launcher has started: the imports are paid once.

    launcher engine_runs.py RUNS.json      a list of arguments, each an object

Beside each result lies ``live-RANK.json``: the most numbers of the model that this rank held at once while the final model was
saved, those that ZeRO-3 had gathered included, and how many the base has.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import runs
import torch.distributed as dist

from hf_sft import tasks
from hf_sft.commands import train
from hf_sft.models import sharded
from hf_sft.parsing import parse_args
from hf_sft.training.trainer import SFTTrainer


class Counter:
    """Looks whenever something has been gathered: that is when most of it is whole."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self.trainer = trainer
        self.most = 0
        self.whole = sharded.whole

    def gathered(self, enter: Any) -> Any:
        """Whatever ZeRO-3 gathers, by whomever it is asked."""

        def entered(context: Any) -> Any:
            result = enter(context)
            self.most = max(self.most, self.available())
            return result

        return entered

    def __call__(self, tensor: Any) -> Any:
        found = self.whole(tensor)
        self.most = max(self.most, self.available() + found.numel())
        return found

    def available(self) -> int:
        return sum(
            parameter.numel() for parameter in self.trainer.accelerator.unwrap_model(self.trainer.model).parameters()
        )


def counted(save: Any) -> Any:
    def save_model(trainer: SFTTrainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        counter = Counter(trainer)
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(sharded, "whole", counter))
            if trainer.is_deepspeed_enabled:
                import deepspeed

                gathering = deepspeed.zero.GatheredParameters
                stack.enter_context(mock.patch.object(gathering, "__enter__", counter.gathered(gathering.__enter__)))
            save(trainer, output_dir, _internal_call)
        if not _internal_call:
            numbers = sum(map(sharded.whole_numel, trainer._base.parameters()))
            record = {"most": counter.most, "base": numbers}
            Path(trainer.args.output_dir, f"live-{trainer.args.process_index}.json").write_text(json.dumps(record))

    return save_model


if __name__ == "__main__":
    assert tasks.TRAINERS["sft"] is SFTTrainer
    with mock.patch.object(SFTTrainer, "save_model", counted(SFTTrainer.save_model)):
        for values in json.loads(Path(sys.argv[1]).read_text()):
            arguments = parse_args(runs.words(values))
            train.log_to_terminal(arguments.training.local_process_index)
            assert train.run(arguments) == 0
    if dist.is_initialized():
        dist.destroy_process_group()
