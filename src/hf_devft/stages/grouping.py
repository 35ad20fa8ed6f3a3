"""Which layers share a group: deconfliction-guided layer grouping (arXiv 2508.00041, §3.2) and its rivals.

A grouping is a list of groups, a group an ascending list of layer indices. Groups are ordered by their
first layer (the anchor), every layer is in exactly one, none is empty, and all layers of a group are of
one kind (but where bridges stand for them). A new rule is one function and one line in `GROUPINGS`.
"""

import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_devft.models.layer_stack import LayerStack
from hf_devft.models.layout import MAGNITUDE, State
from hf_devft.models.weights import check_dense, dense, is_cheap_to_read, piece_size, read_slice
from hf_devft.stages.bridges import best_blocks


Groups = list[list[int]]


@dataclass(frozen=True)
class GroupingTask:
    """What a grouping rule may look at.

    Attributes:
        kinds: L values; layers may share a group only if theirs are equal.
        capacity: number of groups, from the number of distinct kinds to L.
        seed: for k-means and random groups.
        similarity: () -> L x L cosine similarity of the layers' weights, their adapters' among them.
        losses_without: (kept layers, candidates) -> losses of the model with only the kept ones, but without each of
            the candidates, on calibration texts; or None.
        bridge_errors: () -> L x L, how badly a bridge would stand for each block of layers; see `bridge_errors`.
    """

    kinds: Sequence[Hashable]
    capacity: int
    seed: int = 0
    similarity: Callable[[], torch.Tensor] | None = None
    losses_without: Callable[[list[int], list[int]], list[float]] | None = None
    bridge_errors: Callable[[], torch.Tensor] | None = None


def weight_gram(stack: LayerStack) -> torch.Tensor:
    """<vec θ_i, vec θ_j> over the layers' base weights: L x L, float64, on the CPU.

    One Gram matrix per parameter name, added up over pieces of it, so that no more than a piece of each layer is held
    beside the layers themselves. Between layers of different kinds it is 0.

    Raises:
        ValueError: weights that cannot be compared; see `check_dense`, `dense`.
    """
    check_dense(stack.layers[0])
    gram = torch.zeros(len(stack), len(stack), dtype=torch.float64)
    for members in _by_kind(stack.kinds).values():
        index = torch.tensor(members)
        for parameters in zip(*(stack.layers[member].parameters() for member in members), strict=True):
            for rows in _pieces(parameters):
                gram[index[:, None], index] += (rows @ rows.T).cpu().double()
    return gram


def adapter_gram(stack: LayerStack, adapter: State) -> torch.Tensor:
    """As `weight_gram`, over the layers' parameters of a full-depth adapter. What would make any two layers alike is
    left out: DoRA's magnitudes, which are norms of the weights, and the one that a factor of IA3's is where it changes
    nothing."""
    gram = torch.zeros(len(stack), len(stack), dtype=torch.float64)
    own: list[dict] = [{} for _ in stack.layers]
    for key, tensor in adapter.items():
        if (parts := stack.names.split(key)) is not None and MAGNITUDE not in key:
            own[parts[0]][parts[1]] = tensor - 1 if "ia3_" in key else tensor
    for members in _by_kind(stack.kinds).values():
        index = torch.tensor(members)
        for name in own[members[0]]:
            rows = torch.stack([own[member][name].flatten().float() for member in members])
            gram[index[:, None], index] += (rows @ rows.T).cpu().double()
    return gram


def similarity_of(gram: torch.Tensor) -> torch.Tensor:
    """W_ij = cos(vec θ_i, vec θ_j) from the layers' inner products: L x L, float32 (§3.2, eq. 3)."""
    norms = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return (gram / torch.outer(norms, norms)).float()


