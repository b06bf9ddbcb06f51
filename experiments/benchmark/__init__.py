"""Measures what a training step costs on the devices that are here, beside floors and beside torch."""
