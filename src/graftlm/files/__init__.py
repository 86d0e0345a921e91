"""Names and files -> checked local folders; knows no model. See `assets.py` for names, `formats.py` for formats."""
