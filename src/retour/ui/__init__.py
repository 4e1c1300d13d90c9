"""The page of `retour ui`: what a visitor asks for, made one job at a time, shown as it comes.

`recipe`, `work`, `line`, `rooms`, `menus`, `shelf` and `drawing` are plain Python; `markup` writes
HTML; only `page` and `serve` know the web framework (extra `ui`).
"""
