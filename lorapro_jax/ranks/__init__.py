"""Ranks for adapters: measured, fitted to a budget, tabulated."""
