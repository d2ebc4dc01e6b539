"""On-device fine-tuning inside a memory cap."""
