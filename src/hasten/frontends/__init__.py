"""Frontends: trained models from elsewhere become ONNX artifacts, checked against their source."""

from hasten.frontends.frontend import Frontend, Imported, ImportRequest
from hasten.frontends.imports import import_model

__all__ = ["Frontend", "ImportRequest", "Imported", "import_model"]
