"""LoRALinear: a linear layer with named low-rank adapters, in place of nn.Linear."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fused_lora import reference
from fused_lora.adapter_sum import Adapter, lora_sum
from fused_lora.gathered import GATHERED, autocast_copy, is_gathered
from fused_lora.grouped import GROUP, Groupable, Operands, computed_together, pays
from fused_lora.mixed_batch import Names, NamesOfThread, adapter_index, present
from fused_lora.ops import is_sharded, lora_linear, lora_linear_mixed, seed_on
from fused_lora.packed import (
    WEIGHT,
    PacksWeight,
    held_weight,
    packed_weight,
    plain_parameters,
    unpack_weight,
)
from fused_lora.tracing import constant

# Classes that compute x Wᵀ + b and nothing else, by qualified name so that no library is imported for
# them, and whether they hold W transposed (in_features×out_features). A subclass may do more, so only
# the very class counts.
PLAIN_LINEARS = {
    "torch.nn.modules.linear.Linear": False,
    "transformers.pytorch_utils.Conv1D": True,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
}
# What a plain Parameter is: one; while torch.export traces it, or torch.func.functional_call puts another
# in its place, these.
_PLAIN_PARAMETERS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_making = threading.Lock()


@dataclass(frozen=True)
class LoRASettings:
    """What an adapter is besides its two matrices: its rank r ≥ 1, alpha, and the probability in [0, 1] with
    which its input is dropped in training. Its scaling is alpha / r, or alpha / √r with rslora
    (Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732).
    Raises ValueError for other values."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    scaling: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _is_number(self.r) or self.r != int(self.r) or self.r < 1:
            raise ValueError(f"r must be a whole number ≥ 1, got {self.r!r}")
        if not _is_number(self.alpha):
            raise ValueError(f"alpha must be finite, got {self.alpha!r}")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout must be in [0, 1], got {self.dropout!r}")
        object.__setattr__(self, "r", int(self.r))  # 16.0 will do
        object.__setattr__(self, "scaling", self.alpha / (math.sqrt(self.r) if self.rslora else self.r))


