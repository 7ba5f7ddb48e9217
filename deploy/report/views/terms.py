"""Words that a report uses and not every reader knows, explained where they stand."""

from __future__ import annotations

import re
from collections.abc import Iterable

from markupsafe import Markup, escape

from upvits.deploy.report.views.section import Section

TERMS = {
    "95 % interval": "Measured again and again on other images, such a range holds the true figure 95 times of 100. Of "
    "two networks on the same images, a change is certain only where the range leaves out 0.",
    "agreement": "The share of images on which two networks, or two precisions, give the same first answer.",
    "AP": "Average precision of a detector in percent, over how exactly boxes must fit (IoU 0.5 to 0.95, as COCO has "
    "it). AP50 and AP75 ask for an overlap of 50 and 75 %.",
    "batch": "Images that are computed in one call.",
    "casts": "Changes from one number format to another between layers. Each costs time.",
    "cosine": "How alike two outputs are in direction: 1 is equal. The smallest over all images.",
    "CV": "Coefficient of variation: standard deviation of the time of calls over their mean. Above 2.5 % something "
    "else was running.",
    "dense": "The network before pruning.",
    "engine": "What a runtime makes of a network for one kind of device.",
    "fused attention": "Attention blocks that the runtime computes in one step instead of several.",
    "KL": "Kullback-Leibler divergence: how far one network's probabilities are from another's, in nats. 0 is equal.",
    "MACs": "Multiply-accumulate steps for one image, in matrix products and convolutions: the work of a network.",
    "matrix products": "Layers that multiply by weights; they hold nearly all of a network's work.",
    "max abs": "The largest difference between two outputs.",
    "nats": "Unit of information with the natural logarithm; 1 nat is 1.44 bits.",
    "p90": "90 % of the calls took this long or less; p95 and p99 are the same for 95 and 99 %.",
    "parity": "The check that the same network gives the same outputs in another runtime or format.",
    "parameters": "Numbers that a network learnt; they make up its size.",
    "Pareto front": "Choices that no other one beats in both latency and accuracy.",
    "points": "Percentage points: the difference between two figures in percent.",
    "precision": "Number format of the layers: fp32, fp16 and bf16 (half as large), int8 and fp8 (a quarter).",
    "pruned": "The network after units were cut out of it and the rest was trained again.",
    "quantized": "Layers that compute in int8 or fp8.",
    "range": "10th to 90th percentile over rounds: in each round both networks are measured right after each other.",
    "reformats": "Changes of how numbers lie in memory, between layers. Each costs time.",
    "runtime": "The library that runs a network on a device.",
    "SQNR": "Signal over quantization noise of outputs, in dB: at 20 dB the error is a tenth of the signal, at 40 dB a "
    "hundredth. Below about 20 dB answers begin to change.",
    "streams": "Sessions that work at the same time.",
    "top-1": "The share of images whose right class is the network's first answer.",
}  # fmt: skip

LABELLED = ("result", "compensation", "detection")
"""Sections whose first column names figures, not things of a network."""

_BY_SPELLING = {spelling: term for term in TERMS for spelling in (term, term[0].upper() + term[1:])}
_PATTERN = re.compile(
    r"(?<![\w-])(?:" + "|".join(re.escape(term) for term in sorted(_BY_SPELLING, key=len, reverse=True)) + r")(?![\w-])"
)
_PLAIN = ("batch", "dense", "engine", "pruned", "precision", "runtime", "points")
"""Words that stand everywhere: explained at the top of the page, and not each time."""


def terms_in(*texts: str) -> list[tuple[str, str]]:
    """The words in texts that have an explanation, and it, in alphabetical order."""
    found = {_BY_SPELLING[match] for text in texts for match in _PATTERN.findall(text)}
    return sorted(((term, TERMS[term]) for term in found), key=lambda pair: pair[0].lower())


def terms_of(sections: Iterable[Section]) -> list[tuple[str, str]]:
    """Those of titles, headings, labels of rows and remarks of sections, but for words that stand everywhere."""
    texts: list[str] = []
    for section in sections:
        labels = (row[0].text for row in section.rows) if section.key in LABELLED else ()
        texts += (section.title, *section.header, *labels, *section.remarks)
    return [(term, meaning) for term, meaning in terms_in(*texts) if term not in _PLAIN]


def explained(text: str) -> Markup:
    """The text with its special words marked, so that a pointer over them shows the explanation."""

    def marked(match: re.Match[str]) -> str:
        term = _BY_SPELLING[match[0]]
        return match[0] if term in _PLAIN else f'<abbr title="{escape(TERMS[term])}">{match[0]}</abbr>'

    return Markup(_PATTERN.sub(marked, str(escape(text))))
