"""The registered ops, called directly with wrong arguments: errors, and never a crash."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import torch

from synface_kernels import _load
from tests.helpers.forked import finished


def call_wrongly() -> None:
    """Call the ops 3,000 times with warnings off."""
    from tests.helpers import raw_ops  # it needs the compiled extension

    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    raw_ops.main(0, 3000, "", False)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.skipif(_load.extension_error is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("isa", ["base", None])
@pytest.mark.slow
def test_wrong_arguments_are_errors(isa, tmp_path):
    options = {} if isa is None else {"SYNFACE_CPU_ISA": isa}
    # A crash would end the process: so it is one of its own.
    code, shown = finished(tmp_path / "shown", call_wrongly, **options)
    assert code == 0, shown
    found = json.loads(shown.splitlines()[-1])  # after what a sanitizer reports
    assert {"row_update_sgd_cpu", "margin_cross_entropy_update_cpu"} <= set(found["ops"])
    # Every op takes sound arguments, and refuses some of the wrong ones if it has any.
    assert [name for name, (returned, _) in found["ops"].items() if returned == 0] == []
    assert sum(raised for _, raised in found["ops"].values()) > 500
    assert "empty" not in found["errors"]
