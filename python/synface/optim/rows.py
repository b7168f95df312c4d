"""Optimizers of class centers, which step only the rows that have a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from numbers import Real
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import synface_kernels as sk

from ..common.check import check_bool, check_by_op, check_integer, describe

_ODD = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits; spreads the parameters' seeds
_WATCHED = WeakTensorKeyDictionary()  # the parameters with hooks, which all optimizers share


class _RowOptimizer(torch.optim.Optimizer):
    """Base class of `RowSGD` and `RowAdamW`: rows of gradients, states, saving and loading."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters and their settings.

        Raises:
            TypeError, ValueError: for invalid ones; no group is added.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        for parameter in group["params"]:
            if parameter.requires_grad:
                _remember_coalesced(parameter)

    def _check(self, group: dict[str, Any]) -> None:
        """Raise TypeError or ValueError for settings or parameters that no step could take."""
        for name in ("nesterov", "catch_up"):
            if name in group:
                check_bool(name, group[name])
        seed, dtype = group["seed"], group["state_dtype"]
        if seed is not None:
            check_integer("seed", seed, 0)
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(
                f"state_dtype must be float32, bfloat16, float64 or None, got {describe(dtype)}"
            )
        for parameter in group["params"]:
            if (
                parameter.dim() < 2
                or not parameter.is_contiguous()
                or parameter.dtype not in (torch.float32, torch.bfloat16, torch.float64)
            ):
                raise ValueError(
                    "params must be float32, bfloat16 or float64, contiguous, and have rows, shape "
                    f"(C, D) or (C, S, D), got {describe(parameter)}"
                )
            double = parameter.dtype == torch.float64
            if dtype is not None and (dtype == torch.float64) != double:
                allowed = "float64" if double else "float32 or bfloat16"
                raise ValueError(
                    f"state_dtype must be {allowed}, or None, for {describe(parameter)}, "
                    f"got {describe(dtype)}"
                )
            row = torch.empty((1, *parameter.shape[1:]), dtype=parameter.dtype, device="meta")
            ids = torch.empty(1, dtype=torch.int64, device="meta")
            arguments = self._arguments(0, group, self._new_state(group, row), 1)
            arguments |= {"class_ids": ids, "impl": group["impl"]}
            check_by_op(partial(self._kernel, _matrix(row), _matrix(row), **arguments))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step the rows in a sparse gradient, or all rows of a dense one.

        Parameters without a gradient take no step, and their step count stays. A step waits for a
        GPU only where a sparse gradient is the sum of several passes'.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group, parameter in self._parameters():
            if parameter.grad is None:
                continue
            class_ids, row_grad = _rows(parameter)
            state = self._state(group, parameter)
            step = int(state["step"]) + 1
            arguments = self._arguments(index, group, state, step)
            self._kernel(_matrix(parameter), row_grad, class_ids, impl=group["impl"], **arguments)
            state["step"].fill_(step)
        return loss

    @torch.no_grad()
    def catch_up(self) -> None:
        """Apply to every row the steps that it missed.

        Call it before an evaluation or an export, and before a change of the learning rate if the
        missed steps are to use the old one. Costs O(C·D). Does nothing without ``catch_up``.
        """
        for index, group, parameter in self._parameters():
            state = self.state.get(parameter, {})
            if "last_step" in state and state["step"] > 0:
                rows = torch.arange(parameter.shape[0], device=parameter.device)
                arguments = self._arguments(index, group, state, int(state["step"]))
                self._kernel(_matrix(parameter), None, rows, impl=group["impl"], **arguments)

    @torch.no_grad()
    def next_update(self, parameter: Tensor) -> sk.SGDUpdate | sk.AdamWUpdate:
        """Return a parameter's next step, for `synface_kernels.margin_cross_entropy` to apply.

        The step is counted at once, before the backward pass applies it.

        Raises:
            ValueError: for a parameter that is not this optimizer's.
        """
        update = self.upcoming_update(parameter)
        self.count(parameter, update)
        return update

    def upcoming_update(self, parameter: Tensor) -> sk.SGDUpdate | sk.AdamWUpdate:
        """Return what `next_update` would return, for `count` to count once it is accepted."""
        for index, group, own in self._parameters():
            if own is parameter:
                state = self._state(group, parameter)
                return self._next(**self._arguments(index, group, state, int(state["step"]) + 1))
        raise ValueError(f"parameter must be one of this optimizer's, got {describe(parameter)}")

    def count(self, parameter: Tensor, update: sk.SGDUpdate | sk.AdamWUpdate) -> None:
        """Count a parameter's `upcoming_update` as taken; to count it again changes nothing."""
        self.state[parameter]["step"].fill_(update.step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` bitwise, each state in its own dtype.

        Raises:
            ValueError: for a state of another optimizer or of other parameters; nothing is loaded.
        """
        loaded = {}
        for own, group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            # torch adds its own defaults when it loads, which no group has
            missing = (self.defaults.keys() & own.keys()) - group.keys()
            if missing:
                raise ValueError(
                    f"state_dict is of another optimizer: its groups lack {sorted(missing)}"
                )
            for parameter, name in zip(own["params"], group["params"], strict=False):
                values = state_dict["state"].get(name)
                if values:
                    loaded[parameter] = self._checked(group, parameter, values)
        # torch's load_state_dict would cast the states to the parameter's dtype
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(loaded)

    def _checked(
        self, group: dict[str, Any], parameter: Tensor, values: dict[str, Any]
    ) -> dict[str, Tensor]:
        expected = self._new_state(group, torch.empty_like(parameter, device="meta"))
        if values.keys() != expected.keys():
            raise ValueError(
                f"state_dict must hold {sorted(expected)} for a parameter of shape "
                f"{tuple(parameter.shape)}, got {sorted(values)}"
            )
        state = {}
        for name, like in expected.items():
            value = values[name]
            if not isinstance(value, Tensor):
                value = torch.as_tensor(value, device="cpu")
            if value.shape != like.shape or value.is_floating_point() != like.is_floating_point():
                raise ValueError(
                    f"state_dict's {name} must be {describe(like)}, got {describe(value)}"
                )
            device = "cpu" if name == "step" else parameter.device
            state[name] = value.detach().to(device, like.dtype, copy=True)
        return state

    def _state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        if not self.state[parameter]:
            self.state[parameter] = self._new_state(group, parameter)
        return self.state[parameter]

    def _new_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        default = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        dtype = group["state_dtype"] or default
        state = {"step": torch.zeros((), dtype=torch.int64, device="cpu")}
        if group["catch_up"]:
            state["last_step"] = parameter.new_zeros(parameter.shape[0], dtype=torch.int64)
        for name in self._moments(group):
            state[name] = torch.zeros_like(parameter, dtype=dtype)
        return state

    def _parameters(self) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        pairs = ((group, p) for group in self.param_groups for p in group["params"])
        for index, (group, parameter) in enumerate(pairs):
            yield index, group, parameter

    def _arguments(
        self, index: int, group: dict[str, Any], state: dict[str, Tensor], step: int
    ) -> dict[str, Any]:
        """Return the arguments that the kernel and the update have in common."""
        lr = group["lr"]
        return {
            "lr": float(lr) if isinstance(lr, (Real, Tensor)) else lr,
            "weight_decay": group["weight_decay"],
            "step": step,
            "last_step": state.get("last_step"),
            "seed": None if group["seed"] is None else (group["seed"] + index * _ODD) % 2**63,
            **{name: _matrix(state[name]) for name in self._moments(group)},
            **{name: group[name] for name in self._own},
        }

    _kernel: Callable[..., Tensor]  # the subclass's op
    _next: Callable[..., Any]  # its update inside the backward pass
    _own: tuple[str, ...]  # its settings that the op takes

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the states with the parameter's shape."""
        raise NotImplementedError


class RowSGD(_RowOptimizer):
    """SGD on the rows that have a gradient, by `synface_kernels.row_sgd_`.

    Takes the sparse gradients (COO, sparse along the first dimension) that sampled heads return,
    and dense ones. A step costs O(S·D) for S rows, for any C.

    Args:
        params: parameters of shape (C, D) or (C, S, D), contiguous: float32, bfloat16 or float64.
        lr, momentum, dampening, weight_decay, nesterov: as `torch.optim.SGD`; with dampening, its
            first step differs (see `synface_kernels.row_sgd_`).
        catch_up: before its step, a row takes the steps that it missed (decay, and momentum
            without gradient), as a dense optimizer would have taken them, at the current learning
            rate. False: untouched rows stay as they are, as with `torch.optim.SparseAdam`.
        seed: bfloat16 weights and states are rounded stochastically, without bias, by a hash of the
            seed, the parameter's index in ``params``, the step, row and column, the same in every
            run. None rounds to nearest, which loses updates below 2^-9 of a weight. Ranks that hold
            shards of one matrix should use different seeds.
        state_dtype: of the momentum, float32 (the default; float64 for float64 weights) or
            bfloat16.
        impl: see `synface_kernels.row_sgd_`.

    State, for each parameter: ``step`` () int64, ``momentum_buffer`` like the parameter where
    momentum > 0, and ``last_step`` (C,) int64 with ``catch_up``. `state_dict` saves them and
    `load_state_dict` restores them bitwise.

    Raises:
        ValueError: for invalid parameters, gradients or settings.
        TypeError: for a setting of a wrong Python type.

    Source: Sutskever et al., ICML 2013; An et al., "Partial FC", CVPR 2022.
    """

    _kernel = staticmethod(sk.row_sgd_)
    _next = sk.SGDUpdate
    _own = ("momentum", "dampening", "nesterov")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        catch_up: bool = True,
        seed: int | None = None,
        state_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "catch_up": catch_up, "seed": seed, "state_dtype": state_dtype,
            "impl": impl,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()


class RowAdamW(_RowOptimizer):
    """AdamW on the rows that have a gradient, by `synface_kernels.row_adamw_`.

    Args:
        lr, betas, eps, weight_decay: as `torch.optim.AdamW`.
        params, catch_up, seed, state_dtype, impl: see `RowSGD`. bfloat16 states need a seed, since
            rounding to nearest undoes the second moment's decay.

    State, for each parameter: ``step`` () int64, ``exp_avg`` and ``exp_avg_sq`` like the parameter,
    and ``last_step`` (C,) int64 with ``catch_up``.

    Raises:
        ValueError, TypeError: as `RowSGD`.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """

    _kernel = staticmethod(sk.row_adamw_)
    _next = sk.AdamWUpdate
    _own = ("betas", "eps")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        catch_up: bool = True,
        seed: int | None = None,
        state_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "catch_up": catch_up, "seed": seed, "state_dtype": state_dtype, "impl": impl,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        if group["state_dtype"] == torch.bfloat16 and group["seed"] is None:
            raise ValueError("state_dtype bfloat16 needs a seed: rounding to nearest undoes decay")
        super()._check(group)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().view(tensor.shape[0], -1)


def _remember_coalesced(parameter: Tensor) -> None:
    """Mark a parameter's sparse gradient of one pass as coalesced if the pass returned it so.

    torch forgets it, and to look at the indices waits for a GPU. A gradient that another hook has
    replaced has other indices, and is looked at.
    """
    if parameter in _WATCHED:
        return
    _WATCHED[parameter] = None
    weak, indices = ref(parameter), [0]  # the address of coalesced ones

    def before(grad: Tensor) -> None:
        own = weak()
        first = own is not None and own.grad is None
        known = first and grad.is_sparse and grad.is_coalesced()
        indices[0] = grad._indices().data_ptr() if known else 0

    def after(own: Tensor) -> None:
        grad = own.grad
        if indices[0] and grad is not None and grad.is_sparse:
            if grad._indices().data_ptr() == indices[0]:
                grad._coalesced_(True)
            indices[0] = 0

    parameter.register_hook(before)
    parameter.register_post_accumulate_grad_hook(after)


def _rows(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows in a parameter's gradient, strictly increasing, and their gradients."""
    grad = parameter.grad
    assert grad is not None
    if not grad.is_sparse:
        return torch.arange(grad.shape[0], device=grad.device), _matrix(grad.contiguous())
    if grad.sparse_dim() != 1:
        raise ValueError(
            "a sparse gradient must be sparse along its first dimension alone, "
            f"got sparse_dim {grad.sparse_dim()} for shape {tuple(grad.shape)}"
        )
    class_ids = grad._indices()[0]
    if not grad.is_coalesced() and not bool((class_ids.diff() > 0).all()):
        grad = grad.coalesce()
        class_ids = grad._indices()[0]
    return class_ids, _matrix(grad._values())
