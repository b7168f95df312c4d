"""The configuration of a packing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from ...common.check import check_integer, check_number
from . import symmetries
from .search import FEW_POINTS, default_steps

OBJECTIVES = ("auto", "orbit", "lse", "hyperface", "langevin")
"""Names of the objectives that a packing can minimize."""
DEFAULT_STEPS = 500
GALLERY_POLISH = 100  # steps of "lse" after an orbit search with a gallery
_INTEGERS = {"restarts": 1, "seed": 0, "steps": 1, "batch": 2, "order": 1, "polish": 0}


@dataclass(frozen=True)
class PackConfig:
    """Configuration of a packing. With ``steps``, two runs on one machine with the same
    number of threads are bitwise the same.

    Attributes:
        count, dim: number of points N and dimension d, both at least 2.
        objective: "orbit", "lse", "hyperface" or "langevin", see `Packer`; "auto" takes "orbit"
            unless a gallery, a start, a batch or a group is given, else "lse".
        steps: number of steps of each restart, or
        minutes: length of the whole run. The annealing then follows the clock, so the result
            depends on the machine's speed. Neither: 500 steps; of "orbit" 200 to 4000, fewer for
            more points.
        restarts: runs from other random points; the best one is returned. "orbit" runs them side by
            side, the others one after another. None: 1; of "orbit" with up to 300 points as many of
            each group, up to 16, as cost little.
        batch: points that repel each other in one step, each point drawn once per pass; None for
            all at once. See `Packer`.
        alpha: weight of the gallery.
        lr: learning rate of "hyperface". 0.001 was the best of seven in a trial (docs/packing.md).
        seed: random seed.
        symmetry: groups that "orbit" tries: "none", "antipodal" (x and −x), "cyclic", or "auto" for
            all that suit N and d. "none" of more than 300 points is the objective "lse".
        order: order of the group of "orbit", a divisor of N up to 300 points; None chooses it.
        polish: steps of "lse" after an orbit search of more than 300 points, in a run limited by
            time a quarter of it; None: 0, and 100 with a gallery, which only they regard.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.
    """

    count: int
    dim: int
    objective: str = "auto"
    steps: int | None = None
    minutes: float | None = None
    restarts: int | None = None
    batch: int | None = None
    alpha: float = 0.5
    lr: float = 0.001
    seed: int = 0
    symmetry: str = "auto"
    order: int | None = None
    polish: int | None = None

    def __post_init__(self) -> None:
        for name in ("count", "dim"):
            check_integer(name, getattr(self, name), 2, 2**63 - 1)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {OBJECTIVES}, got {self.objective!r}")
        if self.steps is not None and self.minutes is not None:
            raise ValueError(
                f"give steps or minutes, not both, got {self.steps} and {self.minutes}"
            )
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if value is not None or name == "seed":
                check_integer(name, value, least)
        check_number("alpha", self.alpha, 0)
        for name in ("lr", "minutes"):
            value = getattr(self, name)
            if name == "lr" or value is not None:
                check_number(name, value, 0)
                if value == 0:
                    raise ValueError(f"{name} must be positive, got {value}")
        self._check_symmetry()
        if self.batch is None:
            return
        if self.batch > self.count:
            raise ValueError(f"batch must be in [2, count = {self.count}], got {self.batch}")
        if self.objective not in ("auto", "lse"):
            raise ValueError(f"batch needs the objective 'lse', got {self.objective!r}")

    def _check_symmetry(self) -> None:
        if self.symmetry not in symmetries.SYMMETRIES:
            raise ValueError(
                f"symmetry must be one of {symmetries.SYMMETRIES}, got {self.symmetry!r}"
            )
        given = [
            name
            for name in ("symmetry", "order", "polish")
            if getattr(self, name) not in (None, "auto", "none")
        ]
        if given and self.batch is not None:
            raise ValueError(f"{given[0]} needs all points in a step, got batch = {self.batch}")
        if given and self.objective not in ("auto", "orbit"):
            raise ValueError(f"{given[0]} needs the objective 'orbit', got {self.objective!r}")
        if (self.objective, self.symmetry) == ("orbit", "none") and self.count > FEW_POINTS:
            raise ValueError(
                f"symmetry 'none' of more than {FEW_POINTS} points is the objective 'lse', got "
                "'orbit'"
            )
        if self.polish is not None and self.count <= FEW_POINTS:
            raise ValueError(
                f"polish needs more than {FEW_POINTS} points, got count = {self.count}: a search "
                "of fewer ends without symmetry"
            )
        symmetries.check(self.count, self.dim, self.symmetry, self.order, FEW_POINTS)

    def resolved(
        self, *, gallery: bool = False, start: bool = False, group: bool = False
    ) -> PackConfig:
        """Return the configuration with every "auto" and default decided.

        Args:
            gallery, start, group: whether the packing is given one.

        Raises:
            ValueError: where the objective or its options do not go with what is given.
        """
        free = not (gallery or start or group)
        objective = self.objective
        if objective == "auto":
            orbit = free and self.batch is None and self.count > 2
            if self.symmetry == "none" and self.count > FEW_POINTS:
                orbit = False
            objective = "orbit" if orbit else "lse"
        steps, polish = self.steps, self.polish
        restarts = self.restarts if objective == "orbit" else self.restarts or 1
        if steps is None and self.minutes is None:
            steps = DEFAULT_STEPS
        if objective == "orbit":
            if self.steps is None and self.minutes is None:
                steps = default_steps(self.count, self.dim)
            if self.polish is None and self.count > FEW_POINTS:
                polish = 0 if free else GALLERY_POLISH
        elif self.symmetry not in ("auto", "none") or self.order or self.polish:
            raise ValueError(
                "symmetry, order and polish need the objective 'orbit', which is not the default "
                "with a gallery, a start, a group or symmetry 'none': give it, or leave them out"
            )
        few = self.count <= FEW_POINTS
        given = {"a start": start, "a group": group, "a gallery": gallery and few}
        breaking = [name for name, is_given in given.items() if is_given]
        if objective == "orbit" and breaking:
            raise ValueError(
                f"objective must be 'lse', 'hyperface' or 'langevin' with {breaking[0]}, got "
                "'orbit', whose points are symmetric"
            )
        if objective == "orbit" and gallery and not polish:
            raise ValueError(
                "polish must be at least 1 with a gallery, which the symmetric part of the search "
                f"leaves out, got {polish}"
            )
        if objective != "orbit" and start and restarts != 1:
            raise ValueError(f"restarts must be 1 with a start, got {restarts}")
        return replace(self, objective=objective, steps=steps, restarts=restarts, polish=polish)

    def metadata(self) -> dict[str, str]:
        """Return the fields as the metadata of a file; strings are not quoted."""
        values = asdict(self).items()
        return {name: v if isinstance(v, str) else json.dumps(v) for name, v in values}
