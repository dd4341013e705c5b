"""What autograd's graph says about a model: is it piecewise linear in each parameter, and where is each used.

The graph is what ran, so functional code counts as much as modules do. A parameter tensor enters piecewise
linearly when every operation on its way to the output is piecewise linear, and no product multiplies two things
that both depend on it. Then the Hessian's block of that tensor is its Gauss-Newton block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autoflip.curvature.layer import Layer

# autograd node names without "Backward0"; a name that is not here counts as curved
_LINEAR_NAMES = """
    Add Sub Neg View UnsafeView Reshape ReshapeAlias T Transpose Permute Squeeze Unsqueeze Expand Slice Select Cat
    Stack Clone Copy Copies CopySlices ToCopy Sum Mean Index IndexSelect Gather Split SplitWithSizes Unbind Narrow
    Alias Detach ConstantPadNd ReflectionPad1D ReflectionPad2D ReplicationPad1D ReplicationPad2D Flip Roll AsStrided
    AvgPool2D AdaptiveAvgPool2D MkldnnAdaptiveAvgPool2D UpsampleNearest2D UpsampleBilinear2D Embedding Repeat
    Relu LeakyRelu Hardtanh Threshold Abs Max Min Maximum Minimum Clamp ClampMin Where MaskedFill NativeDropout
    MaxPool2DWithIndices AdaptiveMaxPool2D MkldnnMaxPool2D
"""
_PRODUCT_NAMES = """
    Mul Mm Addmm Bmm Baddbmm Mv Addmv Dot Linear Convolution MkldnnConvolution PreluKernel
    masked_linear
"""
# what leaves samples apart whatever its arguments are, on a tensor whose first axis counts them (sums and products of
# two may broadcast)
_ROW_NAMES = """
    Convolution MkldnnConvolution Relu LeakyRelu Gelu Silu Elu Tanh Sigmoid Softplus Neg NativeGroupNorm
    NativeLayerNorm NativeBatchNorm MaxPool2DWithIndices AvgPool2D AdaptiveAvgPool2D MkldnnMaxPool2D NativeDropout
"""
_BY_ROWS = frozenset(_ROW_NAMES.split())
_RESHAPES = frozenset(("View", "UnsafeView", "ReshapeAlias"))
_LEAF = "torch::autograd::AccumulateGrad"
_LINEAR = frozenset(_LINEAR_NAMES.split())
_PRODUCTS = frozenset(_PRODUCT_NAMES.split())
_NORMS = frozenset(("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"))


@dataclass(frozen=True)
class Graph:
    """Findings about one forward pass.

    Attributes:
        curved: names of the nodes that are not piecewise linear in some parameter; empty when there are none.
        coupled: a normalisation used the batch's own statistics, so samples are not independent.
        uses: parameter name -> number of nodes that read it.
        layer_nodes: those of the layers' output nodes that gradients pass. A node is lost when its output is
            changed in place through a view.
        readers: node -> the nodes that read its output.
    """

    curved: frozenset[str]
    coupled: bool
    uses: Mapping[str, int]
    layer_nodes: Set[Any]
    readers: Mapping[Any, Sequence[Any]]

    def by_rows(self, output: Tensor) -> bool:
        """Tell whether each operation before ``output`` surely leaves samples apart; the first axis counts them."""
        samples = len(output)
        for node in (output.grad_fn, *self.readers):
            kind = node.name().partition("Backward")[0]
            if kind in _RESHAPES:
                if not node._saved_self_sym_sizes or node._saved_self_sym_sizes[0] != samples:
                    return False
            elif kind in ("Mm", "Addmm", "T"):  # the last operand is a weight, or one turned round
                last = node.next_functions[-1][0]
                if last is not None and last.name() not in (_LEAF, "TBackward0"):
                    return False
                if last is None and kind != "T":
                    return False
            elif kind not in _BY_ROWS and kind != _LEAF:
                return False
        return True

    def alone(self, ran: Sequence[Layer], params: Mapping[str, Tensor]) -> list[Layer]:
        """Return those runs of layers, of all that ``ran``, that are all that their parameters do."""
        names = {id(p): name for name, p in params.items()}
        owned = [[i for p in layer.params.values() if (i := id(p)) in names] for layer in ran]
        runs = Counter(i for own in owned for i in own)
        return [
            layer
            for layer, own in zip(ran, owned)
            if own and layer.edge.node in self.layer_nodes and all(runs[i] == 1 == self.uses.get(names[i]) for i in own)
        ]


def inspect(output: Tensor, params: Mapping[str, Tensor], layer_nodes: Set[Any]) -> Graph:
    """Walk the graph behind ``output``, looking out for ``layer_nodes`` on the way."""
    bits = {id(p): 1 << i for i, p in enumerate(params.values())}
    names = {id(p): name for name, p in params.items()}
    behind: dict[Any, int] = {}  # node -> bit set of the parameters it depends on
    readers: dict[Any, list[Any]] = {}
    uses: Counter[str] = Counter()
    curved: set[str] = set()
    coupled = False
    leaves: dict[Any, str | None] = {}  # a leaf's node -> the parameter's name
    for node, children in _walked(output.grad_fn):
        whole = node.name()
        if whole == _LEAF:
            leaf = id(node.variable)
            behind[node], leaves[node] = bits.get(leaf, 0), names.get(leaf)
            continue
        sets = [behind[child] for child in children]
        here = total = 0
        for child, one in zip(children, sets):
            readers.setdefault(child, []).append(node)
            if (name := leaves.get(child)) is not None:
                uses[name] += 1
            here |= one
            total += one.bit_count()
        behind[node] = here
        kind = whole.partition("Backward")[0]
        clash = total != here.bit_count()
        if kind in _NORMS:
            batch_statistics = bool(getattr(node, "_saved_training", True))
            coupled |= batch_statistics
            if batch_statistics or clash:
                curved.add(whole)
        elif kind in _PRODUCTS:
            if clash:
                curved.add(whole)
        elif kind == "Div":
            if node.next_functions[1:] and node.next_functions[1][0] is not None:
                curved.add(whole)
        elif kind not in _LINEAR and behind[node]:
            curved.add(whole)
    return Graph(frozenset(curved), coupled, dict(uses), layer_nodes & behind.keys(), readers)


def nodes(root: Any) -> list[Any]:
    """Return autograd's graph behind a node, children before their readers."""
    return [node for node, _ in _walked(root)]


def _walked(root: Any) -> list[tuple[Any, list[Any]]]:
    """Return each node with its children."""
    order: list[tuple[Any, list[Any]]] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, list[Any] | None]] = [(root, None)]
    while stack:
        node, children = stack.pop()
        if children is not None:
            order.append((node, children))
        elif node not in seen:
            seen.add(node)
            children = [child for child, _ in node.next_functions if child is not None]
            stack.append((node, children))
            stack += [(child, None) for child in children]
    return order
