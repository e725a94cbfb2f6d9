"""The baseline that must lose: logistic regression on a bag of words.

It sees every word of the prompt and of the response so far, counted, and how long the
response is. It cannot see which word belongs to which, and the rule of the language is
about just that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from . import grammar
from .language import Prompt, horizon_labels, violating_index

Floats = NDArray[np.float64]


def bag_of_words(prompt: Prompt, response: Sequence[int]) -> Floats:
    """Word counts at the end of the prompt and after each response token.

    Returns
    -------
    ndarray [T + 1, 2 V + 1]
        Counts within the prompt, counts within the response so far, and the share of the
        response that 100 tokens would be.
    """
    size = len(grammar.VOCABULARY)
    counts = np.zeros((len(response) + 1, 2 * size + 1))
    counts[:, :size] = np.bincount(prompt.ids, minlength=size)
    steps = np.arange(1, len(response) + 1)
    counts[steps, size + np.asarray(response, dtype=np.int64)] = 1.0
    counts[:, size : 2 * size] = counts[:, size : 2 * size].cumsum(0)
    counts[1:, -1] = steps / 100.0
    return counts


class BagOfWords:
    """Risk from word counts, by logistic regression (scikit-learn, imported on `fit`).

    Attributes
    ----------
    weight : ndarray [2 V + 1]
    bias : float
    """

    def __init__(self, weight: Floats, bias: float) -> None:
        self.weight, self.bias = weight, bias

    @classmethod
    def fit(
        cls,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int]],
        horizon: int,
    ) -> BagOfWords:
        """Fit on every token of the given responses.

        Parameters
        ----------
        horizon : int
            The target is a violation by now or within so many more tokens; 0 asks whether
            the text so far has violated. Tokens whose answer lies beyond a cut are left out.
        """
        from sklearn.linear_model import LogisticRegression

        rows, targets = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            target, known = horizon_labels(prompt, response, horizon)
            if horizon:  # past the violation the answer is no forecast any more
                first = violating_index(prompt.sealed, response)
                known[first + 1 :] &= first < 0
            rows.append(bag_of_words(prompt, response)[known])
            targets.append(target[known])
        model = LogisticRegression(C=0.1, max_iter=300)
        model.fit(np.concatenate(rows), np.concatenate(targets))
        return cls(np.asarray(model.coef_[0], dtype=np.float64), float(model.intercept_[0]))

    def risk(self, prompt: Prompt, response: Sequence[int]) -> Floats:
        """Risk at the end of the prompt and after each token  ``[T + 1]``."""
        logit = bag_of_words(prompt, response) @ self.weight + self.bias
        risk: Floats = 1.0 / (1.0 + np.exp(-logit))
        return risk
