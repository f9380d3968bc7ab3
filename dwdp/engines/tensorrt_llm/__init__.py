"""The production engine: TensorRT-LLM, extended as it is imported and never forked."""
