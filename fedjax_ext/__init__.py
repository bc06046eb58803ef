"""Federated learning research in JAX; start at `fedjax_ext.core`."""

__version__ = '0.1.0'
