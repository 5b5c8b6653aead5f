"""What is written is read back: adapters, weights, checkpoints to resume from, and the record of a run.

Nothing here deletes anything of a user's.
"""

from hf_sft.checkpoints.folders import (
    MARKER,
    PROGRESS,
    checkpoints_in,
    incomplete,
    last_complete_checkpoint,
    read_state,
    steps_of,
)
from hf_sft.checkpoints.record import (
    ARGUMENTS_FILE,
    DEFAULTS,
    IDENTITY_FIELDS,
    RESOLVED,
    differences,
    identity,
    other_defaults,
    save_arguments,
    versions,
)
from hf_sft.checkpoints.resuming import check_checkpoint, check_output_dir, resolve_resume
from hf_sft.checkpoints.verifying import CheckpointError, Shapes, verify_adapter, verify_weights, weight_shapes
from hf_sft.checkpoints.writing import SaveError

__all__ = [
    "ARGUMENTS_FILE", "DEFAULTS", "IDENTITY_FIELDS", "MARKER", "PROGRESS", "RESOLVED", "CheckpointError", "SaveError", "Shapes",
    "check_checkpoint", "check_output_dir", "checkpoints_in", "differences", "identity", "incomplete", "last_complete_checkpoint",
    "other_defaults", "read_state", "resolve_resume", "save_arguments", "steps_of", "verify_adapter", "verify_weights",
    "versions", "weight_shapes",
]  # fmt: skip
