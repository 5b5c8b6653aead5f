"""What the model will see, computed from prepared data; nothing is printed or written here."""

from hf_sft.inspection.findings import Finding
from hf_sft.inspection.report import Inspection, Sample, SplitInspection, inspect_data

__all__ = ["Finding", "Inspection", "Sample", "SplitInspection", "inspect_data"]
