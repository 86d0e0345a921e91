"""`graft serve`: one base and adapters of it behind a page and an OpenAI-compatible API (needs the extra `serve`)."""