class LoRALinear(nn.Linear, PacksWeight, Groupable):
    """nn.Linear plus the sum of its active adapters: y = x Wᵀ + b + Σ s·B(A·drop(x)).

    weight and bias are nn.Linear's own, under the same names; adapters hold lora_A[name] (r×in_features)
    and lora_B[name] (out_features×r). The arguments after dtype add a first adapter where r is given.

    Whether weight and bias train is left as it is; `add_lora` freezes them.

    While merged the adapters are part of `weight`, and the original Parameter is kept aside until
    `unmerge()` puts it back, the same object, bit for bit. That costs one more weight per merged layer.
    A merge is a state of the running process: `state_dict()` holds the original weight, and loading a
    state dict, changing adapters or switching them off while merged is an error.
    """

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    settings: dict[str, LoRASettings]
    _active: list[str]
    _enabled: bool
    _batch: NamesOfThread | None  # of every element of a batch its adapter; None before any use_adapters
    _unmerged_weight: nn.Parameter | None
    _base_class: type[nn.Module]
    fan_in_fan_out: bool  # weight is stored in_features×out_features, as Conv1D stores it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int | None = None,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter_name: str = "default",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._begin(nn.Linear)
        if r is not None:
            self.add_adapter(adapter_name, LoRASettings(r, alpha, dropout, rslora))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int | None = None,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter_name: str = "default",
    ) -> LoRALinear:
        """A new layer that shares weight, bias and hooks with `linear`, which stays as it is.

        linear: nn.Linear, or transformers' Conv1D or FalconLinear. Raises TypeError for anything else, their
        subclasses included, which may do more.
        """
        reason = obstacle(linear)
        if reason:
            raise TypeError(f"linear: {reason}")
        shell = object.__new__(type(linear))
        for name, value in vars(linear).items():
            shell.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
        layer = cls.adopt(shell)
        if r is not None:
            layer.add_adapter(adapter_name, LoRASettings(r, alpha, dropout, rslora))
        return layer

    @classmethod
    def adopt(cls, linear: nn.Module) -> LoRALinear:
        """Turns `linear` itself into a LoRALinear without adapters: its parameters, its hooks and every
        reference to it stay. `release()` turns it back. Raises TypeError for what `from_linear` refuses."""
        reason = obstacle(linear)
        if reason:
            raise TypeError(f"linear: {reason}")
        base_class = type(linear)
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear._begin(base_class)
        return linear

    def release(self) -> nn.Module:
        """Turns the layer back into what it was before `adopt`; its adapters are dropped. While merged it
        keeps the merged weight."""
        unpack_weight(self)
        self._unmerged_weight = None
        for name in ("lora_A", "lora_B"):
            del self._modules[name]
        if self.fan_in_fan_out:
            del self.in_features, self.out_features
        self.__dict__.pop(GROUP, None)
        base_class = self._base_class
        for name in (
            *("settings", "_active", "_enabled", "_batch", "_unmerged_weight", "_base_class"),
            "fan_in_fan_out",
        ):
            del self.__dict__[name]
        self.__class__ = base_class  # type: ignore[assignment]
        return self

    def _begin(self, base_class: type[nn.Module]) -> None:
        self._base_class = base_class
        self.fan_in_fan_out = stores_transposed(base_class)
        if self.fan_in_fan_out:
            self.in_features, self.out_features = self.weight.shape
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.settings = {}
        self._active = []
        self._enabled = True
        self._batch = None
        self._unmerged_weight = None

    # Adapters

    def add_adapter(
        self,
        name: str,
        settings: LoRASettings,
        *,
        dtype: torch.dtype | None = None,
        activate: bool = True,
    ) -> None:
        """Adds an adapter: A from kaiming_uniform(a=√5), as PEFT's, and B zero, so that it adds nothing yet.

        dtype: of A and B; by default float32 for 16-bit weights (masters), else the weight's own.
        activate: make it the active adapter.
        """
        self._demand_unmerged("add an adapter")
        check_adapter(name, dtype)
        if name in self.settings:
            raise ValueError(f"name: there is an adapter {name!r} already")
        weight = held_weight(self)
        options: dict[str, Any] = {"device": weight.device, "dtype": dtype or adapter_dtype(weight)}
        a = torch.empty(settings.r, self.in_features, **options)
        b = torch.empty(self.out_features, settings.r, **options)
        self.put_adapter(name, settings, a, b)
        self.reset_adapter(name)
        if activate:
            self._active = [name]

    def put_adapter(self, name: str, settings: LoRASettings, a: Tensor, b: Tensor) -> None:
        """Gives the layer an adapter of these matrices, whole, in place of the one of that name if there is
        one. Which adapters are active is left as it is.

        Where shapes and dtypes are what they were, the Parameters stay and the numbers are written into them:
        a compiled or captured forward goes on with them.
        """
        self._demand_unmerged("put an adapter on")
        known = name in self.settings
        weight = held_weight(self)
        for operand, parameters, matrix in (("lora_a", self.lora_A, a), ("lora_b", self.lora_B, b)):
            if known and _writable_as(parameters[name], matrix):
                _write(parameters[name], matrix)
                continue
            if is_gathered(self):
                raise RuntimeError(
                    f"add adapter {name!r} before fully_shard: it does not see what comes later"
                )
            if is_sharded(weight):
                from fused_lora import shards

                matrix = shards.placed(matrix, operand, weight.t() if self.fan_in_fan_out else weight)
            trains = not known or parameters[name].requires_grad
            parameters[name] = nn.Parameter(matrix, requires_grad=trains)
        self.settings[name] = settings

    def reset_adapter(self, name: str) -> None:
        """Draws A anew and zeroes B (after `to_empty()`, for one)."""
        self._demand_unmerged("reset an adapter")
        self._demand(name)
        a, b = self.lora_A[name], self.lora_B[name]
        nn.init.zeros_(b)
        if not is_sharded(a):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            return
        from fused_lora import shards

        drawn = torch.empty(a.shape, dtype=a.dtype, device=a.device)  # whole, as one process draws it
        with torch.no_grad():
            a.copy_(shards.placed_as(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)), a))

    def delete_adapter(self, name: str) -> None:
        self._demand_unmerged("delete an adapter")
        self._demand(name)
        del self.lora_A[name], self.lora_B[name], self.settings[name]
        self._active = [active for active in self._active if active != name]

    def names_of_thread(self) -> NamesOfThread:
        """Where `use_adapters` leaves the names of a thread's batch."""
        with _making:
            if self._batch is None:
                self._batch = NamesOfThread()
            return self._batch

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The adapters whose sum the layer adds, in order."""
        return tuple(self._active)

    def set_adapter(self, names: str | list[str] | tuple[str, ...]) -> None:
        """Makes these the active adapters. Which of them train is left as it is."""
        self._demand_unmerged("switch adapters")
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            self._demand(name)
        self._active = names

    @property
    def enabled(self) -> bool:
        """Whether the active adapters are added; if not, the layer is the frozen linear alone."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._demand_unmerged("switch adapters on or off")
        self._enabled = bool(value)

    # Merging

    @property
    def merged(self) -> bool:
        """Whether the active adapters are part of `weight` now."""
        return self._unmerged_weight is not None

    def delta_weight(self, name: str) -> Tensor:
        """s · B A of one adapter, in the layout of `weight`, in float32 (float64 for float64)."""
        self._demand(name)
        wide = torch.promote_types(torch.float32, self.lora_A[name].dtype)
        delta: Tensor = self.settings[name].scaling * (
            self.lora_B[name].to(wide) @ self.lora_A[name].to(wide)
        )
        return delta.t() if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the active adapters to the weight, in float32, rounded once to the weight's dtype.

        Raises RuntimeError where the layer is merged already or its adapters are switched off, and ValueError
        for a sum that is not finite.
        """
        if self.merged:
            raise RuntimeError("the layer is merged already")
        if not self._enabled:
            raise RuntimeError("the layer's adapters are switched off: enable them to merge them")
        if not self._active:
            return
        original = self.weight
        total = original.to(torch.promote_types(torch.float32, original.dtype), copy=True)
        for name in self._active:
            total += self.delta_weight(name)
        merged = total.to(original.dtype)
        if not merged.is_meta and not torch.isfinite(merged).all():
            raise ValueError(f"merging adapters {self._active} gives a weight that is not finite")
        self.weight = nn.Parameter(merged, requires_grad=False)
        # Past nn.Module's setattr, which would list it among the layer's parameters.
        self.__dict__["_unmerged_weight"] = original

    def unmerge(self) -> None:
        """Puts the original weight back. Raises RuntimeError where the layer is not merged."""
        if self._unmerged_weight is None:
            raise RuntimeError("the layer is not merged")
        self.weight, self._unmerged_weight = self._unmerged_weight, None

    # nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x: …×in_features. Returns …×out_features."""
        # Past the attribute lookups of Module and ParameterDict, and without calls where there is nothing to
        # call for: a dozen of them take as long as the op itself on a small layer.
        state = self.__dict__
        if state["_batch"] is not None:
            names = state["_batch"].now()
            if names is not None:
                return self._forward_mixed(x, names)
        active = state["_active"]
        if state["_unmerged_weight"] is not None or not state["_enabled"] or not active:
            y: Tensor = self._base_class.forward(self, x)
            return y
        if GROUP in state and pays(self, x):
            together = computed_together(self, x, self.operands())
            if together is not None:
                return together
        parameters, modules = state["_parameters"], state["_modules"]
        weight = parameters.get(WEIGHT) if type(parameters) is dict else None
        if weight is None or state["fan_in_fan_out"] or GATHERED in state:
            weight = self._operand()
        # Not by get, which would look self.bias up every time.
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        if len(active) == 1:
            (name,) = active
            settings = state["settings"][name]
            return lora_linear(
                x,
                weight,
                modules["lora_A"]._parameters[name],
                modules["lora_B"]._parameters[name],
                bias,
                scaling=settings.scaling,
                dropout_p=settings.dropout,
                training=state["training"],
            )
        adapters = [
            Adapter(
                modules["lora_A"]._parameters[name],
                modules["lora_B"]._parameters[name],
                state["settings"][name].scaling,
                state["settings"][name].dropout if state["training"] else 0.0,
            )
            for name in active
        ]
        if is_sharded(weight) and any(adapter.dropout_p for adapter in adapters):
            raise NotImplementedError(
                f"adapters {active} each drop out by a mask of its own, which is not done beside a sharded "
                "weight: activate one of them"
            )
        return lora_sum(x, weight, bias, adapters)

    def _operand(self) -> Tensor:
        """The weight as the op takes it."""
        weight = held_weight(self)
        if self.__dict__["fan_in_fan_out"] and weight.dim() == 2:
            weight = weight.t()
        return autocast_copy(weight) if is_gathered(self) else weight

    def _forward_mixed(self, x: Tensor, batch: Names) -> Tensor:
        """x: batch×…×in_features, of every element of the batch its adapter."""
        self._demand_unmerged("use several adapters in one batch")
        if x.dim() < 2 or x.shape[0] != len(batch):
            raise ValueError(
                f"names: {len(batch)} adapters are given for a batch whose first dimension is not as long: "
                f"x has shape {list(x.shape)}"
            )
        names = present(batch, self.settings)
        if not names and packed_weight(self) is not None:
            names = tuple(self.settings)[:1]  # of none of the rows, so that the weight stays packed
        if not self._enabled or not names:
            y: Tensor = self._base_class.forward(self, x)
            return y
        weight = self._operand()
        if is_sharded(weight):
            raise RuntimeError("use_adapters: the weight is split over processes, which takes one adapter")
        index = adapter_index(batch, names, x.device)
        lora_a, lora_b = [self.lora_A[name] for name in names], [self.lora_B[name] for name in names]
        dropout = {self.settings[name].dropout for name in names} if self.training else {0.0}
        if len(dropout) > 1 or len({a.dtype for a in lora_a}) > 1:
            return self._forward_mixed_apart(x, index, names)
        return lora_linear_mixed(
            x,
            weight,
            lora_a,
            lora_b,
            index,
            self.bias,
            scaling=[self.settings[name].scaling for name in names],
            dropout_p=dropout.pop(),
        )

    def _forward_mixed_apart(self, x: Tensor, index: Tensor, names: tuple[str, ...]) -> Tensor:
        """For adapters that drop out differently, or differ in dtype: one after another."""
        y: Tensor = self._base_class.forward(self, x)
        for place, name in enumerate(names):
            settings = self.settings[name]
            own = (index == place).nonzero().squeeze(1)
            drops = self.training and settings.dropout > 0
            delta = reference.lora_delta(
                x.index_select(0, own),
                self.lora_A[name],
                self.lora_B[name],
                scaling=settings.scaling,
                dropout_p=settings.dropout if drops else 0.0,
                seed=seed_on(x.device, None) if drops else None,
            )
            y = y.index_add(0, own, delta.to(y.dtype))
        return y

    # Groupable

    def operands(self) -> Operands | None:
        if self._unmerged_weight is not None or not self._enabled or len(self._active) != 1:
            return None
        weight = held_weight(self)
        if is_sharded(weight) or is_gathered(self):
            return None
        if self._batch is not None and self._batch.now() is not None:
            return None
        (name,) = self._active
        settings = self.settings[name]
        modules = self._modules
        return Operands(
            weight,
            self.fan_in_fan_out,
            modules["lora_A"]._parameters[name],  # type: ignore[union-attr, arg-type]
            modules["lora_B"]._parameters[name],  # type: ignore[union-attr, arg-type]
            self._parameters["bias"],
            settings.scaling,
            settings.dropout if self.training else 0.0,
        )

    # PacksWeight

    def linear_to_pack(self) -> tuple[nn.Module, bool]:
        return self, self.fan_in_fan_out

    def needs_plain_weight(self) -> str | None:
        if self.merged:
            return "it is merged"
        if not self._enabled:
            return "its adapters are switched off"
        return None if self._active else "no adapter of it is active"

    def __repr__(self) -> str:
        # vmap asks for it as its function's name; a trace cannot spell numbers that it takes as symbols.
        return type(self).__name__ if torch.compiler.is_compiling() else super().__repr__()

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        for name, s in self.settings.items():
            active = "" if name in self._active else ", inactive"
            text += f", {name}(r={s.r}, alpha={s.alpha:g}, dropout={s.dropout:g}{active})"
        if self.merged:
            text += ", merged"
        return text if self._enabled else text + ", disabled"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        # The weight kept aside moves and converts with the rest.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._unmerged_weight is not None:
            self._unmerged_weight.data = fn(self._unmerged_weight.data)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        original = self._unmerged_weight
        if original is not None:
            destination[prefix + "weight"] = original if keep_vars else original.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Raised, not added to the list of what went wrong: the adapters, loaded next, must not change either.
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            name = f"{prefix.removesuffix('.')}: " if prefix else ""
            raise RuntimeError(f"{name}the layer is merged; unmerge it before you load a state dict")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _demand(self, name: str) -> None:
        if name not in self.settings:
            have = ", ".join(map(repr, self.settings)) or "none"
            raise KeyError(f"no adapter {name!r} in this layer; it has {have}")

    def _demand_unmerged(self, action: str) -> None:
        if self.merged:
            raise RuntimeError(f"the layer is merged: unmerge it before you {action}")


