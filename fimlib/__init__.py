"""Diagonal Fisher information."""