def _pieces(parameters: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Parameters of one shape as the rows of a float32 matrix, cut into pieces of its columns."""
    if not all(map(is_cheap_to_read, parameters)):  # not to unpack or gather them for each piece again
        parameters = [dense(parameter).detach() for parameter in parameters]
    size = piece_size(parameters[0])
    for start in range(0, parameters[0].numel(), size):
        rows = [read_slice(parameter, start, start + size).float() for parameter in parameters]
        yield torch.stack(rows)


def _by_kind(kinds: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    members: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        members.setdefault(kind, []).append(index)
    return members


def _allocate(capacity: int, sizes: list[int]) -> list[int]:
    """Groups per kind: at least one each, the rest in proportion to the kinds' sizes."""
    counts = [1] * len(sizes)
    for _ in range(capacity - len(sizes)):
        room = [(size / (count + 1) if count < size else 0) for size, count in zip(sizes, counts, strict=True)]
        counts[int(np.argmax(room))] += 1
    return counts


def _per_kind(rule: Callable[[GroupingTask, list[int], int], Groups]) -> Callable[[GroupingTask], Groups]:
    """A rule for all kinds from a rule (task, members of one kind, number of groups) -> groups."""

    def grouping(task: GroupingTask) -> Groups:
        kinds = list(_by_kind(task.kinds).values())
        counts = _allocate(task.capacity, [len(members) for members in kinds])
        groups = [group for members, count in zip(kinds, counts, strict=True) for group in rule(task, members, count)]
        return sorted(sorted(group) for group in groups)

    return grouping


# (L x L similarity, number of clusters, seed) -> a label for each of the L layers.
Clustering = Callable[[np.ndarray, int, int], np.ndarray]


def _clusters(cluster: Clustering) -> Callable[[GroupingTask, list[int], int], Groups]:
    """A rule for one kind from a clustering of its similarity graph."""

    def rule(task: GroupingTask, members: list[int], count: int) -> Groups:
        assert task.similarity is not None
        if count in (1, len(members)):
            return [[member] for member in members] if count > 1 else [members]
        labels = cluster(task.similarity().numpy()[np.ix_(members, members)], count, task.seed)
        groups = [[members[i] for i in np.flatnonzero(labels == label)] for label in np.unique(labels)]
        while len(groups) < count:  # k-means may return fewer clusters than asked for
            largest = max(groups, key=len)
            groups.remove(largest)
            groups += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        return groups

    return rule


def _minimum_cut(similarity: np.ndarray, count: int, seed: int) -> np.ndarray:
    """k-means on the eigenvectors of the Laplacian D - W of the `count` smallest eigenvalues: the relaxed minimum cut,
    as the paper's published version has it (§3.2). Edges between layers that point apart have a negative weight."""
    from sklearn.cluster import KMeans  # here, as it takes long to import

    laplacian = np.diag(similarity.sum(1)) - similarity
    vectors = np.linalg.eigh(laplacian.astype(np.float64))[1][:, :count]
    with warnings.catch_warnings():  # where there are fewer distinct layers than clusters
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        return KMeans(count, n_init=10, random_state=seed).fit_predict(vectors)


def _normalized_cut(similarity: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Spectral clustering by the normalised Laplacian (Shi and Malik 2000), which balances the clusters (our rule)."""
    from sklearn.cluster import SpectralClustering

    clustering = SpectralClustering(count, affinity="precomputed", random_state=seed)
    with warnings.catch_warnings():
        # Layers whose weights point apart make a graph of several components: that is what is looked for.
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        return clustering.fit_predict(similarity.clip(min=0))


def _even(task: GroupingTask, members: list[int], count: int) -> Groups:
    """Ablation: contiguous groups of equal size (the first ones larger by one where L is no multiple)."""
    return [part.tolist() for part in np.array_split(members, count)]


def _random(task: GroupingTask, members: list[int], count: int) -> Groups:
    """Ablation: a random partition into non-empty groups."""
    rng = np.random.default_rng([task.seed, count, members[0]])
    shuffled = rng.permutation(members).tolist()
    groups = [[member] for member in shuffled[:count]]
    for member in shuffled[count:]:
        groups[rng.integers(count)].append(member)
    return groups


def _prefix(task: GroupingTask, members: list[int], count: int) -> Groups:
    """The first layers as they are, the rest with the last of them: ProgFed's growing prefix (Wang et al. 2022, arXiv
    2110.05323, §3), with anchors as representatives and as the only ones that receive."""
    return [[member] for member in members[: count - 1]] + [members[count - 1 :]]


def calibrated(task: GroupingTask) -> Groups:
    """Drop one layer at a time, always the one whose loss suffers least (our rule).

    A dropped layer joins the group of the kept layer of its kind before it, so the first of each kind stays.
    """
    assert task.losses_without is not None
    kept = list(range(len(task.kinds)))
    first = {members[0] for members in _by_kind(task.kinds).values()}
    while len(kept) > task.capacity:
        candidates = [layer for layer in kept if layer not in first]
        kept.remove(candidates[int(np.argmin(task.losses_without(kept, candidates)))])
    groups = {layer: [layer] for layer in kept}
    for layer, kind in enumerate(task.kinds):
        if layer not in groups:
            groups[max(k for k in kept if k < layer and task.kinds[k] == kind)].append(layer)
    return list(groups.values())


def bridged(task: GroupingTask) -> Groups:
    """Leave out the blocks of layers that bridges stand for with the least error in all (our rule). Layers of several
    kinds may be in one block, as nothing is moved between them."""
    assert task.bridge_errors is not None
    return best_blocks(task.bridge_errors(), task.capacity)


GROUPINGS: dict[str, Callable[[GroupingTask], Groups]] = {
    "deconfliction": _per_kind(_clusters(_minimum_cut)),
    "normalized_cut": _per_kind(_clusters(_normalized_cut)),
    "even": _per_kind(_even),
    "random": _per_kind(_random),
    "calibrated": calibrated,
    "prefix": _per_kind(_prefix),
    "bridged": bridged,
}


def group_layers(task: GroupingTask, rule: str = "deconfliction") -> Groups:
    """Group the layers of one stage by the named rule. At full capacity every layer is its own group.

    Raises:
        ValueError: a capacity that the layers cannot be cut into; a rule of one's own that returns no groups of them.
    """
    depth, kinds = len(task.kinds), len(set(task.kinds))
    if not kinds <= task.capacity <= depth:
        raise ValueError(
            f"a stage of {task.capacity} layers cannot be made of {depth} layers of {kinds} kind(s): only layers of "
            f"one kind share a group, so choose a capacity from {kinds} to {depth}."
        )
    if task.capacity == depth:
        return [[layer] for layer in range(depth)]
    groups = GROUPINGS[rule](task)
    ordered = sorted(sorted(group) for group in groups)
    if groups != ordered or len(groups) != task.capacity or sorted(itertools.chain(*groups)) != list(range(depth)):
        raise ValueError(
            f"grouping={rule!r} returned {groups}: it must be {task.capacity} groups of {depth} layers, each and all "
            "of them in order."
        )
    return groups
