"""What a model says: `generate.py` continues prompts, `evaluate.py` reads labels from scores and from text."""
