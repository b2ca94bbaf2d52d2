"""The suite that any server of the Open Inference Protocol can be run against. It shares no codec with the server."""
