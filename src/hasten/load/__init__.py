"""Load on a service: arrival plans, the generator, and the record of what came back."""
