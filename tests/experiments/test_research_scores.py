"""Research scores: against the reference, and their combinations."""

from __future__ import annotations

import copy

import numpy as np
import torch

from squid_fast import reference
from squid_fast.experiments.research_scores import evaluate_others, other_scores
from tests.factories import TINY, image_set, tiny_squid


def test_they_are_what_their_names_say_and_change_nothing() -> None:
    model, images = tiny_squid(), image_set(19)
    before = copy.deepcopy(model.state_dict())
    found = other_scores(model, images, "float32", "cpu")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert model.inpaint_block.memory.pending is None

    plain = reference.SQUID(**TINY).double()
    plain.load_state_dict(model.state_dict())
    features: list[np.ndarray] = []
    convolution = plain.eval().inpaint_block.bottleneck_conv1
    convolution.register_forward_hook(lambda m, given, f: features.append(f.detach().numpy()))
    with torch.no_grad():
        outputs = plain(images.batch(slice(None)).double())
    difference = (outputs["recon"] - outputs["teacher_recon"]).square().mean(dim=(1, 2, 3))
    np.testing.assert_allclose(found["teacher_difference"], difference, rtol=1e-4)
    slots = model.inpaint_block.memory.slots.double().numpy()
    for image, vectors in enumerate(features[0].reshape(19, 4, 144)):
        nearest = [
            max(vector @ slot / np.linalg.norm(vector) / np.linalg.norm(slot) for slot in slots[n])
            for n, vector in enumerate(vectors)
        ]
        assert abs(float(found["memory_distance"][image]) - (1 - np.mean(nearest))) < 1e-5


def test_a_model_without_a_teacher_has_no_difference_to_it() -> None:
    model = tiny_squid(dist=False)
    assert other_scores(model, image_set(1), device="cpu").keys() == {"memory_distance"}


def test_combinations_are_means_of_z_scores() -> None:
    model, images = tiny_squid(dist=False), image_set(2, anomalous=1)
    z = {
        "discriminator_instance": np.array([1, 2], np.float32),
        "discriminator_image": np.array([3, -4], np.float32),
    }
    figures, values = evaluate_others(model, images, z, device="cpu")
    assert figures.keys() == {"memory_distance", "combined_discriminator"}  # no patch_error given
    assert values["combined_discriminator"].tolist() == [2, -1]
    assert figures["combined_discriminator"].auroc == 1
