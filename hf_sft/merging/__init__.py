"""Merging an adapter into its base, shard by shard."""

from hf_sft.merging.folders import new_folder
from hf_sft.merging.merge import load_merged, merge_adapter

__all__ = ["load_merged", "merge_adapter", "new_folder"]
