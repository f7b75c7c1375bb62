"""Times an operator and its peers: compared with the reference first, then in interleaved rounds."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gingham.bench.definition import CannotRun, Case, Function, Operator, Pass, Peer
from gingham.bench.machine import cache_bytes, clock
from gingham.bench.results import Row, Timing, Yardstick

# Largest deviation from the float64 reference, in units of the largest value, with which a peer still counts as right.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

_SAMPLE_SECONDS = 2e-3  # a sample repeats its call until it lasts this long, far above the clock's resolution
_MOST_SETS = 32


class Arguments(NamedTuple):
    """One set of inputs, and the gradient of the output that the backward pass starts from."""

    inputs: tuple[Tensor, ...]
    grad_output: Tensor | None


@dataclass(frozen=True)
class Setting:
    """How a case is run."""

    dtype: torch.dtype
    layout: str
    threads: int
    direction: Pass
    device: torch.device

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        seconds: time for each peer of a row, after its first three rounds.
        rounds: most rounds.
        longest_call: a peer that needs more seconds than this for one call is left out.
        memory: bytes that a peer's call may be expected to take on the CPU; on a GPU it is half of the GPU's memory.
    """

    seconds: float
    rounds: int
    longest_call: float
    memory: float = 4e9


@dataclass
class Expectations:
    """Results of the float64 reference, kept for the case in hand only: they are large."""

    operator: Operator
    seed: int
    _key: tuple[str, torch.dtype, bool] | None = None
    _value: tuple[Tensor, ...] = field(default=())

    def get(self, case: Case, setting: Setting) -> tuple[Tensor, ...]:
        """Output (and gradients of the differentiable inputs) for the first set of inputs."""
        training = setting.direction is Pass.TRAINING
        key = (case.label, setting.dtype, training)
        if key != self._key:
            arguments = draw(self.operator, case, setting, self.seed)
            exact = tuple(
                tensor.detach() if index in case.keep_dtype else _cast(tensor.detach(), torch.float64)
                for index, tensor in enumerate(arguments.inputs)
            )
            grad = None if arguments.grad_output is None else arguments.grad_output.double()
            self._value = ()
            run = bind(self.operator, self.operator.reference(case), setting.direction)
            with grad_mode(setting.direction):
                self._value = run(Arguments(_want_gradients(self.operator, exact, setting.direction), grad))
            self._key = key
        return self._value


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _want_gradients(operator: Operator, inputs: tuple[Tensor, ...], direction: Pass) -> tuple[Tensor, ...]:
    if direction is not Pass.FORWARD:
        for index in operator.differentiable:
            inputs[index].requires_grad_()
    return inputs


def draw(operator: Operator, case: Case, setting: Setting, seed: int) -> Arguments:
    """Fresh inputs of a case; the same seed gives the same numbers in every memory format and on every device."""
    generator = torch.Generator().manual_seed(seed)

    def place(tensor: Tensor, dtype: torch.dtype = setting.dtype) -> Tensor:
        placed = _cast(tensor, dtype).to(setting.device)
        if tensor.ndim == 5:  # frames or shots, each a batch of maps
            maps = placed.flatten(0, 1).contiguous(memory_format=LAYOUTS[setting.layout])
            return maps.unflatten(0, tensor.shape[:2])
        return placed.contiguous(memory_format=LAYOUTS[setting.layout] if tensor.ndim == 4 else torch.contiguous_format)

    inputs = tuple(
        place(tensor, torch.promote_types(tensor.dtype, setting.dtype) if index in case.keep_dtype else setting.dtype)
        for index, tensor in enumerate(case.inputs(generator))
    )
    grad_output = None
    if setting.direction is Pass.TRAINING:
        meta = operator.reference(case)(*(tensor.to("meta") for tensor in inputs))
        grad_output = place(torch.randn(meta.shape, generator=generator))
    return Arguments(_want_gradients(operator, inputs, setting.direction), grad_output)


def grad_mode(direction: Pass) -> contextlib.AbstractContextManager[object]:
    """Gradients are recorded in the passes that ask for them only."""
    return torch.no_grad() if direction is Pass.FORWARD else torch.enable_grad()


def bind(operator: Operator, function: Function, direction: Pass) -> Callable[[Arguments], tuple[Tensor, ...]]:
    """The call that is timed: the output, and in training the gradients of the differentiable inputs after it."""

    def forward(arguments: Arguments) -> tuple[Tensor, ...]:
        return (function(*arguments.inputs),)

    def training(arguments: Arguments) -> tuple[Tensor, ...]:
        output = function(*arguments.inputs)
        wanted = [arguments.inputs[index] for index in operator.differentiable]
        return (output, *torch.autograd.grad(output, wanted, arguments.grad_output))

    return training if direction is Pass.TRAINING else forward


