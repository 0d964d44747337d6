"""What tests and benchmarks share: one list of cases per op, exact and bounded comparison, timing."""
