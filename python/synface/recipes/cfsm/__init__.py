"""CFSM: controllable and guided face synthesis (Liu et al., ECCV 2022)."""
