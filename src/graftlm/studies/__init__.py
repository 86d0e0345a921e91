"""Many runs beside each other: a sweep, its table, its page."""
