"""Restoration: a generative model as the prior of an inverse problem."""