def check_adapter(name: str, dtype: torch.dtype | None) -> None:
    """Raises ValueError for a name or a dtype that no adapter can have."""
    if not name or "." in name:
        raise ValueError(f"name must be a non-empty string without dots, got {name!r}")
    if hasattr(nn.ParameterDict(), name):  # the adapters' matrices are its attributes
        raise ValueError(f"name must not be an attribute of torch.nn.ParameterDict, got {name!r}")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """Of A and B where none is asked for: masters beside 16-bit weights, else the weight's own."""
    return torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype


def obstacle(module: nn.Module) -> str | None:
    """Why `module` cannot become a LoRALinear in place; None where it can."""
    if isinstance(module, LoRALinear):
        return "it is a LoRALinear already"
    reason = linear_obstacle(module)
    if reason is None and is_gathered(module):
        return "fully_shard has it already, and would not see its adapters: put them on before"
    return reason


def linear_obstacle(module: nn.Module) -> str | None:
    """Why the op cannot stand for a module's own forward; None where it can."""
    kind = type(module)
    if not _is_plain(kind):
        return f"a {kind.__name__} is not a plain linear"
    if "forward" in module.__dict__:
        return "its forward is overridden on the instance (as offloading, quantising and sharding hooks do)"
    weight = held_weight(module)
    if not is_plain_parameter(type(plain_parameters(module).get(WEIGHT))):
        if not is_sharded(weight):
            return f"its weight is a {type(weight).__name__}, not a plain Parameter"
        from fused_lora import shards

        # How FSDP shards a weight between steps is no matter to forward.
        if not is_gathered(module):
            reason = shards.weight_obstacle(weight.t() if stores_transposed(kind) else weight)
            if reason:
                return reason
    if not _is_float(weight.dtype):
        return f"its weight is {weight.dtype}"
    if is_partitioned(weight):
        return "its weight is partitioned (ZeRO-3)"
    return None


