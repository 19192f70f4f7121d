"""Rewrite a captured graph so that each operation of the model is one node of one kind.

Dropout, aliases and assertions vanish; attention spelled as matmul, scale, mask, softmax, matmul becomes
`ops.attention`; a norm or an activation spelled in several ops becomes one `ops.Region`; `select` is split into a
gather and a `row_select`. Nothing here looks at module names or classes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from relprop.capture import ops
from relprop.capture.einsum import expand_einsums
from relprop.capture.export import Captured, module_path, source_line
from relprop.capture.insertion import insert
from relprop.capture.mutation import make_functional
from relprop.errors import OptionError, UnsupportedOpError

aten = torch.ops.aten


def is_tensor(node: Any) -> bool:
    """Whether an argument is a node whose value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def explained_inputs(captured: Captured) -> list[str]:
    """Placeholders whose relevance is asked for: floating-point inputs and the ids of the largest vocabulary.

    An encoder's and a decoder's ids look into vocabularies of one size, and are both asked for. Arguments that are
    held have no relevance.
    """
    moving = [spec for spec in captured.inputs if spec.argument not in captured.held]
    ids = {spec.placeholder for spec in moving if spec.is_token_ids}
    tables: dict[str, int] = {}
    for node in captured.graph.nodes:
        source = token_source(node)
        if source in ids:
            tables[source] = max(tables.get(source, 0), int(node.args[0].meta["val"].shape[0]))
    largest = max(tables.values(), default=0)
    return [
        spec.placeholder for spec in moving if spec.dtype.is_floating_point or tables.get(spec.placeholder) == largest
    ]


def held_apart(captured: Captured, held: tuple[str, ...]) -> Captured:
    """The same capture, some arguments of the model's forward held as they are.

    Raises:
        OptionError: they are none of its tensors' names, or nothing else is left to explain.
    """
    known = sorted({spec.argument for spec in captured.inputs})
    if not isinstance(held, tuple) or not all(isinstance(name, str) for name in held):
        raise OptionError(f"held: expected a tuple of names, got {held!r}")
    found = replace(captured, held=held)
    if set(held) - set(known) or (held and not explained_inputs(found)):
        raise OptionError(f"held: expected some arguments of {', '.join(known)}, not all, got {held!r}")
    return found


def token_source(node: fx.Node) -> str:
    """The placeholder that an embedding looks up, also through views of it; empty for any other node."""
    at = node.args[1] if node.target is aten.embedding.default else None
    while isinstance(at, fx.Node) and at.target in ops.MOVEMENT:
        at = at.args[0]
    return at.name if isinstance(at, fx.Node) and at.op == "placeholder" else ""


def mark_carrying(captured: Captured) -> None:
    """meta["carrying"]: the value depends on an explained input through floating-point operations."""
    explained = set(explained_inputs(captured))
    for node in captured.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            node.meta["carrying"] = node.name in explained and value.dtype.is_floating_point
            continue
        parents = node.all_input_nodes
        carrying = any(p.meta.get("carrying", False) for p in parents)
        if node.target is aten.embedding.default:
            carrying = carrying or token_source(node) in explained
        if isinstance(value, Tensor):
            carrying = carrying and value.dtype.is_floating_point
        elif not isinstance(value, (list, tuple)):
            carrying = False
        if node.target in ops.CONSTANT:
            carrying = False
        node.meta["carrying"] = carrying


def canonicalise(captured: Captured) -> None:
    """Run every pass in order, in place."""
    graph = captured.graph
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = ((captured.output,),)
    output.meta = {}
    mark_carrying(captured)
    make_functional(captured)
    remove_identities(captured)
    expand_einsums(graph)
    drop_expands(graph)
    mark_carrying(captured)
    fold_products(graph)
    unfold_rows(graph)
    join_attention(graph)
    mark_carrying(captured)
    join_regions(graph)
    mark_carrying(captured)
    split_selects(graph)
    graph.eliminate_dead_code()
    mark_carrying(captured)
    _check_real(graph)
    captured.output = output.args[0][0]
    if not captured.output.meta["carrying"]:
        raise OptionError(
            "expected an output that depends on a floating-point input or on embedded token ids, got"
            f" {captured.output.name}, which depends on neither"
        )


