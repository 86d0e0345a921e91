"""Optional commands on top of the core: compare, report, estimate, and evaluation on a Ray cluster."""
