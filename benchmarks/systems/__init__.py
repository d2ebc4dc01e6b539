"""The systems under measurement. Each `make` sets one up and returns what ``benchmarks.worker`` drives."""