def deviation(result: tuple[Tensor, ...], expected: tuple[Tensor, ...], undecided: float = 0.0) -> float:
    """Largest deviation of any tensor, each in units of the largest value expected of it; NaN counts as infinite.

    Of each tensor the share `undecided` that deviates most is left out.
    """
    worst = 0.0
    for ours, exact in zip(result, expected, strict=True):
        if exact.numel():
            differences = (ours.detach().to(exact.device, torch.float64) - exact.detach()).abs()
            left_out = int(undecided * differences.numel())
            difference = (
                differences.flatten().topk(left_out + 1).values[-1].item() if left_out else differences.max().item()
            )
            if left_out and differences.isnan().any():
                difference = math.nan
            worst = max(
                worst, math.inf if math.isnan(difference) else difference / max(exact.abs().max().item(), 1e-30)
            )
    return worst


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    if isinstance(error, CannotRun):
        return line
    line = f"cannot run: {type(error).__name__}: {line}"
    return line if len(line) <= 160 else line[:157] + "..."


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reject_expensive(peer: Peer, case: Case, setting: Setting, yardstick: Yardstick, budget: Budget) -> None:
    if peer.operations is not None:
        seconds = peer.operations(case, setting.direction) / yardstick.matmul
        if seconds > budget.longest_call:
            raise CannotRun(f"left out: one call was expected to take more than {budget.longest_call:g} s")
    if peer.memory is not None:
        needed = peer.memory(case, setting.direction) * setting.dtype.itemsize / 4
        if needed > budget.memory:
            raise CannotRun(f"left out: one call was expected to take more than {budget.memory / 1e9:g} GB")


@dataclass
class _Contender:
    run: Callable[[Arguments], object]
    calls: int
    samples: list[float] = field(default_factory=list)
    spent: float = 0.0


def measure_row(
    operator: Operator, case: Case, setting: Setting, budget: Budget, yardstick: Yardstick, expectations: Expectations
) -> Row:
    """Compare every peer with the reference, then time those that are right, round by round.

    A peer that raises, is wrong or would take too long is listed in the row's failures with the reason.
    """
    device, direction = setting.device, setting.direction
    budget = replace(budget, longest_call=max(budget.longest_call, case.longest_call))
    if device.type == "cuda":
        budget = replace(budget, memory=torch.cuda.get_device_properties(device).total_memory / 2)
    timings: dict[str, Timing] = {}
    errors: dict[str, float] = {}
    failures: dict[str, str] = {}
    contenders: dict[str, _Contender] = {}
    if "torch._dynamo" in sys.modules:
        # What earlier rows compiled counts against the limit of recompilations, past which a function runs uncompiled.
        torch._dynamo.reset()
    with _torch_threads(setting.threads), grad_mode(direction):
        first = draw(operator, case, setting, expectations.seed)
        for peer in operator.peers:
            try:
                _reject_expensive(peer, case, setting, yardstick, budget)
                run = bind(operator, peer.build(case, device), direction)
                result = run(first)
                if peer.same_result:
                    errors[peer.name] = deviation(result, expectations.get(case, setting), operator.undecided)
                    if errors[peer.name] > TOLERANCE[setting.dtype]:
                        raise CannotRun(f"wrong result: deviates by {errors[peer.name]:.1g} of the largest value")
                del result
                seconds = clock(lambda run=run: run(first), device)  # type: ignore[misc]
                if seconds > budget.longest_call:
                    raise CannotRun(f"left out: one call takes more than {budget.longest_call:g} s")
            except Exception as error:  # a peer's failure, whatever it is, belongs in the report
                failures[peer.name] = _first_line(error)
                continue
            contenders[peer.name] = _Contender(run, max(1, math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-7))))

        size = sum(tensor.numel() * tensor.element_size() for tensor in first.inputs)
        sets = min(_MOST_SETS, 1 + math.ceil(2 * cache_bytes(device) / max(size, 1)))
        arguments = [first, *(draw(operator, case, setting, expectations.seed + 1 + i) for i in range(sets - 1))]
        _time_in_rounds(contenders, arguments, budget, device)
        timings = {name: Timing(tuple(contender.samples)) for name, contender in contenders.items()}
    return Row(
        case=case.label,
        dtype=setting.dtype_name,
        layout=setting.layout,
        threads=setting.threads,
        direction=direction.value,
        operations=case.operations[direction],
        moved=case.elements[direction] * setting.dtype.itemsize,
        timings=timings,
        errors=errors,
        failures=failures,
        other=tuple(peer.name for peer in operator.peers if not peer.same_result),
    )


def _time_in_rounds(
    contenders: dict[str, _Contender], arguments: list[Arguments], budget: Budget, device: torch.device
) -> None:
    """Every peer once a round, in an order that turns, each time on the next sets of inputs."""
    supply = itertools.cycle(arguments)

    def repeat(contender: _Contender) -> None:
        for _ in range(contender.calls):
            contender.run(next(supply))

    gc.collect()
    gc.disable()
    try:
        for turn in range(budget.rounds):
            active = [c for c in contenders.values() if len(c.samples) < 3 or c.spent < budget.seconds]
            if not active:
                break
            start = turn % len(active)
            for contender in active[start:] + active[:start]:
                seconds = clock(lambda contender=contender: repeat(contender), device)  # type: ignore[misc]
                contender.samples.append(seconds / contender.calls)
                contender.spent += seconds
    finally:
        gc.enable()
