"""The margin softmax's Triton kernels under autocast, by the tests of all implementations.

Needs TRITON_INTERPRET=1 before Triton is imported; see ../test_interpreter.py.
"""

import pytest

from tests.ops.test_margin_cross_entropy_autocast import (  # noqa: F401
    test_an_update_has_the_bits_of_gradient_and_step,
    test_every_option_matches_float64,
    test_float16,
    test_gradients_are_orthogonal_to_their_rows_and_zero_rows_have_none,
    test_matches_float64,
    test_rows_of_any_length,
    test_the_backward_pass_goes_by_the_forward_pass,
    test_what_autocast_changes,
)

pytestmark = [pytest.mark.usefixtures("design"), pytest.mark.pairwise]
