"""LSTM, GRU and RNN with ONNX's order of gates: PyTorch's fused kernels where they do the same, else step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from hasten.torchview.operators.operator import Function, Operator, Site, Tensor

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]
"""The hidden state, and of an LSTM the cell state: [batch, hidden] each."""

_PLAIN: Mapping[str, Activation] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softsign": F.softsign,
    "softplus": F.softplus,
}

_WITH_ALPHA: Mapping[str, tuple[float, Callable[[Tensor, float], Tensor]]] = {
    "leakyrelu": (0.01, F.leaky_relu),
    "elu": (1.0, F.elu),
    "thresholdedrelu": (1.0, lambda x, alpha: torch.where(x > alpha, x, 0.0)),
}

_WITH_BOTH: Mapping[str, tuple[float, float, Callable[[Tensor, float, float], Tensor]]] = {
    "hardsigmoid": (0.2, 0.5, lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0.0, 1.0)),
    "affine": (1.0, 0.0, lambda x, alpha, beta: alpha * x + beta),
    "scaledtanh": (1.0, 1.0, lambda x, alpha, beta: alpha * torch.tanh(beta * x)),
}

DEFAULTS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
TORCH_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""Where PyTorch's gates stand in ONNX's: LSTM i, f, g, o in i, o, f, c; GRU r, z, n in z, r, h."""


@dataclass(frozen=True)
class Layer:
    """The settings of a recurrent node."""

    kind: str
    directions: tuple[str, ...]
    activations: tuple[tuple[Activation, ...], ...]
    """For each direction."""
    names: tuple[str, ...]
    clip: float | None
    batch_first: bool
    input_forget: bool
    reset_first: bool
    """Of a GRU: the reset gate applies before the product, where PyTorch applies it after."""

    @property
    def fused(self) -> bool:
        """Tell whether PyTorch has a kernel for it."""
        usual = self.names in (DEFAULTS[self.kind] * len(self.directions), ("relu",) * len(self.directions))
        usual = usual and (self.kind == "RNN" or self.names[0] == "sigmoid")
        return usual and self.clip is None and not self.input_forget and not self.reset_first


@dataclass(frozen=True)
class Weights:
    """The tensors of one direction, as ONNX has them."""

    w: Tensor
    r: Tensor
    b_w: Tensor | None
    b_r: Tensor | None
    peepholes: Tensor | None


