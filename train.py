"""Fine-tune a model: ``python train.py --train_args_file train_args/FILE.json [--key value ...]``.

The road itself reads like a table of contents in ``hf_sft/commands/train.py``, which ``hf-sft train`` runs as well.
"""

from __future__ import annotations

from hf_sft.cli import script

if __name__ == "__main__":
    script(["train"])
