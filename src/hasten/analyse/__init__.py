"""What a record of load says: percentiles, phases, causes, capacity."""
