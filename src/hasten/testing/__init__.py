"""Contract suites that the author of a pass or an engine runs over it."""