def _check_real(graph: fx.Graph) -> None:
    """Raises:
    UnsupportedOpError: relevance would have to pass through complex numbers.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_complex() and any(p.meta["carrying"] for p in node.all_input_nodes):
            raise UnsupportedOpError(
                f"{describe(node)} makes complex numbers of values that depend on the input: expected real"
                " floating-point values, through which relevance is defined; write it with real ones (rotary embeddings"
                " with sines and cosines, a Fourier transform as a product with its matrix)"
            )


def _is_noop(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not (is_tensor(source) and is_tensor(node)):
        return False
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    if node.target in (
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.type_as.default,
    ):
        return before.dtype == after.dtype and before.device == after.device
    if node.target in (aten.slice.Tensor, aten.expand.default, aten.expand_as.default):
        return len(before.shape) == len(after.shape) and all(
            statically_known_true(a == b) for a, b in zip(before.shape, after.shape, strict=True)
        )
    return False


def remove_identities(captured: Captured) -> None:
    """Drop evaluation-mode dropout, aliases, assertions, copies and no-op slices and casts."""
    for node in list(captured.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in ops.ASSERTIONS:
            captured.graph.erase_node(node)
        elif node.target in ops.IDENTITIES or _is_noop(node):
            node.replace_all_uses_with(node.args[0])
            if captured.output is node:
                captured.output = node.args[0]
            captured.graph.erase_node(node)
    captured.graph.eliminate_dead_code()


def drop_expands(graph: fx.Graph) -> None:
    """Operands of pointwise binary operations that broadcasting would expand anyway."""
    for node in graph.nodes:
        if node.target not in ops.BINARY:
            continue
        for operand in node.args[:2]:
            if is_tensor(operand) and operand.target in (aten.expand.default, aten.expand_as.default):
                source = operand.args[0]
                others = [a.meta["val"].shape for a in node.args[:2] if is_tensor(a) and a is not operand]
                if others and _same_shape(others[0], node.meta["val"].shape) and is_tensor(source):
                    node.replace_input_with(operand, source)
    graph.eliminate_dead_code()


def _same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def unfold_rows(graph: fx.Graph) -> None:
    """view(linear(view(x))) becomes linear(reshape(x)) where the first view merges rows and the second restores them.

    nn.MultiheadAttention projects [N * B, C] so: samples would lie scattered over the merged axis.
    """
    for node in list(graph.nodes):
        if node.target is not aten.linear.default or len(node.users) != 1:
            continue
        folded, restored = node.args[0], next(iter(node.users))
        if folded.target not in ops.RESHAPES or restored.target is not aten.view.default:
            continue
        before, after = folded.args[0].meta["val"].shape, restored.meta["val"].shape
        if len(folded.meta["val"].shape) != 2 or len(after) < 3 or not node.meta["carrying"]:
            continue
        if not statically_known_true(after[-1] == node.meta["val"].shape[-1]) or len(before) < 3:
            continue
        sizes = [*restored.args[1][:-1], folded.meta["val"].shape[-1]]
        node.meta["val"].new_empty(0)
        shape = node.meta["val"].new_empty((*after[:-1], sizes[-1]))
        rows = insert(graph, restored, aten.reshape.default, (folded.args[0], sizes), folded, shape)
        linear = insert(graph, restored, aten.linear.default, (rows, *node.args[1:]), node, restored.meta["val"])
        restored.replace_all_uses_with(linear)
    graph.eliminate_dead_code()


def fold_products(graph: fx.Graph) -> None:
    """addmm, mm and matmul with a constant right operand become linear."""
    for node in list(graph.nodes):
        if node.target in (aten.mm.default, aten.matmul.default):
            x, w, bias = node.args[0], node.args[1], None
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, x, w = node.args
        else:
            continue
        if not node.meta["carrying"]:
            continue
        plain = bias is None or (len(bias.meta["val"].shape) == 1 and not bias.meta["carrying"])
        if not plain or w.meta["carrying"] or not x.meta["carrying"] or w.meta["val"].ndim != 2:
            if node.target is aten.addmm.default:
                product = insert(graph, node, aten.mm.default, (x, w), node, node.meta["val"])
                node.target, node.args = aten.add.Tensor, (product, bias)
            continue
        weight = insert(graph, node, aten.t.default, (w,), node)
        node.target = aten.linear.default
        node.args = (x, weight) if bias is None else (x, weight, bias)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def join_attention(graph: fx.Graph) -> None:
    """Every spelling of attention becomes ops.attention(q, k, v, mask, scale, causal, grouped)."""
    for node in list(graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            _from_sdpa(graph, node)
        elif node.target in (aten.softmax.int, aten._softmax.default) and node.meta["carrying"]:
            _from_softmax(graph, node)
    graph.eliminate_dead_code()


def _from_sdpa(graph: fx.Graph, node: fx.Node) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    values = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    scale = values.get("scale")
    if scale is None:
        scale = ops.default_scale(int(values["query"].meta["val"].shape[-1]))
    mask = values.get("attn_mask")
    if mask is not None and mask.meta["carrying"]:
        _spell_out(graph, node, values, scale)
        return
    inputs = (values["query"], values["key"], values["value"], mask, scale)
    args = (*inputs, bool(values.get("is_causal", False)), bool(values.get("enable_gqa", False)))
    node.target, node.args, node.kwargs = ops.attention, args, {}


def _spell_out(graph: fx.Graph, node: fx.Node, values: dict[str, Any], scale: float) -> None:
    """softmax(scale q k^T + mask) v op by op: relevance goes through a mask that depends on the input, too."""
    q, k, v, mask = (values[name] for name in ("query", "key", "value", "attn_mask"))
    heads = q.meta["val"].shape[-3] if q.meta["val"].ndim > 2 else 1
    for_all = k.meta["val"].shape[-3] if k.meta["val"].ndim > 2 else heads
    if values.get("enable_gqa", False) and heads != for_all:
        k, v = (insert(graph, node, aten.repeat_interleave.self_int, (t, heads // for_all, -3), node) for t in (k, v))
    shape = [*node.meta["val"].shape[:-1], k.meta["val"].shape[-2]]
    scaled = insert(graph, node, aten.mul.Tensor, (q, scale), node, q.meta["val"])
    keys = insert(graph, node, aten.transpose.int, (k, -2, -1), node)
    scores = node.meta["val"].new_empty(shape)
    found = insert(graph, node, aten.matmul.default, (scaled, keys), node, scores)
    found = insert(graph, node, aten.add.Tensor, (found, mask), node, scores)
    found = insert(graph, node, aten.softmax.int, (found, -1), node, scores)
    node.target, node.args, node.kwargs = aten.matmul.default, (found, v), {}


def _from_softmax(graph: fx.Graph, softmax: fx.Node) -> None:
    rank = softmax.meta["val"].ndim
    if softmax.args[1] not in (-1, rank - 1):
        return
    # Down: casts to the product with the values.
    probabilities: fx.Node = softmax
    product = _only_user(softmax)
    while product is not None and product.target in (aten.to.dtype, aten.expand.default, aten.view.default):
        if [*product.meta["val"].shape] != [*softmax.meta["val"].shape]:
            return
        probabilities, product = product, _only_user(product)
    if product is None or product.target not in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return
    if product.args[0] is not probabilities or not product.args[1].meta["carrying"]:
        return
    scores = _climb_scores(softmax.args[0])
    if scores is None:
        return
    q, transposed = scores.product.args
    if not transposed.meta["carrying"] or q.meta["val"].ndim < 3:
        return
    for factor in scores.factors:
        q = insert(graph, product, aten.mul.Tensor, (q, factor), scores.product)
    key = insert(graph, product, aten.transpose.int, (transposed, -2, -1), scores.product)
    mask = _joined_mask(graph, product, scores, q)
    args = (q, key, product.args[1], mask, float(scores.scale), False, False)
    joined = insert(graph, product, ops.attention, args, product, product.meta["val"])
    product.replace_all_uses_with(joined)


@dataclass
class _Scores:
    """What stands between the product of queries and keys and the softmax, from the softmax up."""

    product: fx.Node
    scale: float = 1.0
    factors: list[fx.Node] = field(default_factory=list)  # constant per head
    masks: list[tuple[str, fx.Node, Any]] = field(default_factory=list)  # "add" or "fill", mask, shape of the sum


def _climb_scores(step: fx.Node) -> _Scores | None:
    """Through casts, scales, masks and views that only split the batch axis, to the product; None for anything else."""
    found = _Scores(step)
    rank = step.meta["val"].ndim
    while step.target not in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        if step.op != "call_function" or len(step.users) != 1:
            return None
        operands, target = step.args, step.target
        other: Any = operands[1] if len(operands) > 1 else None
        above = operands[0]
        unscaled = found.scale == 1.0 and not found.factors  # above a mask nothing may scale the scores again
        if target is aten.to.dtype or (target in ops.RESHAPES and _splits_batch(above, step)):
            pass
        elif target is aten.mul.Tensor and isinstance(other, (int, float)):
            found.scale *= other
        elif target is aten.div.Tensor and isinstance(other, (int, float)):
            found.scale /= other
        elif target is aten.mul.Tensor and _per_head(other, rank):
            found.factors.append(other)
        elif target is aten.add.Tensor and is_tensor(other) and not other.meta["carrying"] and unscaled:
            found.masks.append(("add", other, step.meta["val"].shape))
        elif target is aten.masked_fill.Scalar and unscaled and float(operands[2]) < -1e4:
            found.masks.append(("fill", other, step.meta["val"].shape))
        else:
            return None
        if not above.meta["carrying"]:
            return None
        step = above
    found.product = step
    return found if len(step.users) == 1 and step.meta["val"].ndim == rank else None


def _splits_batch(before: fx.Node, after: fx.Node) -> bool:
    """Whether a view of scores [B, ..., Nq, Nk] only takes the first axis apart, or puts it together again."""
    a, b = before.meta["val"].shape, after.meta["val"].shape
    kept = min(len(a), len(b)) - 1
    return kept > 1 and all(statically_known_true(x == y) for x, y in zip(a[-kept:], b[-kept:], strict=True))


def _per_head(factor: Any, rank: int) -> bool:
    """A constant that is the same for all queries and keys, so that it may scale the queries."""
    if not is_tensor(factor) or factor.meta["carrying"]:
        return False
    shape = factor.meta["val"].shape
    return 2 <= len(shape) <= rank and shape[-1] == shape[-2] == 1


def _joined_mask(graph: fx.Graph, before: fx.Node, scores: _Scores, q: fx.Node) -> fx.Node | None:
    """All masks as one: additive, unless the only one says what is not seen."""
    rank = scores.product.meta["val"].ndim
    made: list[fx.Node] = []
    for how, mask, shape in scores.masks:
        if how == "fill":
            mask = insert(graph, before, aten.logical_not.default, (mask,), before)
        if len(shape) != rank:
            mask = insert(graph, before, ops.window_mask, (mask, len(shape), q), before)
        if how == "fill" and len(scores.masks) > 1:
            mask = insert(graph, before, ops.additive_mask, (mask, q), before)
        made.append(mask)
    for mask in made:
        mask.meta["carrying"] = False
    while len(made) > 1:
        both = insert(graph, before, aten.add.Tensor, (made.pop(), made.pop()), before)
        made.append(both)
    return made[0] if made else None


def join_regions(graph: fx.Graph) -> None:
    """Join f(x) spelled in several ops: x * sigmoid(a x) is an activation, x * rsqrt(mean(x^2)) a norm.

    A binary op whose two carrying operands both come from one value through pointwise ops (and, for a norm,
    reductions that keep their axis) closes a region, if nothing inside is used elsewhere.
    """
    for node in list(graph.nodes):
        if node.target not in ops.BINARY or not node.meta["carrying"]:
            continue
        carrying = [a for a in node.args[:2] if is_tensor(a) and a.meta["carrying"]]
        if len(carrying) != 2:
            continue
        paths = [_chain(a) for a in carrying]
        source = next((n for n in paths[0] if n in paths[1]), None)
        if source is None:
            continue
        inside = [n for path in paths for n in path[: path.index(source)]]
        inside = sorted(set(inside), key=list(graph.nodes).index)
        members = {*inside, node}
        if not inside or any(user not in members for n in inside for user in n.users):
            continue
        reduced = [n for n in inside if n.target in ops.REDUCTIONS]
        _close_region(graph, node, source, inside, "norm" if reduced else "activation")


def _chain(node: fx.Node) -> list[fx.Node]:
    """The values that a value depends on pointwise (or through kept reductions), from itself upwards."""
    chain = [node]
    while True:
        at = chain[-1]
        if at.op != "call_function" or not _passes(at):
            return chain
        parents = [p for p in at.all_input_nodes if p.meta.get("carrying")]
        if len(parents) != 1:
            return chain
        chain.append(parents[0])


def _passes(node: fx.Node) -> bool:
    target = node.target
    if target in ops.REDUCTIONS:
        source = node.all_input_nodes[0].meta["val"]
        axis = node.args[2] if node.target is aten.linalg_vector_norm.default else node.args[1]
        last = [a % source.ndim for a in (axis if isinstance(axis, (list, tuple)) else [axis])] == [source.ndim - 1]
        return node.meta["val"].ndim == source.ndim and (source.ndim > 2 or last)
    if target in ops.BINARY or isinstance(target, ops.Region):
        return True
    return target in ops.POINTWISE or target in (aten.to.dtype, aten.neg.default, aten.pow.Tensor_Tensor)


def _close_region(graph: fx.Graph, node: fx.Node, source: fx.Node, inside: list[fx.Node], name: str) -> None:
    members = [*inside, node]
    constants = dict.fromkeys(p for m in members for p in m.all_input_nodes if p is not source and p not in members)
    body = fx.Graph()
    environment: dict[fx.Node, fx.Node] = {source: body.placeholder("x")}
    for constant in constants:
        environment[constant] = body.placeholder(constant.name)
    statistics: set[str] = set()
    for member in members:
        environment[member] = body.node_copy(member, lambda n: environment[n])
        if member.target in ops.REDUCTIONS:
            statistics.add(environment[member].name)
    body.output(environment[node])
    region = ops.Region(name, fx.GraphModule(torch.nn.Module(), body), frozenset(statistics))
    joined = insert(graph, node, region, (source, *constants), node, node.meta["val"])
    node.replace_all_uses_with(joined)
    graph.erase_node(node)
    for member in reversed(inside):
        if not member.users:
            graph.erase_node(member)


def split_selects(graph: fx.Graph) -> None:
    """select(x, axis, i) becomes row_select(slice(x, axis, i, i + 1), axis); a full set of selects is an unbind."""
    for node in list(graph.nodes):
        if node.target is not aten.select.int or not node.meta["carrying"] or node.users is None:
            continue
        source, axis, index = node.args
        axis = axis % source.meta["val"].ndim
        length = source.meta["val"].shape[axis]
        siblings = [
            u
            for u in source.users
            if u.target is aten.select.int and u.args[1] % source.meta["val"].ndim == axis and u.args[0] is source
        ]
        if isinstance(length, int) and len({s.args[2] % length for s in siblings}) == length > 1:
            unbound = insert(graph, siblings[0], aten.unbind.int, (source, axis), node)
            for sibling in siblings:
                part = insert(graph, sibling, operator.getitem, (unbound, sibling.args[2] % length), sibling)
                sibling.replace_all_uses_with(part)
                sibling.target, sibling.args = aten.alias.default, (part,)
            continue
        stop = index + 1 if index != -1 else 2**63 - 1
        row = insert(graph, node, aten.slice.Tensor, (source, axis, index, stop), node)
        picked = insert(graph, node, ops.row_select, (row, axis), node)
        node.replace_all_uses_with(picked)
        graph.erase_node(node)


def describe(node: fx.Node) -> str:
    """One line that names a node for an error: op, name, module path, source line."""
    place = " ".join(part for part in (module_path(node), source_line(node)) if part)
    return f"{node.target} ({node.name})" + (f" at {place}" if place else "")
