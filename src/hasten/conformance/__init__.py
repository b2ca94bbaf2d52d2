"""A suite that any server of the Open Inference Protocol can be run against."""
