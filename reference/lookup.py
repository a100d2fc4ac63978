"""Looking a feature up in a memory (paper section 3.2, "Gumbel Shrinkage").

A memory holds M slots of width C. A query is answered by a weighted sum of few slots:

    weights = shrink(query . slots^T),    answer = weights . slots

Two ways of shrinking are published. *Gumbel shrinkage* keeps the largest softmax weights and lets
the gradient pass straight through to the softmax, so that slots which were not chosen still
learn. *Hard shrinkage* is that of MemAE (Gong et al. 2019).
"""

import torch
import torch.nn.functional as F

EPSILON = 1e-12  # floor of the published normalisations


def _keep_above(values: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    """``values`` where they exceed ``threshold``, else zero, then L1-normalised over slots."""
    distance = values - threshold
    kept = F.relu(distance) * values / (distance.abs() + EPSILON)
    return F.normalize(kept, p=1.0, dim=-1, eps=EPSILON)


def gumbel_shrinkage(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Weights [..., M] of the slots, from logits [..., M].

    Value: the softmax weights strictly above the ``top_k``-th largest, renormalised to sum to 1.
    Gradient: that of the softmax (straight through).

    The published code behaves in ways that its name does not suggest, and so does this function:
    only what lies strictly above the k-th weight survives, hence k keeps k - 1 slots (fewer with
    ties), k = 1 keeps none, and no Gumbel noise is drawn.

    >>> gumbel_shrinkage(torch.tensor([1.0, 3.0, 6.0]).log(), top_k=3)
    tensor([0.0000, 0.3333, 0.6667])
    """
    probabilities = torch.softmax(logits, dim=-1)
    threshold = probabilities.topk(top_k, dim=-1).values[..., -1:]
    kept = _keep_above(probabilities, threshold)
    return probabilities + (kept - probabilities).detach()


def hard_shrinkage(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """Weights [..., M]: logits above ``threshold``, L1-normalised; everything is differentiated.

    The logits are raw dot products: no softmax precedes this function.

    >>> hard_shrinkage(torch.tensor([0.5, 1.5, 4.5]), threshold=1.0)
    tensor([0.0000, 0.2500, 0.7500])
    """
    return _keep_above(logits, threshold)


def memory_lookup(
    query: torch.Tensor,
    memory: torch.Tensor,
    top_k: int | None = None,
    *,
    threshold: float | None = None,
) -> torch.Tensor:
    """Answers [B, N, C] to queries [B, N, C]; position n asks only memory n of [N, M, C].

    ``top_k`` chooses Gumbel shrinkage, ``threshold`` hard shrinkage; with neither, the raw dot
    products are the weights. Without the dimension N (query [B, C], memory [M, C]) it is one
    memory asked by B queries.

    >>> memory = torch.eye(3)
    >>> memory_lookup(torch.tensor([[0.5, 1.5, 4.5]]), memory, threshold=1.0)
    tensor([[0.0000, 0.2500, 0.7500]])
    """
    if query.dim() == 2:
        return memory_lookup(query[:, None], memory[None], top_k, threshold=threshold)[:, 0]
    answers = []
    for n in range(memory.shape[0]):
        weights = query[:, n] @ memory[n].T
        if top_k is not None:
            weights = gumbel_shrinkage(weights, top_k)
        elif threshold is not None:
            weights = hard_shrinkage(weights, threshold)
        answers.append(weights @ memory[n])
    return torch.stack(answers, dim=1)
