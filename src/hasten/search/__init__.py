"""From a goal to a verdict: the space, the journal, the stages, the frontier."""