def run_layer(
    layer: Layer,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    p: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Run a recurrent node; gives Y, Y_h, and of an LSTM Y_c.

    Args:
        layer: Its settings.
        x: [length, batch, input], or [batch, length, input] with ``batch_first``.
        w: [directions, gates * hidden, input].
        r: [directions, gates * hidden, hidden].
        b: [directions, 2 * gates * hidden].
        lengths: [batch], how many steps of each row count.
        h: The hidden state at first: [directions, batch, hidden].
        c: The cell state at first: [directions, batch, hidden].
        p: The peepholes of an LSTM: [directions, 3 * hidden].
    """
    if layer.fused and lengths is None and p is None:
        return run_fused(layer, x, b, h, c, *_in_torch_order(layer, w, r))
    x, states = _started(layer, x, w, r.shape[2], h, c)
    count = len(layer.directions)
    parts = [Weights(w[d], r[d], *_biases(b, d), None if p is None else p[d]) for d in range(count)]
    ran = [_steps(layer, d, x, parts[d], tuple(s[d] for s in states), lengths) for d in range(count)]
    final = tuple(torch.stack([state[i] for _, state in ran]) for i in range(len(states)))
    return _finished(layer, torch.stack([output for output, _ in ran], 1), final)


def run_fused(
    layer: Layer, x: Tensor, b: Tensor | None, h: Tensor | None, c: Tensor | None, *weights: Tensor
) -> tuple[Tensor, ...]:
    """Run a recurrent node with PyTorch's kernel.

    Args:
        layer: Its settings.
        x: As ``run_layer`` takes it.
        b: The biases, as ``run_layer`` takes them.
        h: The hidden state at first, or None.
        c: The cell state at first, or None.
        weights: For each direction w [gates * hidden, input] and r [gates * hidden, hidden], the gates in PyTorch's
            order.
    """
    count, hidden = len(layer.directions), weights[1].shape[1]
    x, states = _started(layer, x, weights[0], hidden, h, c)
    states = tuple(state.contiguous() for state in states)  # cuDNN takes no others
    flat = _with_biases(layer, weights, b)
    backwards = layer.directions == ("reverse",)
    x = x.flip(0) if backwards else x
    # The last arguments: layers, dropout, training (a kernel that keeps what gradients need), both ways, batch first.
    rest = (flat, b is not None, 1, 0.0, torch.is_grad_enabled(), count == 2, False)
    with _computable(x):
        if layer.kind == "LSTM":
            y, *final = torch.lstm(x, states, *rest)
        else:
            relu = layer.kind == "RNN" and layer.names[0] == "relu"
            run = torch.gru if layer.kind == "GRU" else torch.rnn_relu if relu else torch.rnn_tanh
            y, *final = run(x, states[0], *rest)
    y = y.reshape(y.shape[0], y.shape[1], count, hidden).transpose(1, 2)
    return _finished(layer, y.flip(0) if backwards else y, tuple(final))


def _computable(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Leave mixed precision where this processor's kernel for it is missing: oneDNN has no bfloat16 LSTM below AVX-512.

    Weights and states are float32 there, as autocast casts only what an operator is called with.
    """
    mixed = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    missing = mixed and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    plain: contextlib.AbstractContextManager[object] = torch.autocast("cpu", enabled=False)
    return plain if missing else contextlib.nullcontext()


def _started(
    layer: Layer, x: Tensor, like: Tensor, hidden: int, h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, State]:
    """Give x [length, batch, input] and the states at first [directions, batch, hidden], in the weights' dtype."""
    x = x.to(like.dtype)
    if layer.batch_first:
        x, h, c = x.transpose(0, 1), _swapped(h), _swapped(c)
    given = (h, c) if layer.kind == "LSTM" else (h,)
    size = (len(layer.directions), x.shape[1], hidden)
    return x, tuple(x.new_zeros(size) if state is None else state.to(like.dtype) for state in given)


def _finished(layer: Layer, y: Tensor, final: State) -> tuple[Tensor, ...]:
    """Give y [length, directions, batch, hidden] and the last states as the node's layout has them."""
    if layer.batch_first:
        return y.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in final)
    return y, *final


def _swapped(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.transpose(0, 1)


def _biases(b: Tensor | None, d: int) -> tuple[Tensor | None, Tensor | None]:
    if b is None:
        return None, None
    half = b.shape[1] // 2
    return b[d, :half], b[d, half:]


def _in_torch_order(layer: Layer, w: Tensor, r: Tensor) -> list[Tensor]:
    """Give w and r of each direction as PyTorch's kernels take them."""
    order, hidden = TORCH_ORDER[layer.kind], r.shape[2]
    parts = [part for d in range(len(layer.directions)) for part in (w[d], r[d])]
    if len(order) == 1:
        return parts
    return [torch.cat([part.split(hidden)[gate] for gate in order]) for part in parts]


def _with_biases(layer: Layer, weights: Sequence[Tensor], b: Tensor | None) -> list[Tensor]:
    """Give w, r and both biases of each direction, one after the other."""
    if b is None:
        return list(weights)
    order = TORCH_ORDER[layer.kind]
    gates = b.reshape(b.shape[0], 2, len(order), -1)  # [directions, of w and of r, gates, hidden]
    moved = gates[:, :, list(order)].reshape(2 * b.shape[0], -1).unbind() if len(order) > 1 else gates.flatten(0, 1)
    biases = [bias.reshape(-1) for bias in moved]
    return [part for d in range(b.shape[0]) for part in (*weights[2 * d : 2 * d + 2], *biases[2 * d : 2 * d + 2])]


def _steps(
    layer: Layer, d: int, x: Tensor, weights: Weights, state: State, lengths: Tensor | None
) -> tuple[Tensor, State]:
    """Run one direction step by step; gives [length, batch, hidden] and the last state."""
    cell = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}[layer.kind]
    projected = F.linear(x, weights.w, weights.b_w)  # [length, batch, gates * hidden]
    outputs: list[Tensor] = []
    times = range(x.shape[0])
    for t in reversed(times) if layer.directions[d] == "reverse" else times:
        fresh = cell(layer, layer.activations[d], projected[t], weights, state)
        if lengths is None:
            state = fresh
            outputs.append(state[0])
        else:
            counts = (lengths > t)[:, None]
            outputs.append(torch.where(counts, fresh[0], 0.0))
            state = tuple(torch.where(counts, new, old) for new, old in zip(fresh, state, strict=True))
    if layer.directions[d] == "reverse":
        outputs.reverse()
    return torch.stack(outputs), state


