"""Passes, one idea a file; ``hasten.registry`` knows them by name."""
