"""Runs ``hasten`` as ``python -m hasten``."""

from hasten.cli.app import main

main()
