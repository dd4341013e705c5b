"""The Gauss-Newton diagonal: one backward pass for each output factor, squares summed layer by layer.

``G = sum_n J_n^T H_n J_n`` over samples, ``H_n = S_n S_n^T`` the loss's second derivative at the output. Exactly:
``diag G = sum_n sum_c (J_n^T S_n e_c)^2``, a pass for each column c. By Monte Carlo: one pass with random signs r_n
gives ``sum_n (J_n^T S_n r_n)^2``, whose mean it is; signs are fresh for each sample, so samples do not mix. Draws
come in blocks whose signs are orthogonal (Hadamard): a block of as many draws as there are factors is exact, and one of
four loses 60 times less than four independent draws on a trained network (bench_hessian.py). Up to four draws are
dealt to the samples by what they carry (:mod:`deal`): a trained CNN's diagonal errs 6 % instead of 29 % in less time.

What four draws cost at least, in gradients of three products a layer: 1/3 forward, then 2/3 a draw, where the squares
take as long as the products behind them: 3. Less is to be had where zeros are skipped (behind max-pooling; dense layers
behind ReLU), where squares of several draws are added first (dense layers), and by looking at fewer samples. Where only
known layers, ReLU, max-pooling and reshapes stand between the loss and the input (:mod:`chained`), gradients go from
layer to layer by hand, all factors in one product, and those of the dealt rows alone. Through an LSTM's steps
(:mod:`lstm`) draws, whose own error is percents, go in products of bfloat16 with float32 sums where the CPU has them:
twice as fast in a Zen 4's vectors, five times in AMX's tiles, their trace off by less than 1e-4. So they do through
dense layers where the CPU has the tiles, and square there (5e-4). The exact sum never does, nor do hundreds of draws.

Parameters that no known layer owns (or that several use, or that see samples mixed by batch statistics) are
handled with what always holds: a draw squares the gradient of the whole batch, equally unbiased but noisier; the
exact sum makes a pass for each sample and column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from autoflip.curvature.chained import Chained
from autoflip.curvature.deal import Rows, rows_for
from autoflip.curvature.graph import Graph, inspect
from autoflip.curvature.layer import Layer
from autoflip.curvature.layers import watch
from autoflip.curvature.mixing import close, mixes
from autoflip.curvature.problem import Problem
from autoflip.curvature.recurrent import unrolled
from autoflip.curvature.root import Root, output_root, side_by_side
from autoflip.curvature.signs import signs_of

Diagonal = dict[str, Tensor]
_MOST_COARSE = 256  # draws: the mean of more may err by no more than rounding to bfloat16 does
_FEW_FACTORS = 4  # a trace's block of draws is exact for so many
_MAX_BLOCK_BITS = 6  # a block of 64 draws is exact for up to 64 factors


class MixedError(ValueError):
    """Several clients cannot be looked at in one pass; the message says why."""


@dataclass
class GaussNewton:
    """One forward pass, its graph and the factors of its loss.

    Attributes:
        problem: model, loss and the whole batch.
        output: of the pass: of the batch, or of the rows dealt from it.
        ran: the known layers that ran.
        root: the loss's factors on the whole batch.
        shape: of the whole batch's output.
        segments: each client's samples; empty for one client.
        rows: what was dealt; None when every sample is a row.
    """

    problem: Problem
    output: Tensor
    ran: list[Layer]
    root: Root
    shape: tuple[int, ...]
    seed: int
    chunk: int | None
    segments: Sequence[slice] = ()
    rows: Rows | None = None

    @staticmethod
    def of(problem: Problem, seed: int, chunk: int | None, counts: Sequence[int] = ()) -> GaussNewton:
        """Run the model once and look at it.

        Args:
            problem: its batch may be several clients' one after the other.
            seed: of the draws.
            chunk: factors held at once; None: as many as suit each layer.
            counts: samples of each client; each has its own loss and its own sums. Empty: one client.

        Raises:
            NotDescribedError: a Gauss-Newton matrix does not describe this loss.
            MixedError: there are several clients, and not every parameter can be told apart by samples.
            ValueError: model, loss or batch do not fit (see Problem).
        """
        output, ran = _forward(problem)
        shape = tuple(output.shape)
        if len(counts) < 2:
            return GaussNewton(problem, output, ran, output_root(problem, output, seed), shape, seed, chunk)
        ends = list(accumulate(counts))
        segments = [slice(end - count, end) for end, count in zip(ends, counts)]
        if len(output) != problem.samples:
            raise MixedError("curvature: samples cannot be told apart in the output")
        parts = [replace(problem, inputs=problem.inputs[s], target=problem.target[s]) for s in segments]
        root = side_by_side([output_root(part, output[s], seed) for part, s in zip(parts, segments)], segments)
        gn = GaussNewton(problem, output, ran, root, shape, seed, chunk, segments)
        if gn.rest:
            raise MixedError(f"curvature: samples cannot be told apart for {', '.join(gn.rest[:3])}")
        return gn

    def dealt(self, draws: int) -> GaussNewton:
        """Deal ``draws`` to the samples by their curvature, and look at those rows only; this object is used up.

        A chain of known layers goes on with the rows of what it read; other models run again on them. Every sample
        stays a row, looked at ``draws`` times, where dealing saves nothing (:func:`deal.rows_for`), and where the model
        does not say the same about a sample whatever else is in the batch (dropout, batch statistics, parameters of
        unknown layers).
        """
        if self.segments or len(self.shape) != 2 or self.shape[0] != self.problem.samples:
            return self
        rows = rows_for(self.root, self.output, self.seed, draws, again=self.chain is None)
        if rows is None:
            return self
        if self.chain is not None:
            self.rows = rows
            for layer in self.chain:
                layer.only(rows)
            return self
        at = rows.samples
        whole, self.output, self.ran = self.output.detach(), self.output.detach(), []  # lets the graph go
        problem = replace(self.problem, inputs=self.problem.inputs[at], target=self.problem.target[at])
        try:
            output, ran = _forward(problem)
        except RuntimeError:  # a batch of another size does not pass
            return GaussNewton.of(self.problem, self.seed, self.chunk)
        gn = replace(self, output=output, ran=ran, rows=rows)
        alike = output.shape[0] == len(at) and close(output.detach(), whole[at])
        apart = alike and not gn.rest and not gn.graph.coupled
        return gn if apart else GaussNewton.of(self.problem, self.seed, self.chunk)

    @cached_property
    def graph(self) -> Graph:
        """What autograd's graph says about the model."""
        return inspect(self.output, self.problem.params, {layer.edge.node for layer in self.ran})

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers whose parameters' squares are summed where they ran: none where samples are not independent."""
        layers = [] if self.graph.coupled else self._alone()
        self.__dict__["chain"] = chained = self._chained(layers) if layers else None  # nothing mixes there
        # rows that were dealt were looked at before
        known = chained or self.rows is not None or self.graph.by_rows(self.output)
        # what mixes clients before the first parameter has no node in the graph
        if (known and not self.segments) or not mixes(self.problem, self.output):
            return layers
        self.__dict__["chain"] = None
        return []

    def _alone(self) -> list[Layer]:
        graph = self.graph
        layers = graph.alone(self.ran, self.problem.params)
        for layer in layers:
            layer.seen_through(graph.readers)
        for layer in layers:
            layer.follow(layers, graph.readers)
            layer.segments = list(self.segments) or layer.segments
            if layer.run is not None:
                layer.run.weight_gradient = False
        return layers

    @cached_property
    def chain(self) -> list[Chained] | None:
        """The layers, where gradients pass from the output to all of them by hand; samples do not mix there."""
        return self._chained(self.layers)

    def _chained(self, layers: list[Layer]) -> list[Chained] | None:
        fed = {id(layer.before) for layer in layers}
        last = [layer for layer in layers if id(layer) not in fed]
        chain = [layer for layer in layers if isinstance(layer, Chained)]
        whole = len(last) == 1 and len(chain) == len(layers) and not self._left(layers)
        return chain if whole and last[0].edge.node is self.output.grad_fn else None

    @cached_property
    def rest(self) -> list[str]:
        """Names of the parameters that no layer owns."""
        return self._left(self.layers)

    def _left(self, layers: list[Layer]) -> list[str]:
        owned = {id(p) for layer in layers for p in layer.params.values()}
        return [name for name, p in self.problem.params.items() if id(p) not in owned and name in self.graph.uses]

    def exact(self) -> list[Diagonal]:
        """Return the diagonal of G, one a client.

        Raises:
            ValueError: the output's rows are not the batch's samples.
        """
        if self.output.shape[0] != self.problem.samples:
            raise ValueError(
                f"curvature: 'ggn-exact' needs one output row a sample, but the model made {self.output.shape[0]} "
                f"rows of {self.problem.samples} samples; return (samples, classes, positions) or use 'ggn-mc'"
            )
        total = self._empty()
        self._chunks(self.root.factors, coarse=False)
        if self.chain and self.root.softmax and self.chain[-1].all_of_softmax(*self.root.softmax):
            return self._collect(total)
        for column in self.root.columns():
            self._backward(column, [])
            for n in range(len(column)) if self.rest else ():
                alone = torch.zeros_like(column)
                alone[n] = column[n]
                self._backward(alone, self.rest, total, layers=False)
        return self._collect(total)

    def blocks(self, count: int, size: int) -> Iterator[list[Diagonal]]:
        """Yield the means of ``count`` independent blocks of ``size`` draws, one a client; a backward pass a draw."""
        for i in range(count):
            yield self._mean(range(i * size, (i + 1) * size), size, coarse=count * size <= _MOST_COARSE)

    def mean(self, count: int) -> list[Diagonal]:
        """Return the mean of ``count`` draws, one a client; a layer squares several at once.

        Rows that were dealt are looked at as they were, which ``dealt`` knew ``count`` for.
        """
        if self.rows is not None:
            return self._dealt_mean(self.rows)
        block = 1 << min(count.bit_length() - 1, _MAX_BLOCK_BITS)
        return self._mean(range(count), block, coarse=count <= _MOST_COARSE)

    def _dealt_mean(self, rows: Rows) -> list[Diagonal]:
        self._chunks(1, coarse=True)
        self._backward(rows.v, [])
        return self._collect({})

    def _mean(self, draws: range, block: int, *, coarse: bool) -> list[Diagonal]:
        total = self._empty()
        self._chunks(len(draws), coarse=coarse)
        for i in draws:
            self._backward(
                self.root.draw(signs_of(self.output, self.shape, self.seed, i, block), None), self.rest, total
            )
        means = self._collect(total)
        if len(draws) == 1:
            return means
        return [{name: value / len(draws) for name, value in mean.items()} for mean in means]

    def _chunks(self, count: int, *, coarse: bool) -> None:
        """Cut ``count`` factors evenly, so that no layer squares a last one by itself."""
        # of few factors draws are exact, and an error that is left would be the rounding's
        coarse = coarse and self.root.factors > _FEW_FACTORS
        for layer in self.layers:
            layer.coarse = coarse
            layer.chunk = -(-count // -(-count // (self.chunk or layer.chunk)))

    def _empty(self) -> Diagonal:
        """Return zeros for what the layers do not own."""
        return {name: torch.zeros_like(self.problem.params[name], requires_grad=False) for name in self.rest}

    def _backward(self, v: Tensor, names: list[str], total: Diagonal | None = None, *, layers: bool = True) -> None:
        if layers and self.chain is not None:
            self.chain[-1].add(v.to(self.output.dtype))
            return
        fed = {id(layer.before) for layer in self.layers}
        asked = [layer for layer in self.layers if id(layer) not in fed] if layers else []
        edges = [layer.edge for layer in asked] + [get_gradient_edge(self.problem.params[name]) for name in names]
        if not edges:
            return
        gradients = torch.autograd.grad(
            self.output, edges, v.to(self.output.dtype), retain_graph=True, allow_unused=True
        )
        for layer, d in zip(asked, gradients):
            if d is not None:
                layer.add(d)
        for name, g in zip(names, gradients[len(asked) :]):
            if g is not None and total is not None:
                total[name] += g.square()

    def _collect(self, total: Diagonal) -> list[Diagonal]:
        names = {id(p): name for name, p in self.problem.params.items()}
        clients = [total] + [{} for _ in (self.layers[0].segments[1:] if self.layers else ())]
        for layer in reversed(self.layers):  # a layer's flush may feed the one before it
            for client, short, value in layer.take():
                param = layer.params[short]
                clients[client][names[id(param)]] = value.to(param.dtype)
        params = self.problem.params
        # a parameter that the output does not depend on has no curvature
        return [
            self.problem.kept(
                {n: c[n] if n in c else torch.zeros_like(p, requires_grad=False) for n, p in params.items()}
            )
            for c in clients
        ]


def _forward(problem: Problem) -> tuple[Tensor, list[Layer]]:
    """Run the model; return its output and the known layers that ran."""
    modules, samples = problem.modules, problem.samples
    with watch(modules, samples) as ran, unrolled(modules, samples, ran):
        return problem.output(), ran
