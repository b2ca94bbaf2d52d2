"""The ONNX graph as the passes see it: reading and writing, users and producers, patterns, costs."""