@constant
def _is_plain(kind: type) -> bool:
    return qualified(kind) in PLAIN_LINEARS


@constant
def _is_float(dtype: torch.dtype) -> bool:
    return dtype in FLOATS


@constant
def is_plain_parameter(kind: type) -> bool:
    """Whether tensors of this class are plain Parameters; also those that stand for them in a trace."""
    return kind in _PLAIN_PARAMETERS


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds a Parameter, which has its data only while that gathers it."""
    return hasattr(parameter, "ds_id")


def linear_features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a plain linear or a LoRALinear."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    out_features, in_features = weight_of(module).shape
    return in_features, out_features


def operand_of(module: nn.Module) -> Tensor:
    """A plain linear's weight as the op takes it: packed where it is, else as `weight_of` has it."""
    weight = held_weight(module)
    return weight.t() if weight.dim() == 2 and stores_transposed(type(module)) else weight


def weight_of(module: nn.Module) -> Tensor:
    """A plain linear's weight as out_features×in_features, a view where it is stored otherwise."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if stores_transposed(type(module)) else weight


@constant
def stores_transposed(kind: type[nn.Module]) -> bool:
    return PLAIN_LINEARS.get(qualified(kind), False)


def _write(parameter: Tensor, matrix: Tensor) -> None:
    """The numbers of a whole matrix into a Parameter, which may be sharded."""
    if is_sharded(parameter):
        from fused_lora import shards

        matrix = shards.placed_as(matrix, parameter)
    with torch.no_grad():
        parameter.copy_(matrix)


def _writable_as(parameter: Tensor, matrix: Tensor) -> bool:
    same = parameter.shape == matrix.shape and parameter.dtype == matrix.dtype
    return same and not parameter.is_inference()


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def qualified(kind: type) -> str:
    """A class's name and whence it comes, to know it by without an import."""
    return f"{kind.__module__}.{kind.__qualname__}"
