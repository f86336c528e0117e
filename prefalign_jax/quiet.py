"""What libraries say that a user can do nothing about, and that is therefore not shown.

The package sets this before anything else of it is imported. A variable that is set already keeps its value, so
whoever wants to see these lines sets it: TF_CPP_MIN_LOG_LEVEL=1, for one.
"""

import os

SILENCED = {
    # XLA's alarm at every compilation of more than two minutes, with its advice to file a bug, and its complaints about
    # constants that take long to fold. Failures of XLA are exceptions, which are shown.
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Transformers says at its import that PyTorch is missing. Only its tokenizers are used here.
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    # The hub's client tells of every retry, and of requests without an account. What fails in the end is an exception.
    "HF_HUB_VERBOSITY": "error",
}


def silence() -> None:
    """Sets the variables that nobody has set; works for what is imported afterwards."""
    for name, value in SILENCED.items():
        os.environ.setdefault(name, value)
