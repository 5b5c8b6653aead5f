"""train.py, which gets a signal at the end of step HF_SFT_DIE_AT: HF_SFT_SIGNAL (SIGKILL), in rank HF_SFT_DIE_RANK (0; all)."""

import os
import signal
import sys

from transformers import TrainerCallback

from hf_sft.cli import main
from hf_sft.training import trainer


class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        wanted = os.environ.get("HF_SFT_DIE_RANK", "0")
        if state.global_step == int(os.environ["HF_SFT_DIE_AT"]) and wanted in (str(args.process_index), "all"):
            os.kill(os.getpid(), signal.Signals[os.environ.get("HF_SFT_SIGNAL", "SIGKILL")])


original = trainer.SFTTrainer.train
trainer.SFTTrainer.train = lambda self, *a, **k: (self.add_callback(Die()), original(self, *a, **k))[1]
sys.exit(main(["train", *sys.argv[1:]]))
