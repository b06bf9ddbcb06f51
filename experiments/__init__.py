"""Entry points and the configs of the experiments."""

import os

# transformers says at import that it has no torch; here it only reads tokenizers.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