def _lstm(layer: Layer, activations: Sequence[Activation], x: Tensor, weights: Weights, state: State) -> State:
    h, c = state
    f, g, last = activations
    i, o, forget, cell = (x + F.linear(h, weights.r, weights.b_r)).chunk(4, 1)
    if weights.peepholes is not None:
        p_i, p_o, p_f = weights.peepholes.chunk(3)
        i, forget = i + p_i * c, forget + p_f * c
    i = f(_clipped(layer, i))
    forget = 1.0 - i if layer.input_forget else f(_clipped(layer, forget))
    c = forget * c + i * g(_clipped(layer, cell))
    o = o if weights.peepholes is None else o + p_o * c
    return f(_clipped(layer, o)) * last(c), c


def _gru(layer: Layer, activations: Sequence[Activation], x: Tensor, weights: Weights, state: State) -> State:
    (h,) = state
    f, g = activations
    hidden = h.shape[1]
    r_zr, r_h = weights.r.split([2 * hidden, hidden])
    b_zr, b_h = (None, None) if weights.b_r is None else weights.b_r.split([2 * hidden, hidden])
    x_zr, x_h = x.split([2 * hidden, hidden], 1)
    z, reset = f(_clipped(layer, x_zr + F.linear(h, r_zr, b_zr))).chunk(2, 1)
    inner = F.linear(reset * h, r_h, b_h) if layer.reset_first else reset * F.linear(h, r_h, b_h)
    fresh = g(_clipped(layer, x_h + inner))
    return ((1.0 - z) * fresh + z * h,)


def _rnn(layer: Layer, activations: Sequence[Activation], x: Tensor, weights: Weights, state: State) -> State:
    return (activations[0](_clipped(layer, x + F.linear(state[0], weights.r, weights.b_r))),)


def _clipped(layer: Layer, x: Tensor) -> Tensor:
    return x if layer.clip is None else torch.clamp(x, -layer.clip, layer.clip)


def read_layer(site: Site) -> Layer:
    """Read a node's settings.

    Raises:
        Unsupported: names an activation that the table lacks.
    """
    kind = site.node.op_type
    direction = site.get("direction", "forward")
    directions = ("forward", "reverse") if direction == "bidirectional" else (direction,)
    names = tuple(name.lower() for name in site.get("activations") or DEFAULTS[kind] * len(directions))
    per = len(DEFAULTS[kind])
    functions = _activations(site, names)
    return Layer(
        kind=kind,
        directions=directions,
        activations=tuple(functions[d * per : (d + 1) * per] for d in range(len(directions))),
        names=names,
        clip=site.get("clip"),
        batch_first=bool(site.get("layout", 0)),
        input_forget=bool(site.get("input_forget", 0)),
        reset_first=kind == "GRU" and not site.get("linear_before_reset", 0),
    )


def _bind(site: Site) -> Function:
    return partial(run_layer, read_layer(site))


def _activations(site: Site, names: Sequence[str]) -> tuple[Activation, ...]:
    """Make the functions; those that take alpha or beta use up the numbers given, in order."""
    alphas, betas = list(site.get("activation_alpha") or ()), list(site.get("activation_beta") or ())
    found: list[Activation] = []
    for name in names:
        if name in _PLAIN:
            found.append(_PLAIN[name])
        elif name in _WITH_ALPHA:
            alpha, single = _WITH_ALPHA[name]
            found.append(_with(single, alphas.pop(0) if alphas else alpha))
        elif name in _WITH_BOTH:
            alpha, beta, double = _WITH_BOTH[name]
            found.append(_with(double, alphas.pop(0) if alphas else alpha, betas.pop(0) if betas else beta))
        else:
            raise site.refuse(f"has the activation {name!r}, which the table does not know")
    return tuple(found)


def _with(function: Callable[..., Any], *numbers: float) -> Activation:
    return lambda x: function(x, *numbers)


_ATTRIBUTES = frozenset(
    ("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "layout")
)

TABLE: Mapping[str, Operator] = {
    "LSTM": Operator(bind=_bind, attributes=_ATTRIBUTES | {"input_forget"}, many=True),
    "GRU": Operator(bind=_bind, attributes=_ATTRIBUTES | {"linear_before_reset"}, many=True),
    "RNN": Operator(bind=_bind, attributes=_ATTRIBUTES, many=True),
}
