"""Words to be counted: the most common of a numbered list (cwe), and the most frequent of a coded text (fwe).

Source: RULER scripts/data/synthetic/common_words_extraction.py (10 common words 30 times and the others 3 times, below 4,096 tokens 6 times
and once) and freq_words_extraction.py (counts by a zeta distribution of alpha 2); the prompts as HELMET's data.py writes them.
"""

from __future__ import annotations

import math
from random import Random

from megatron_prism.eval.ruler import words
from megatron_prism.eval.ruler.draft import Draft

NUM_COMMON, SHORT_TOKENS = 10, 4096
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
    "{context}\n"
    "Question: What are the 10 most common words in the above list?\n"
    "Answer: The top 10 words that appear most often in the list are:"
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words.\n"
    "{context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in the above "
    "coded text?\n"
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
DOTS, ALPHA, NUM_FREQUENT, TOKENS_PER_CODE = "...", 2.0, 3, 50


def draw_common(length_tokens: int, random: Random) -> Draft:
    """Return a question on a numbered list, behind one solved example. Its size is the count of words that are not common."""
    repeats, example_repeats, num_others = ((6, 1), (3, 1), 10) if length_tokens < SHORT_TOKENS else ((30, 3), (10, 3), 30)
    drawn = random.sample(words.compounds(), len(words.compounds()))
    example, question = drawn[: NUM_COMMON + num_others], drawn[NUM_COMMON + num_others :]
    solved = " ".join(f"{index}. {word}" for index, word in enumerate(example[:NUM_COMMON], 1))
    before = f"{_list(example, example_repeats, random)} {solved}\n\n"
    seed = random.getrandbits(64)

    def write(size: int) -> str:
        return before + _list(question[: NUM_COMMON + size], repeats, Random(seed))

    return Draft(write=write, golds=tuple(question[:NUM_COMMON]), smallest=1, largest=len(question) - NUM_COMMON)


def _list(drawn: list[str], repeats: tuple[int, int], random: Random) -> str:
    """Return a numbered list of words, the common ones first in drawn, in an order that the size decides too."""
    listed = drawn[:NUM_COMMON] * repeats[0] + drawn[NUM_COMMON:] * repeats[1]
    random.shuffle(listed)
    return COMMON.format(context=" ".join(f"{number}. {word}" for number, word in enumerate(listed, 1)))


def draw_frequent(length_tokens: int, random: Random) -> Draft:
    """Return a question on a coded text. Its size is the count of words that the shares of the distribution are taken of."""
    codes: dict[str, None] = {DOTS: None}
    while len(codes) < max(length_tokens // TOKENS_PER_CODE, 2 * NUM_FREQUENT):
        codes[words.coded(random)] = None
    ranked = list(codes)
    zeta = math.pi**2 / 6
    seed = random.getrandbits(64)

    def write(size: int) -> str:
        text = [code for rank, code in enumerate(ranked, 1) for _ in range(int(size * rank**-ALPHA / zeta))]
        Random(seed).shuffle(text)
        return FREQUENT.format(context=" ".join(text))

    # from 53 words on, the fourth code stands there more often than the fifth
    return Draft(write=write, golds=tuple(ranked[1 : NUM_FREQUENT + 1]), smallest=53)
