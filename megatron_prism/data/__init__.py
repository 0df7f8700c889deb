"""The data that a run reads: file formats, the tokenizer, a weighted mixture, and its batches."""
