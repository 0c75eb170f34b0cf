"""Export of a trained backbone: ONNX with proof of parity. Needs the extra `[train]`."""

from __future__ import annotations

from dinokit.export.onnx import export_folder
from dinokit.export.verify import Comparison, ExportError, ParityReport, compare_engines

__all__ = ["Comparison", "ExportError", "ParityReport", "compare_engines", "export_folder"]
