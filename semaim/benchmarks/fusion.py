"""The kernels that a compiler makes of a graph: what it can fuse is one kernel, which reads and writes less.

A model of PyTorch's Inductor, read from the graph alone, so that nothing is compiled and no GPU is needed:

* Products, convolutions, attention and sorts are kernels of their own.
* Pointwise operations and reductions along a row that depend on each other are one kernel, as long as no product lies
  between them.
* A sum over the rows (the gradient of a norm or bias) is a kernel of its own.
* A pointwise value that another kernel needs is computed there again, if that takes at most `MOST_READS` tensors, and
  is not written, unless a product or the caller reads it. This is Inductor's `realize_reads_threshold`.
* A kernel reads each tensor once.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.flop_counter import flop_registry

from semaim.benchmarks.counting import Work, kind_of, size, tensors, work_of

#: Inductor computes a value again from up to so many tensors.
MOST_READS = 4
#: Beginnings of the names of further operations that are not fused.
ALONE = ("sort", "argsort", "argmax", "_fused_adam", "index_put", "scatter")


def kernels_of(graph: GraphModule) -> list[Work]:
    """The work of each kernel of a graph of PyTorch's `aot_autograd`, whose nodes have fake tensors."""
    return Fusion(graph).kernels()


class Fusion:
    """The nodes of a graph, and which of them are one kernel. Views are left out: `source` leads through them."""

    def __init__(self, graph: GraphModule):
        self.source: dict[Node, Node] = {}
        for node in graph.graph.nodes:
            views = node.op == "call_function" and is_view(node)
            self.source[node] = self.source[node.all_input_nodes[0]] if views else node
        calls = [node for node in graph.graph.nodes if node.op == "call_function" and self.source[node] is node]
        self.nodes = [node for node in calls if tensors(value(node))]
        self.fusible = {node for node in self.nodes if not is_alone(node)}
        self.users: dict[Node, set[Node]] = {node: set() for node in self.source}
        for node in self.source:
            for user in node.users:
                if self.source[user] is user:
                    self.users[self.source[node]].add(user)
        self._leaves: dict[Node, frozenset[Node]] = {}

    def inputs(self, node: Node) -> list[Node]:
        """The nodes whose tensors a node reads."""
        return list(dict.fromkeys(self.source[one] for one in node.all_input_nodes if tensors(value(one))))

    def written(self, node: Node) -> bool:
        """Whether a fusible node's result has to be in memory for something that is not fused."""
        return any(user.op == "output" or user not in self.fusible for user in self.users[node])

    def leaves(self, node: Node) -> frozenset[Node]:
        """The tensors in memory from which another kernel has a node's value."""
        if node not in self._leaves:
            found = frozenset([node])
            if node in self.fusible and not reduces(node) and not self.written(node):
                again = frozenset().union(*(self.leaves(one) for one in self.inputs(node)))
                found = again if len(again) <= MOST_READS else found
            self._leaves[node] = found
        return self._leaves[node]

    @cached_property
    def stage(self) -> dict[Node, int]:
        """The number of products before each node. What needs nothing earlier waits until its result is needed."""
        stage: dict[Node, int] = {}

        def earliest(node: Node) -> int:
            return max((stage[one] + (one not in self.fusible) for one in self.inputs(node) if one in stage), default=0)

        for node in self.nodes:
            stage[node] = earliest(node)
        needed: dict[Node, int] = {}
        for node in reversed(self.nodes):
            users = [user for user in self.users[node] if user in stage]
            needed[node] = min((needed[u] if u in self.fusible else stage[u] for u in users), default=stage[node])
        for node in self.nodes:
            stage[node] = earliest(node)
            before = [one for one in self.inputs(node) if one in self.fusible]
            if node in self.fusible and all(stage[one] == needed[node] for one in before):
                stage[node] = max(stage[node], needed[node])
        return stage

    def groups(self) -> list[list[Node]]:
        """Kernels, each as its nodes."""
        group: dict[Node, list[Node]] = {}
        for node in self.nodes:
            group[node] = [node]
            if node not in self.fusible or over_rows(node):
                continue
            for one in self.inputs(node):
                joins = one in self.fusible and not over_rows(one) and self.stage[one] == self.stage[node]
                if joins and group[one] is not group[node]:
                    group[one] += group[node]
                    group.update(dict.fromkeys(group[node], group[one]))
        return list({id(nodes): nodes for nodes in group.values()}.values())

    def kernels(self) -> list[Work]:
        """The work of each kernel that touches data."""
        groups = self.groups()
        read_by = {id(nodes): self.read(nodes) for nodes in groups}
        read = set().union(*read_by.values())
        works = []
        for nodes in groups:
            if nodes[0] not in self.fusible:
                arguments = torch.fx.map_arg((nodes[0].args, nodes[0].kwargs), value)
                found = work_of(nodes[0].target, arguments[0], arguments[1], value(nodes[0]))
                works += [found] if found else []
                continue
            made = [t for node in nodes if node in read or self.written(node) for t in tensors(value(node))]
            if made:
                total = sum(size(t) for node in read_by[id(nodes)] for t in tensors(value(node))) + sum(map(size, made))
                largest = max(made, key=Tensor.numel)
                name = "+".join(dict.fromkeys(name_of(node) for node in nodes))
                works.append(Work(name, "fused", tuple(largest.shape), largest.dtype, 0, total))
        return works

    def read(self, nodes: list[Node]) -> set[Node]:
        """The tensors in memory that a kernel reads."""
        if nodes[0] not in self.fusible:
            return set(self.inputs(nodes[0]))
        own = set(nodes)
        found = {leaf for node in nodes for one in self.inputs(node) if one not in own for leaf in self.leaves(one)}
        return found - own


def value(node: Any) -> Any:
    """The fake tensors of a graph's node."""
    return node.meta.get("val") if isinstance(node, Node) else node


def name_of(node: Node) -> str:
    """The operation of a node, without its overload."""
    return getattr(getattr(node.target, "overloadpacket", node.target), "__name__", "")


def is_view(node: Node) -> bool:
    """Whether a node copies nothing."""
    return bool(getattr(node.target, "is_view", False)) or getattr(node.target, "__name__", "") == "getitem"


def is_alone(node: Node) -> bool:
    """Whether a node is a kernel that is not fused."""
    packet = getattr(node.target, "overloadpacket", None)
    name = name_of(node)
    return packet in flop_registry or kind_of(name) == "attention" or name.startswith(ALONE)


def over_rows(node: Node) -> bool:
    """Whether a node sums over the rows of a matrix, so that the last axis stays."""
    if getattr(node.target, "overloadpacket", None) not in (torch.ops.aten.sum, torch.ops.aten.mean):
        return False
    given = value(node.all_input_nodes[0])
    axes: Any = node.args[1] if len(node.args) > 1 else range(given.ndim)
    return given.ndim - 1 not in [axis % given.ndim for axis in axes]


def reduces(node: Node) -> bool:
    """Whether a node's result is smaller than what it is computed from."""
    made, given = tensors(value(node)), [t for one in node.all_input_nodes for t in tensors(value(one))]
    return bool(given) and sum(t.numel() for t in made) < max(t.numel() for t in given)
