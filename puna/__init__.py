"""Puna: the ground on which large models are raised."""

__version__ = "0.1.0"
