"""Benchmarks of single rules, one file per rule, named like it."""
