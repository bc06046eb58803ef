"""The experiments' binaries.

What has to be said before jax is imported: arrays that a program captures, such
as class counts, become arguments of it, so that runs of other seeds share what
was compiled. A jax that has made this its rule ignores the variable.
"""

import os

os.environ.setdefault('JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS', 'true')
