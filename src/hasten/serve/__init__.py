"""A deployment as a service: batching by deadline, admission, workers, lifecycle, and the transports on top."""
