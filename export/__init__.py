"""Export of a trained backbone: ONNX with proof of parity, and the Hub. ONNX needs the extra `[train]`."""

from __future__ import annotations

from dinokit.errors import ExportError
from dinokit.export.classifier import ClassifierFile, export_classifier
from dinokit.export.hub import PushPlan, PushResult, plan_push, push_to_hub
from dinokit.export.module import export_onnx
from dinokit.export.onnx import export_folder
from dinokit.export.triton import write_triton_classifier, write_triton_repository
from dinokit.export.verification.report import GATES, ExportReport, Gate, LabelAgreement, VariantReport
from dinokit.export.verification.verify import Comparison, compare_engines

__all__ = [
    "GATES",
    "ClassifierFile",
    "Comparison",
    "ExportError",
    "ExportReport",
    "Gate",
    "LabelAgreement",
    "PushPlan",
    "PushResult",
    "VariantReport",
    "compare_engines",
    "export_classifier",
    "export_folder",
    "export_onnx",
    "plan_push",
    "push_to_hub",
    "write_triton_classifier",
    "write_triton_repository",
]
