"""The weight of the KL term in training."""

from __future__ import annotations


def kl_annealing(step: int, warmup: int, *, start: float = 0.0) -> float:
    """From `start` at step 0 in a straight line to 1 at step `warmup`, and 1 from there on.

    At full weight from the first step, the posterior tends to settle on the prior before the decoder has learnt to make
    use of it.

    Source: Bowman, Vilnis, Vinyals, Dai, Jozefowicz & Bengio, Generating sentences from a continuous space, 2015,
    section 3.1.
    """
    return 1.0 if step >= warmup else start + (1.0 - start) * step / warmup
