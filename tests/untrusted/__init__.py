"""Readers of files from others, each as a function from bytes, with valid files to start from and ways to alter them.

`test_readers` gives them a few thousand altered files, `benchmarks/fuzz.py` a great many.
"""
