"""Export of a trained backbone: ONNX with proof of parity, and the Hub. ONNX needs the extra `[train]`."""

from __future__ import annotations

from dinokit.export.hub import PushPlan, PushResult, plan_push, push_to_hub
from dinokit.export.onnx import export_folder
from dinokit.export.verify import Comparison, ExportError, ParityReport, compare_engines

__all__ = [
    "Comparison",
    "ExportError",
    "ParityReport",
    "PushPlan",
    "PushResult",
    "compare_engines",
    "export_folder",
    "plan_push",
    "push_to_hub",
]
