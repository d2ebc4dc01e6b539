"""Workstation side: torch or ONNX model → training graph → bundle, and back. Needs the extra ``export``."""
