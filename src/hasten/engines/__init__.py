"""Engines, one runtime a file, each importing its runtime plainly at the top."""
