"""Triton reads TRITON_INTERPRET when imported, so interpreted tests run in their own processes."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
