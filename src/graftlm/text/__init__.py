"""Text: a record of the data becomes prompt and completion, then tokens, then batches; no torch here."""
