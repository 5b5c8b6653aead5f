"""train.py, killed without warning at the end of step HF_SFT_DIE_AT."""

import os
import signal
import sys

from transformers import TrainerCallback

from hf_sft.cli import main
from hf_sft.training import trainer


class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ["HF_SFT_DIE_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)


original = trainer.SFTTrainer.train
trainer.SFTTrainer.train = lambda self, *a, **k: (self.add_callback(Die()), original(self, *a, **k))[1]
sys.exit(main(["train", *sys.argv[1:]]))
