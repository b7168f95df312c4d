"""Triton reads TRITON_INTERPRET when it is imported: what needs it runs in a process of its own."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
