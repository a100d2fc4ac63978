"""Scoring by CUDA graphs: what is captured and how, and that nothing is lost, without a GPU."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from squid_fast import Bundle, Scorer, kernels
from squid_fast.inference.graphs import Graphs, capture, portions
from squid_fast.inference.model import FrozenModel
from squid_fast.training.graphs import WARM_UP, StepGraphs
from tests.cuda_stand_ins import Cuda, Stream, cuda
from tests.factories import image_batch, image_set, scorer_of, tiny_bundle

__all__ = ["cuda"]  # a fixture

# A device whose tensors compute nothing stands for a second GPU.
CPU, SECOND = torch.device("cpu"), torch.device("meta")


# --- capture --------------------------------------------------------------------------------------


def test_scoring_is_captured_on_a_stream_of_its_device(cuda: Cuda) -> None:
    graphs = Graphs(SECOND, largest=4)
    x = torch.zeros(6, 3, device=SECOND)
    for _ in range(2):
        list(graphs.replay(lambda x: (x + 1,), "plus", x))
    assert len(cuda.captures) == 2  # of 4 images and of 2
    for entered, stream, pool in cuda.captures:
        assert entered == stream.device == SECOND
        assert pool == 1  # one for all
    assert cuda.pools == 1
    # Nor would memory of the pool be used again on another stream.
    assert len({stream for _, stream, _ in cuda.captures}) == 1
    assert [graph.replays for graph in cuda.graphs] == [2, 2]


def test_training_is_captured_on_a_stream_of_its_device(cuda: Cuda) -> None:
    chosen = torch.zeros(6, dtype=torch.int64, device=SECOND)
    steps = StepGraphs(lambda chosen, number: {"loss": chosen + 1}, lambda number: 0)
    for number in range(WARM_UP + 2):
        steps(chosen, number)
    ((entered, stream, pool),) = cuda.captures
    assert entered == stream.device == SECOND
    assert pool is None  # losses outlive the next step
    (graph,) = cuda.graphs
    assert graph.replays == 2


def test_warming_up_waits_for_what_was_asked_before_and_is_waited_for(cuda: Cuda) -> None:
    first, x = cuda.current, torch.ones(3)
    seen: list[Stream] = []

    def function(x: Tensor) -> tuple[Tensor]:
        seen.append(cuda.current)
        return (x + 1,)

    list(Graphs(CPU, 4).replay(function, "plus", x))
    *warm, captured = seen
    assert captured is first
    (aside,) = set(warm)
    assert aside is not first
    assert aside.waits == [first]
    assert first.waits == [aside]


def test_what_is_captured_is_in_float32(cuda: Cuda) -> None:
    backends = torch.backends
    by_operation = hasattr(backends.cudnn, "conv")

    def in_tf32() -> bool:
        if by_operation:
            return backends.cudnn.conv.fp32_precision == "tf32"
        return backends.cudnn.allow_tf32

    seen = []
    before = in_tf32()
    list(Graphs(CPU, 4).replay(lambda x: seen.append(in_tf32()) or (x + 1,), "", torch.ones(3)))
    assert seen == [False] * 4  # warming up chooses kernels too
    assert in_tf32() == before


# --- batches of any size --------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1, 2, 64, 512])
def test_portions_cover_a_batch_with_graphs_of_few_sizes(largest: int) -> None:
    for count in (*range(130), 511, 513, 700, 2048, 5000):
        found = list(portions(count, largest))
        assert sum(images for images, _ in found) == count
        for images, size in found:
            assert images <= size <= largest
            assert size & (size - 1) == 0
            assert size <= 8 or 4 * images >= 3 * size
        assert all(images == size for images, size in found[:-1])


def test_results_are_those_of_the_images_and_nothing_is_captured_twice(cuda: Cuda) -> None:
    graphs = Graphs(CPU, largest=8)
    calls = []

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(tuple(x.shape))
        return x.square().sum(dim=1), x * 2

    for size in (1, 21, 8, 5, 21, 3):
        x = torch.rand(size, 3)
        sums, doubles = torch.zeros(size), torch.zeros(size, 3)
        for rows, (total, double) in graphs.replay(function, "one", x):
            sums[rows], doubles[rows] = total, double
        assert torch.equal(sums, x.square().sum(dim=1))
        assert torch.equal(doubles, 2 * x)
    # Three warm-ups and a capture of each size; bytes and other functions have graphs of their own.
    assert {size: calls.count((size, 3)) for size in (1, 4, 8)} == {1: 4, 4: 4, 8: 4}
    assert len(calls) == 12
    list(graphs.replay(function, "one", torch.ones(8, 3, dtype=torch.uint8)))
    list(graphs.replay(function, "other", torch.ones(8, 3)))
    assert len(cuda.graphs) == 5
    assert {graph.pool for graph in cuda.graphs} == {1}


def test_kernels_can_be_turned_off_after_a_capture(cuda: Cuda) -> None:
    graphs, x = Graphs(CPU, 8), torch.ones(3)
    for setting, count in (("on", 1), ("off", 2), ("on", 2), ("off", 2)):
        with kernels.use(setting):
            list(graphs.replay(lambda x: (x + 1,), "", x))
        assert len(cuda.graphs) == count


def test_empty_places_are_zero_whatever_was_there(cuda: Cuda) -> None:
    graphs, seen = Graphs(CPU, 8), []
    for x in (torch.full((8, 2), torch.nan), torch.ones(5, 2)):
        for _, (result,) in graphs.replay(lambda x: (x + 0,), "", x):
            seen.append(result._base if result._base is not None else result)
    assert seen[1].tolist() == [[1.0, 1.0]] * 5 + [[0.0, 0.0]] * 3


def test_another_stream_waits_for_the_last(cuda: Cuda) -> None:
    graphs, first = Graphs(CPU, 8), cuda.current
    list(graphs.replay(lambda x: (x + 1,), "", torch.ones(2)))
    waits = len(first.waits)
    list(graphs.replay(lambda x: (x + 1,), "", torch.ones(2)))
    assert len(first.waits) == waits
    cuda.current = Stream()
    list(graphs.replay(lambda x: (x + 1,), "", torch.ones(2)))
    assert cuda.current.waits == [first]


def test_a_pool_is_kept_only_once_it_holds_a_graph(cuda: Cuda) -> None:
    graphs = Graphs(CPU, 8)
    failing = [True]

    def function(x: Tensor) -> tuple[Tensor]:
        if failing and torch.is_tensor(x) and cuda.graphs:
            failing.pop()
            raise torch.OutOfMemoryError("while it is captured")
        return (x + 1,)

    with pytest.raises(torch.OutOfMemoryError):
        list(graphs.replay(function, "", torch.ones(2)))
    ((_, (result,)),) = graphs.replay(function, "", torch.ones(2))
    assert result.tolist() == [2.0, 2.0]
    assert [pool for _, _, pool in cuda.captures] == [1, 2]


# --- a scorer -------------------------------------------------------------------------------------


@cache
def bundle() -> Bundle:
    return tiny_bundle()


def captured(largest: int = 8, score: str = "discriminator_instance") -> Scorer:
    """A scorer of the CPU that takes the way of a GPU."""
    scorer = scorer_of(bundle(), score)
    scorer.model._graphs = Graphs(CPU, largest)
    return scorer


def test_scores_of_graphs_are_the_scores(cuda: Cuda) -> None:
    images = image_set(21, seed=3)
    batch = images.batch(slice(None))
    plain, ours = scorer_of(bundle()), captured()
    expected = plain.score(batch, reconstruction=True)
    for given in (batch, images.images, batch.double()):
        found = ours.score(given, reconstruction=True)
        torch.testing.assert_close(found.raw, expected.raw, rtol=1e-4, atol=1e-5)
        recon = expected.reconstruction
        torch.testing.assert_close(found.reconstruction, recon, rtol=1e-4, atol=1e-5)
    # Nor is what was returned overwritten by what comes after.
    kept = [found.raw.clone(), found.reconstruction.clone()]
    other = ours.score(1 - batch, reconstruction=True)
    assert torch.equal(found.raw, kept[0])
    assert torch.equal(found.reconstruction, kept[1])
    assert not torch.allclose(other.raw, found.raw)
    for name, values in plain.raw_scores(images).items():
        torch.testing.assert_close(ours.raw_scores(images)[name], values, rtol=1e-4, atol=1e-5)
    assert ours.score(batch[:0]).raw.shape == (0,)
    for scorer in (plain, ours):
        assert scorer.measure(batch, plain.score_names, reconstruction=False)[1] is None


def test_a_batch_is_waited_for_once(cuda: Cuda) -> None:
    scorer, images = captured(), image_set(21)
    for given in (images.images, images.batch(slice(None))):
        scorer.score(given)
        before = cuda.synchronised
        scorer.score(given)
        assert cuda.synchronised == before + 1


def test_bytes_reach_the_graph_as_bytes(cuda: Cuda) -> None:
    scorer = captured()
    scorer.score(image_set(8).images)
    ((_, _, _, dtype),) = scorer.model._graphs._captured
    assert dtype == torch.uint8


def test_values_that_do_not_fit_are_refused_as_on_a_cpu(cuda: Cuda) -> None:
    images = image_batch(11, seed=5)
    spoilt = images.clone()
    spoilt[3, 0, 5, 7], spoilt[10, 0, 0, 0] = torch.nan, torch.inf
    plain, ours = scorer_of(bundle()), captured()
    expected = ours.score(images).raw
    for scorer in (plain, ours):
        with pytest.raises(ValueError, match=r"^2 of 11 images hold NaN or infinite values"):
            scorer.score(spoilt)
        with pytest.raises(ValueError, match=r"images are torch\.int64; floating-point values"):
            scorer.score(images.long())
        with pytest.raises(ValueError, match=r"images are \[11, 48, 48\]; this model takes"):
            scorer.score(images[:, 0])
    for wrong, said in (
        (images * 255, r"^11 of 11 images hold values outside \[0, 1\].*; divide by 255"),
        (images - 0.01 * (torch.arange(11) == 4)[:, None, None, None], r"^1 of 11 images .*clamp"),
    ):
        sentences = set()
        for scorer in (plain, ours):
            with pytest.raises(ValueError, match=said) as caught:
                scorer.score(scorer.prefetch(wrong))
            sentences.add(str(caught.value))
        assert len(sentences) == 1
    # The next batch has nothing left of it, not even in places that stay empty.
    assert torch.equal(ours.score(images).raw, expected)
    torch.testing.assert_close(ours.score(images[:9]).raw, expected[:9], rtol=1e-4, atol=1e-5)


def test_a_copy_has_graphs_of_its_own(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, images = captured(), image_batch(11, seed=5)
    expected = scorer.score(images).raw
    # A copy on a GPU begins so; here the device says that there is none.
    monkeypatch.setattr(
        FrozenModel, "_begin", lambda model: setattr(model, "_graphs", Graphs(CPU, 8))
    )
    monkeypatch.setattr(FrozenModel, "_copies", None, raising=False)
    monkeypatch.setattr(FrozenModel, "_compiled", None, raising=False)
    for twin in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):
        assert not twin.model._graphs._captured
        assert torch.equal(twin.score(images).raw, expected)
        assert len(twin.model._graphs._captured) == len(scorer.model._graphs._captured) == 2


def test_threads_may_share_a_scorer(cuda: Cuda) -> None:
    scorer = captured()
    batches = [image_batch(8, seed=seed) for seed in range(4)]
    expected = [scorer.score(batch).raw for batch in batches]
    wrong = []

    def score(index: int) -> None:
        for _ in range(5):
            if not torch.equal(scorer.score(batches[index]).raw, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=score, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_threads_may_allocate_memory_during_a_capture(cuda: Cuda) -> None:
    capture(lambda: torch.ones(3), CPU)
    assert [graph.mode for graph in cuda.graphs] == ["thread_local"]


def test_scorers_of_two_threads_capture_one_after_the_other(cuda: Cuda) -> None:
    other_waits, errors = threading.Event(), []

    def replay(function: Callable[[Tensor], tuple[Tensor]]) -> None:
        try:
            list(Graphs(CPU, 8).replay(function, "", torch.ones(2)))
        except BaseException as error:
            errors.append(error)

    def slow(x: Tensor) -> tuple[Tensor]:
        if cuda.capturing:
            threads[1].start()
            other_waits.wait(timeout=0.5)
        return (x + 1,)

    def quick(x: Tensor) -> tuple[Tensor]:
        other_waits.set()
        return (x * 2,)

    threads = [threading.Thread(target=replay, args=(function,)) for function in (slow, quick)]
    threads[0].start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(cuda.graphs) == 2


def test_capture_without_a_pool_is_a_capture_of_its_own(cuda: Cuda) -> None:
    x = torch.ones(3)
    replay, result = capture(lambda: x * 2, CPU)
    x.fill_(4.0)
    replay()
    assert result.tolist() == [8.0] * 3
    assert cuda.captures[0][2] is None
