"""Optional commands on top of the core: compare, report, prompt, estimate, and evaluation on a Ray cluster."""
