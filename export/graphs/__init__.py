"""Passes over an ONNX graph, one each."""
