"""The Triton kernels in the interpreter.

``make test`` starts a separate process for them, since Triton reads TRITON_INTERPRET when it is imported. Without the
variable nothing here is collected.
"""

import os
import warnings

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    import interpreter  # noqa: F401  (before any kernel runs)
    import sanitizer  # noqa: F401

    # NumPy warns where a GPU is silent: exp of a large number is infinite.
    warnings.filterwarnings("ignore", "overflow encountered in exp", RuntimeWarning)
