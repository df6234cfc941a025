"""Sources of examples, tokenizers, and the pipeline that feeds batches."""
