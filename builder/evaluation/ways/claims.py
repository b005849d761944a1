"""The papers' figures of the methods in the table, on other models, questions and hardware.

Shares are of the accuracy with all tokens, of the published 7B model on 32 frames unless stated otherwise; TTFT is the
time to first token. A paper that measured another's method is named.
"""

from __future__ import annotations

CLAIMS: dict[str, str] = {
    "budget": "over 96 % at 10 % of the tokens, TTFT 2.65x lower (one A100)",
    "holitom": "99.0 % at 10 %, 100.2 % at 20 %, TTFT 2.22x lower",
    "holitom-inner": "99.1 % at 10 %, 100.7 % at 20 %, TTFT 2.28x lower",
    "fastv": "96.7 % at 9.3 of 40.8 TFLOP, TTFT 1.84x lower (both by HoliTom's paper)",
    "visionzip": "91.6 % at 10 %, 98.8 % at 20 %, TTFT 2.06x lower (all by HoliTom's paper)",
    "fastvid": "97.8 % at 10 % (by UniComp's paper)",
    "flashvid": "99.1 % at 10 %, of which 12.5 % enter the language model",
    "unicomp": "99.7 % at 10 %, 100.9 % at 20 %",
    "evs": "TTFT up to 4x lower with minimal loss",
    "vidcom2": "99.6 % at 25 %, 70.8 % less time in the language model",
    "unified": "95.4 % at 5 %, 90.1 % at 2 %",
    "tempme": "95 % fewer tokens, half of the arithmetic, 1.8x faster, trained, in text-video retrieval",
    "vqtoken": "0.07 % of the tokens for 0.66 points of NextQA, trained, 0.5B model",
    "bvllm-style": "trained, with Q-Formers and another tower: about 10 % better on MVBench than what it was built on",
    "dycoke-least": "92.6 % at 25 % (by HoliTom's paper)",
}
"""By the row's name."""
