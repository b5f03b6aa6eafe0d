"""The algorithms: plain torch on tensors and callables. No host, no files."""
