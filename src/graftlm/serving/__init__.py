"""`graft serve`: a web page and an OpenAI-compatible API for one base and its adapters (needs the extra `serve`)."""
