"""Everything becomes an ONNX artifact here, checked against its source on samples."""
