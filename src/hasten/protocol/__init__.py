"""The Open Inference Protocol: messages and codecs, one definition for server, client and load generator."""
