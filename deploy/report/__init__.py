"""The report of a run: the document, its sentences, and what people read of it."""
