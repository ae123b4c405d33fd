"""Packed layers as modules: what they store, and what they compute by a kernel."""
