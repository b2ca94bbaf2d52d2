"""Samples: named inputs and, where there are any, labels; read from files, preprocessed, split."""

from hasten.samples.samples import Samples

__all__ = ["Samples"]
