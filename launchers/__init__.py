"""Launchers: from a paper's table.toml to commands, runs and a table.

Nothing here imports jax or fedjax_ext: a launcher starts the experiment
binaries as separate processes and reads the JSON files that they write.
"""
