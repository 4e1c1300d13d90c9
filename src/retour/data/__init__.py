"""Builders of the training and benchmark sets: emoji sprites and captioned scenes made of them."""
