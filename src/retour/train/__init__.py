"""Trainers of the embedded models: one loop, four tasks, resumable on CPU and GPU."""
