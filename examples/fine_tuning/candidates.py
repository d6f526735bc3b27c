"""The candidates: what each adds to distillation under a budget of 0.03, and how much of the network is trainable.

`silence` is what `dead_relu` was called when the committed rows were made.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One way to immunize.

    Attributes:
        title: For the page.
        about: In a sentence.
        scope: What is trainable: "last", "deep" or "whole"; an experiment says which parameters these are.
        head: Whether concentration at the classifier's input is part of it.
        layers: Whether concentration of flattened outputs at the experiment's layers is.
        silence: Whether all ReLUs at the experiment's places shall be dead on harmful images.
        ridge: Whether an inner ridge attacker at these layers, pooled, is.
        tuner: "unrolled" (a fine-tuning attacker of a few steps), "flat" (small harmful gradients), or none.
    """

    title: str
    about: str
    scope: str
    head: bool = False
    layers: bool = False
    silence: bool = False
    ridge: bool = False
    tuner: str = ""


CANDIDATES = {
    "concentration": Candidate(
        "concentration",
        "Concentration at the classifier's input; the last stage moves.",
        "last",
        head=True,
    ),
    "deep_head": Candidate(
        "classifier's input, deep scope",
        "The same objective; all but the first part of the network moves.",
        "deep",
        head=True,
    ),
    "whole_head": Candidate(
        "classifier's input, whole network",
        "The same objective; every parameter moves.",
        "whole",
        head=True,
    ),
    "depths": Candidate(
        "several depths",
        "Concentration of flattened features at several depths and at the classifier's input.",
        "deep",
        head=True,
        layers=True,
    ),
    "silence": Candidate(
        "rectifiers off",
        "Everything that enters the rectifiers at several depths is pushed below zero.",
        "deep",
        silence=True,
    ),
    "silence_whole": Candidate(
        "rectifiers off, whole network",
        "The same; every parameter moves.",
        "whole",
        silence=True,
    ),
    "ridge": Candidate(
        "inner ridge attacker",
        "A ridge probe at several depths, pooled, differentiated through its solve.",
        "deep",
        ridge=True,
    ),
    "unrolled": Candidate(
        "unrolled fine-tuning",
        "A copy is fine-tuned for four steps of AdamW; its loss afterwards is raised, to first order.",
        "deep",
        tuner="unrolled",
    ),
    "flat": Candidate(
        "flat directions",
        "The harmful gradient of all that moves, under a new head, is made small.",
        "deep",
        tuner="flat",
    ),
    "depths_unrolled": Candidate(
        "several depths, unrolled",
        "Both of these.",
        "deep",
        head=True,
        layers=True,
        tuner="unrolled",
    ),
    "silence_depths": Candidate(
        "rectifiers off, several depths",
        "Both of these.",
        "deep",
        head=True,
        layers=True,
        silence=True,
    ),
}
