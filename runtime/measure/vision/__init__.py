"""Vision parts of engines measured alone, and the fp32 and int8 peaks of ONNX Runtime."""
