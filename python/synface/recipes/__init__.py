"""The papers' recipes: from data to a report, small enough for a CPU."""
