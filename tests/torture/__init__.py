"""Daemons that are killed under load, and what must be true of their content afterwards.

    python -m tests.torture --kills 1000

`model` says what a cache may answer after what it acknowledged, `load` writes and reads through the
real client, `lives` starts, kills and compares. `values` makes values that say whose they are.
"""
