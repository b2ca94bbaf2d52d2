"""The trainable view: a PyTorch module that runs an ONNX graph, and the loop that trains it."""
