"""Keys that transformers dropped and keys of older fine-tuning scripts: one table, a module for each origin.

``translate`` runs before values have types: it sees what the file or the command line said.
"""

from hf_sft.legacy.tracking import ENVIRONMENT, enter_environment, take_environment
from hf_sft.legacy.translate import LEGACY, LEGACY_VALUES, MODE_FLAGS, translate, translate_source

__all__ = [
    "ENVIRONMENT",
    "LEGACY",
    "LEGACY_VALUES",
    "MODE_FLAGS",
    "enter_environment",
    "take_environment",
    "translate",
    "translate_source",
]
