"""The small shared core: paths, grids, state, guidance, loop, registry."""
