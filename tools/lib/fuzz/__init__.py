"""Mutated files of every kind that colm-edge reads, and what becomes of them."""
