"""Benchmarks of FastUNet against what one would otherwise run; see cases.py."""
